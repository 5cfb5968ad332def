import dataclasses
import functools as ft
import math
import types
from typing import Any

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from eqx_bilevel._closure import function_as_pytree
from jaxtyping import Array


def arrays(fn):
    return jax.tree.leaves(eqx.filter(function_as_pytree(fn), eqx.is_array))


def is_converted(fn):
    return isinstance(function_as_pytree(fn), eqx.Module)


class Counter:
    # Calls a function under `filter_jit`, as the library does, and counts traces.
    def __init__(self):
        self.traces = 0

        @eqx.filter_jit
        def run(fn, args):
            self.traces += 1
            return fn(*args)

        self.run = run

    def __call__(self, fn, *args):
        return self.run(function_as_pytree(fn), args)


X = jnp.array([0.3, 0.7])


#
# Plain functions
#


def test_same_code_is_traced_once():
    count = Counter()
    for scale in (1.0, 2.0, 3.0):
        c = jnp.array(scale)
        out = count(lambda x: c * x, X)
        np.testing.assert_array_equal(out, scale * X)
    assert count.traces == 1
    # Another piece of code is another function.
    np.testing.assert_array_equal(count(lambda x: c + x, X), 3.0 + X)
    assert count.traces == 2


def test_plain_functions_would_be_traced_each_time():
    # What all this is for.
    count = Counter()
    for _ in range(2):
        count.run(lambda x: x, (X,))
    assert count.traces == 2


def test_python_numbers_are_static():
    count = Counter()
    for power, traces in ((2, 1), (3, 2), (2, 2)):
        out = count(lambda x: x**power, X)
        np.testing.assert_allclose(out, np.asarray(X) ** power, rtol=1e-15)
        assert count.traces == traces
    # Those that decide which branch is taken may be used for that.
    for flag in (True, False):
        out = count(lambda x: x if flag else -x, X)
        np.testing.assert_array_equal(out, X if flag else -X)


def test_pytrees_in_closures():
    module = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    tree = {"a": [jnp.array(2.0), 3.0], "b": None, "c": "text"}
    fn = lambda x: module(x) * tree["a"][0] * tree["a"][1]
    assert len(arrays(fn)) == 3  # Two of them are the module's.
    np.testing.assert_allclose(function_as_pytree(fn)(X), module(X) * 6, rtol=1e-15)
    doubled = jtu.tree_map(
        lambda leaf: 2 * leaf if eqx.is_array(leaf) else leaf, function_as_pytree(fn)
    )
    np.testing.assert_allclose(doubled(X), module(X) * 24, rtol=1e-15)


def test_numpy_arrays_in_closures():
    count = Counter()
    for scale in (1.0, 2.0):
        c = np.array([scale, 0.5])
        assert len(arrays(lambda x: c * x)) == 1
        np.testing.assert_array_equal(count(lambda x: c * x, X), c * np.asarray(X))
    assert count.traces == 1


def test_functions_in_closures():
    def make(scale):
        c = jnp.array(scale)
        inner = lambda x: c * x
        return lambda x: inner(x) + 1.0

    assert len(arrays(make(2.0))) == 1
    count = Counter()
    for scale in (1.0, 2.0):
        np.testing.assert_array_equal(count(make(scale), X), scale * X + 1)
    assert count.traces == 1
    # Also in containers.
    fns = (make(2.0), jnp.sin, make(3.0))
    fn = lambda x: sum(f(x) for f in fns)
    assert len(arrays(fn)) == 2
    np.testing.assert_allclose(function_as_pytree(fn)(X), fn(X), rtol=1e-15)


def test_defaults():
    c, d = jnp.array(2.0), jnp.array(5.0)

    def fn(x, a=c, *rest, b=d, power=2):
        return a * x**power + b + len(rest)

    converted = function_as_pytree(fn)
    assert len(arrays(fn)) == 2
    np.testing.assert_array_equal(converted(X), 2 * X**2 + 5)
    np.testing.assert_array_equal(converted(X, jnp.array(3.0)), 3 * X**2 + 5)
    np.testing.assert_array_equal(converted(X, c, 1, 1, b=c, power=1), 2 * X + 4)
    gradient = eqx.filter_grad(lambda f: jnp.sum(f(X)))(converted)
    assert sorted(map(float, jax.tree.leaves(gradient))) == [
        pytest.approx(0.09 + 0.49),
        2.0,
    ]


# A loop's variable as a default is the usual way to bind it early.
def test_defaults_are_traced_once():
    count = Counter()
    for i in range(3):
        out = count(lambda x, c=jnp.array(float(i)): c * x, X)
        np.testing.assert_array_equal(out, i * X)
    assert count.traces == 1


def test_gradient():
    c = jnp.array([2.0, 3.0])
    converted = function_as_pytree(lambda x: jnp.sum(c**2 * x))
    gradient = eqx.filter_grad(lambda f: f(X))(converted)
    np.testing.assert_allclose(jax.tree.leaves(gradient)[0], 2 * c * X, rtol=1e-15)


#
# Functions that are left alone
#


class Scale(eqx.Module):
    factor: Array

    def __call__(self, x):
        return self.factor * x

    def method(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    "thing", (Scale(jnp.array(2.0)), Scale(jnp.array(2.0)).method, jnp.sin, 1.0, None)
)
def test_what_is_not_a_plain_function(thing):
    assert function_as_pytree(thing) is thing


def test_recursive():
    c = jnp.array(2.0)

    def power(x, n=3):
        return x if n == 0 else c * power(x, n - 1)

    assert function_as_pytree(power) is power
    np.testing.assert_array_equal(Counter()(power, X), 8 * X)
    # So are functions that use a recursive one, as far as possible.
    fn = lambda x: power(x) + c
    np.testing.assert_array_equal(Counter()(fn, X), 8 * X + 2)


def test_mutually_recursive():
    def even(x, n=4):
        return x if n == 0 else odd(x, n - 1)

    def odd(x, n):
        return -even(x, n - 1)

    np.testing.assert_array_equal(Counter()(even, X), X)


def test_not_yet_assigned():
    def make():
        fn = lambda x: x * later
        before = function_as_pytree(fn)
        later = 3.0
        return fn, before, function_as_pytree(fn)

    fn, before, after = make()
    assert before is fn
    np.testing.assert_array_equal(before(X), 3 * X)
    np.testing.assert_array_equal(after(X), 3 * X)


# A list or dictionary without arrays may be there to be changed.
def test_log():
    log, table = [], {}

    def fn(x):
        log.append("called")
        table["shape"] = x.shape
        return x

    assert function_as_pytree(fn) is fn
    Counter()(fn, X)
    assert log == ["called"] and table == {"shape": (2,)}


# JAX refuses to flatten these.
def test_dictionary_with_mixed_keys():
    c, table = jnp.array(2.0), {1: 3.0, "a": 4.0, None: 5.0}
    fn = lambda x: c * table[1] * x
    assert function_as_pytree(fn) is fn
    np.testing.assert_array_equal(Counter()(fn, X), 6 * X)


@pytest.mark.parametrize("wrap", (ft.partial, jtu.Partial))
def test_partial(wrap):
    def make(value):
        c = jnp.array(value)
        return wrap(lambda a, x, b: a * x + b * c, c, b=np.array([1.0, 2.0]))

    count = Counter()
    for value in (2.0, 3.0):
        expected = value * X + value * np.array([1.0, 2.0])
        np.testing.assert_allclose(count(make(value), X), expected, rtol=1e-14)
    # `jax.tree_util.Partial` is a pytree already, with a static function. Of the other,
    # `b` and `c` are data, and `c` twice: it is closed over, too.
    assert wrap is jtu.Partial or (count.traces == 1 and len(arrays(make(2.0))) == 3)


def test_unhashable():
    count = Counter()
    for value in (2.0, 3.0):
        thing = types.MappingProxyType({"value": value})
        fn = lambda x: thing["value"] * x
        assert function_as_pytree(fn) is fn
        np.testing.assert_array_equal(count(fn, X), value * X)


#
# Attributes of objects, classes and modules. They may change.
#


@dataclasses.dataclass
class Data:
    nu: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    nu: Any


class Model:
    nu: Any = 0.0

    def __init__(self, nu):
        self.inner = types.SimpleNamespace(nu=nu, others=[nu])
        self.nu = nu

    @property
    def half(self):
        return 0.5 * self.nu

    def method(self, x):
        return 2 * self.half * x

    @staticmethod
    def static(one, x):
        return one.nu * x

    def __call__(self, x):
        return self.method(x)

    def make(self):
        return lambda x: self.nu * x


class Slots:
    __slots__ = ("nu",)

    def __init__(self, nu):
        self.nu = nu


def _class_with(nu):
    Model.nu = nu
    return lambda x: Model.nu * x


def _module_with(nu, module=types.ModuleType("physics")):
    module.nu = nu  # pyright: ignore
    return lambda x: module.nu * x


def _function_of_module_with(nu, module=types.ModuleType("physics")):
    exec("def fn(x): return nu * x", module.__dict__)
    module.nu = nu  # pyright: ignore
    return lambda x: module.fn(x)


def _object_of_closure(make):
    def with_object(nu, one=make(None)):
        one.nu = nu  # The same object each time.
        return lambda x: one.nu * x

    return with_object


def _new_object(make, use=lambda one, x: one.nu * x):
    def with_object(nu):
        one = make(nu)
        return lambda x: use(one, x)

    return with_object


_OWNERS = dict(
    object=_object_of_closure(Model),
    dataclass=_object_of_closure(Data),
    namespace=_object_of_closure(lambda nu: types.SimpleNamespace(nu=nu)),
    frozen=_new_object(Frozen),
    property=_new_object(Model, lambda one, x: 2 * one.half * x),
    method=_new_object(Model, lambda one, x: one.method(x)),
    static=_new_object(Model, lambda one, x: Model.static(one, x)),
    called=_new_object(Model, lambda one, x: one(x)),
    inside=_new_object(Model, lambda one, x: one.inner.nu * x),
    bound=lambda nu: Model(nu).method,
    callable=Model,
    own=lambda nu: Model(nu).make(),
    cls=_class_with,
    module=_module_with,
    function_of_module=_function_of_module_with,
)


@pytest.mark.parametrize("name", _OWNERS)
def test_attributes(name):
    # Numbers are static, arrays are data, and traced ones too.
    make, count = _OWNERS[name], Counter()
    for nu in (2.0, 3.0):
        np.testing.assert_allclose(count(make(nu), X), nu * X, rtol=1e-15)
    assert count.traces == 2
    for nu in (2.0, 3.0):
        np.testing.assert_allclose(count(make(jnp.array(nu)), X), nu * X, rtol=1e-15)
    assert count.traces == 3
    gradient = jax.grad(lambda nu: jnp.sum(count(make(nu), X)))(2.0)
    np.testing.assert_allclose(gradient, jnp.sum(X), rtol=1e-15)


@pytest.mark.parametrize(
    "make",
    (
        _object_of_closure(Slots),
        _new_object(Model, lambda one, x: one.inner.others[0] * x),
    ),
)
def test_attributes_that_are_not_data(make):
    count = Counter()
    for nu in (2.0, 3.0, 3.0):
        np.testing.assert_allclose(count(make(nu), X), nu * X, rtol=1e-15)


class Shape(eqx.Module):
    profile: Any

    def __call__(self, x):
        return self.profile(x) + self.profile.nu + self.profile.inner.nu


def test_attributes_of_what_is_called():
    shape, count = Shape(Model(1.0)), Counter()
    for nu in (2.0, 3.0):
        shape.profile.nu = nu
        converted = jax.tree.map(function_as_pytree, shape)
        np.testing.assert_allclose(count(converted, X), nu * X + nu + 1, rtol=1e-15)
    assert function_as_pytree(Data(1.0)) == Data(1.0)


def test_object_that_a_function_changes():
    log = types.SimpleNamespace(calls=0)

    def fn(x):
        log.calls += 1
        return x

    Counter()(fn, X)
    assert log.calls == 1


#
# Variables of the module. They are not in a function's closure, but may change.
#

GLOBAL = jnp.array(1.0)
NUMBER = 1.0


def _helper(x):
    return NUMBER * x


def _uses_helper(x):
    return _helper(x) + 1.0


def _inner_function(x):
    return jax.vmap(lambda v: NUMBER * v)(x)


def _countdown(x, n=3):
    return x if n == 0 else NUMBER * _countdown(x, n - 1)


@pytest.mark.parametrize("value", (2.0, 3.0))
def test_global_array(value, monkeypatch):
    make = lambda: lambda x: GLOBAL * x
    count = Counter()
    np.testing.assert_array_equal(count(make(), X), X)
    monkeypatch.setitem(globals(), "GLOBAL", jnp.array(value))
    np.testing.assert_array_equal(count(make(), X), value * X)


def test_attribute_called_like_a_global(monkeypatch):
    # `x.T` does not read the variable `T`, whatever that is.
    make = lambda: lambda x: x.T
    count = Counter()
    for value in (1.0, 2.0, jnp.array(jnp.nan), eqx.nn.Identity()):
        monkeypatch.setitem(globals(), "T", value)
        assert jax.tree.leaves(function_as_pytree(make())) == []
        count(make(), X)
    assert count.traces == 1


def test_global_number(monkeypatch):
    make = lambda: lambda x: NUMBER * x
    count = Counter()
    np.testing.assert_array_equal(count(make(), X), X)
    np.testing.assert_array_equal(count(make(), X), X)
    assert count.traces == 1
    monkeypatch.setitem(globals(), "NUMBER", 2.0)
    np.testing.assert_array_equal(count(make(), X), 2 * X)


@pytest.mark.parametrize("name", ("_uses_helper", "_inner_function", "_countdown"))
def test_global_number_further_inside(name, monkeypatch):
    fn = globals()[name]
    count = Counter()
    np.testing.assert_allclose(count(fn, X), fn(X), rtol=1e-15)
    before = np.asarray(fn(X))
    monkeypatch.setitem(globals(), "NUMBER", 2.0)
    assert not np.allclose(fn(X), before)
    np.testing.assert_allclose(count(fn, X), fn(X), rtol=1e-15)


def test_global_function(monkeypatch):
    make = lambda: lambda x: _helper(x)
    count = Counter()
    np.testing.assert_array_equal(count(make(), X), X)
    monkeypatch.setitem(globals(), "_helper", lambda x: 5.0 * x)
    np.testing.assert_array_equal(count(make(), X), 5 * X)


def test_repr():
    strength = jnp.ones(2)
    fn = function_as_pytree(lambda u: strength * u)
    assert repr(fn) == "<function <lambda>>(strength=f64[2])"
    assert repr(function_as_pytree(_without_data)) == "<function _without_data>"


def _without_data(x):
    return x


#
# Through the library
#


class Reaction(eqx.Module):
    nu: Array
    power: int = eqx.field(default=3, static=True)

    def __call__(self, u, x):
        return -self.nu * u.d(0, 0) + u.value**self.power + u.value


POINTS = jnp.linspace(0.05, 0.95, 6)[:, None]
ENDS = jnp.array([[0.0], [1.0]])


def _predict(operator, target=1.0, mean=None):
    prior = eb.GaussianProcess(eb.Gaussian(0.4), mean)
    conditions = [
        eb.Condition(operator, POINTS, target, nugget=1e-8),
        eb.Condition(lambda u, x: u.value, ENDS, nugget=1e-8),
    ]
    return eb.solve(prior, conditions)(jnp.array([0.4]))


def _closing_over(nu):
    return lambda u, x: -nu * u.d(0, 0) + u.value**3 + u.value


def _with_default(nu):
    return lambda u, x, nu=nu: -nu * u.d(0, 0) + u.value**3 + u.value


def _in_dictionary(nu):
    params = {"nu": nu, "rates": [jnp.array(1.0), 1.0]}
    return lambda u, x: (
        -params["nu"] * u.d(0, 0) + u.value**3 + params["rates"][0] * u.value
    )


def _partial(nu):
    fn = lambda u, x, nu, power: -nu * u.d(0, 0) + u.value**power + u.value
    return ft.partial(fn, nu=nu, power=3)


MAKERS = dict(
    closure=_closing_over,
    default=_with_default,
    in_dictionary=_in_dictionary,
    partial=_partial,
)


@pytest.fixture(scope="module")
def truth():
    fn = lambda nu: _predict(Reaction(nu))
    nu = jnp.array(0.1)
    value, gradient = jax.value_and_grad(fn)(nu)
    h = 1e-4
    difference = (fn(nu + h) - fn(nu - h)) / (2 * h)
    np.testing.assert_allclose(gradient, difference, rtol=1e-5)
    return value, gradient


@pytest.mark.parametrize("name", MAKERS)
def test_solve(name, truth):
    make = MAKERS[name]
    nu = jnp.array(0.1)
    fn = lambda nu: _predict(make(nu))
    value, gradient = jax.value_and_grad(fn)(nu)
    np.testing.assert_allclose(value, truth[0], rtol=1e-9)
    np.testing.assert_allclose(gradient, truth[1], rtol=1e-7)


def test_functions_inside_are_functions():
    # JAX hashes those that it is given.
    count, scale = Counter(), jnp.array(2.0)

    def make():
        def one(v):
            return scale * v + X[0]

        def other(v, by=3.0):
            return v / by

        return lambda v: jax.lax.cond(v > 1, one, other, v)

    for _ in range(2):
        np.testing.assert_allclose(count(make(), jnp.array(4.0)), 8.3)
        np.testing.assert_allclose(count(make(), jnp.array(0.6)), 0.2)
    assert count.traces == 1
    assert len(arrays(make())) == 2


# Targets and means are functions, too.
def test_solve_with_closures_elsewhere():
    a, b = jnp.array(1.1), jnp.array(0.2)
    reaction = Reaction(jnp.array(0.1))

    def fn(a, b):
        bump = lambda x: b * jnp.sin(math.pi * x[0])
        return _predict(reaction, lambda x: a * x[0], bump)

    gradients = jax.jit(jax.grad(fn, argnums=(0, 1)))(a, b)
    h = 1e-4
    differences = (
        (fn(a + h, b) - fn(a - h, b)) / (2 * h),
        (fn(a, b + h) - fn(a, b - h)) / (2 * h),
    )
    assert min(map(abs, differences)) > 1e-6
    np.testing.assert_allclose(gradients, differences, rtol=1e-5)


class Calls:
    def __init__(self):
        self.number = 0


def test_solve_compiles_once():
    calls = Calls()

    def predict(nu):
        def operator(u, x):
            calls.number += 1
            return -nu * u.d(0, 0) + u.value**3 + u.value

        return _predict(operator)

    first = predict(jnp.array(0.1))
    before, calls.number = calls.number, 0
    second = predict(jnp.array(0.2))
    # Only the checks before compiling.
    assert 0 < calls.number < before / 2
    assert abs(first - second) > 1e-2


@pytest.mark.parametrize("container", (lambda: [1.0, "a"], lambda: {0: 1.0, "a": 0}))
def test_global_container(container, monkeypatch):
    # It is left where it is, and looked into.
    shared, count = container(), Counter()
    monkeypatch.setitem(globals(), "GLOBAL", shared)
    for value in (1.0, 2.0, 2.0):
        shared[0] = value
        fn = lambda x: GLOBAL[0] * x  # pyright: ignore
        np.testing.assert_array_equal(count(fn, X), value * X)


def test_solve_sees_changed_globals(monkeypatch):
    make = lambda: lambda u, x: -NUMBER * u.d(0, 0) + u.value**3 + u.value
    before = _predict(make())
    monkeypatch.setitem(globals(), "NUMBER", 0.1)
    after = _predict(make())
    np.testing.assert_allclose(after, _predict(Reaction(jnp.array(0.1))), rtol=1e-9)
    assert abs(after - before) > 1e-2


@pytest.mark.parametrize("kind", ("global", "closure", "default", "partial"))
def test_parameters_in_functions(kind, monkeypatch):
    # Operators see their values, and `learn` learns them.
    parameter = eb.Positive(2.0)
    monkeypatch.setitem(globals(), "GLOBAL", parameter)

    def given(strength, u, x):
        return strength * u.value

    operators = {
        "global": lambda u, x: GLOBAL * u.value,
        "closure": lambda u, x: parameter * u.value,
        "default": lambda u, x, strength=parameter: strength * u.value,
        "partial": ft.partial(given, parameter),
    }
    condition = eb.Condition(operators[kind], POINTS, 3.0)
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian(0.5)), [condition])
    np.testing.assert_allclose(solution(POINTS), 1.5, rtol=1e-6)
    is_parameter = lambda x: isinstance(x, eb.Positive)
    inside = jax.tree.leaves(solution.conditions, is_leaf=is_parameter)
    assert any(map(is_parameter, inside))
