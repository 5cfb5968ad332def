"""Bad input and numerical trouble: what is said, and that it is said in time."""

import math
import pathlib
import subprocess
import sys
import warnings

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest


def _exact(x):
    return jnp.sin(3 * x[0]) + 0.3 * x[0]


def _source(x):
    return 9 * jnp.sin(3 * x[0]) + _exact(x) ** 3


class Cubic(eqx.Module):
    strength: jax.Array = eqx.field(default=1.0, converter=jnp.asarray)

    def __call__(self, u, x):
        return -u.laplacian + self.strength * u.value**3


def _value(u, x):
    return u.value


interior = jnp.linspace(0.0, 2.0, 10)[1:-1, None]
ends = jnp.array([[0.0], [2.0]])
sources = jax.vmap(_source)(interior)
grid = jnp.linspace(0.0, 2.0, 5)[:, None]


def _pde(points=interior, target=sources, operator=Cubic(), nugget=1e-6, **kwargs):
    return eb.Condition(operator, points, target, nugget=nugget, name="pde", **kwargs)


def _ends():
    return eb.Condition(_value, ends, _exact, nugget=1e-6, name="ends")


def _prior(lengthscale=0.6):
    return eb.GaussianProcess(eb.Gaussian(lengthscale))


def _solve(*conditions, prior=None, **kwargs):
    return eb.solve(_prior() if prior is None else prior, list(conditions), **kwargs)


#
# What is known before compiling
#


@pytest.fixture
def no_solve(compiled):
    # Fails if a whole solve is compiled; conversions of single arrays may be.
    yield
    names, found = ("_solve", "evaluate", "optax_step", "optimistix"), compiled.names
    assert not any(name in fn for fn in found for name in names), found


def _mean(x):
    return x


class Vector(eb.AbstractKernel):
    def __call__(self, x, y):
        return jnp.exp(-((x - y) ** 2))


class Pair(eb.AbstractKernel):
    def __call__(self, x, y):
        return jnp.sum(x), jnp.sum(y)


class OfNumbers(eb.AbstractKernel):
    def __call__(self, x, y):
        return math.exp(-((x[0] - y[0]) ** 2))


def _objective():
    return eb.ValidationResidual(grid, "ends")


both = {"u": _prior(), "v": _prior()}
one_twice = {"u": eb.Condition(lambda u, x: u["u"].value, ends, name="pde")}
data = [_pde(), _ends()]


_wrong = {
    # Shapes.
    "targets in a list": (
        lambda: _solve(_pde(target=[1.0] * len(interior)), _ends()),
        "have to be an array, not a list",
    ),
    "points must have two axes": (
        lambda: _pde(points=jnp.ones(3)),
        r"`points` must have shape `\(n, d\)`.*got \(3,\)",
    ),
    "no points": (lambda: _pde(points=jnp.ones((0, 1))), r"`points`.*got \(0, 1\)"),
    "no dimension": (lambda: _pde(points=jnp.ones((3, 0))), r"`points`.*got \(3, 0\)"),
    "points of another kind": (
        lambda: _pde(points=object()),
        "`points` must be an array of numbers, got <object",
    ),
    "complex points": (
        lambda: _pde(points=interior.astype(complex)),
        "`points` must be real",
    ),
    "target's length": (
        lambda: _solve(_pde(target=sources[1:])),
        r"target of condition 'pde' must be.*\[\(8,\)\].*got \[\(7,\)\]",
    ),
    "target with a column": (
        lambda: _solve(_pde(target=sources[:, None])),
        r"target of condition 'pde' must be.*\[\(8,\)\].*got \[\(8, 1\)\]",
    ),
    "target's structure": (
        lambda: _solve(_pde(target=(sources, sources))),
        r"target of condition 'pde' must be.*got \[\(8,\), \(8,\)\]",
    ),
    "target of a vector": (
        lambda: _solve(_pde(target=lambda x: x)),
        r"target of condition 'pde' must be.*got \[\(8, 1\)\]",
    ),
    "target of two arguments": (
        lambda: _pde(target=lambda t, x: t * x),
        r"`target` is called as `target\(x\)`.*missing a required argument: 'x'",
    ),
    "target of the validation of two arguments": (
        lambda: eb.ValidationResidual(grid, target=lambda t, x: t * x),
        r"`target` is called as `target\(x\)`",
    ),
    "mean of two arguments": (
        lambda: eb.GaussianProcess(eb.Gaussian(0.5), lambda t, x: t * x),
        r"`mean` is called as `mean\(x\)`",
    ),
    "target of another kind": (
        lambda: _pde(target=object()),
        "`target` must be an array of numbers, got <object",
    ),
    "complex target": (
        lambda: _pde(target=sources.astype(complex)),
        "`target` must be real",
    ),
    "noise with axes": (
        lambda: _solve(_pde(), eb.Condition(_value, ends, noise=jnp.ones(5), name="a")),
        r"The `noise` of condition 'a' must be a number, .*, got shape \(5,\)",
    ),
    "dimensions": (
        lambda: _solve(_pde(), eb.Condition(_value, jnp.ones((1, 2)))),
        r"same dimension, but those of 'conditions\[1\]' have 2 and .* 'pde' have 1",
    ),
    "lengthscales": (
        lambda: _solve(_pde(), prior=_prior([0.5, 0.5])),
        r"`lengthscale` has shape \(2,\), but .* points of shape \(1,\)",
    ),
    "subspace": (
        lambda: _solve(
            _pde(), prior=eb.GaussianProcess(eb.Subspace(eb.Gaussian(0.5), 1))
        ),
        r"`dims` of `Subspace` is \(1,\)",
    ),
    "mean of a vector": (
        lambda: _solve(_pde(), prior=eb.GaussianProcess(eb.Gaussian(0.5), _mean)),
        r"`mean` of a `GaussianProcess` must return one number.*shape \(1,\)",
    ),
    "kernel of a vector": (
        lambda: _solve(_pde(), prior=eb.GaussianProcess(Vector())),
        r"`kernel` of a `GaussianProcess` must return one number.*shape \(1,\)",
    ),
    "kernel of a tuple": (
        lambda: _solve(_pde(), prior=eb.GaussianProcess(Pair())),
        r"`kernel` of a `GaussianProcess` must return one number.*it returned a tuple",
    ),
    "mean's axes": (
        lambda: eb.GaussianProcess(eb.Gaussian(0.5), jnp.ones(2)),
        r"`mean` must be a scalar or a function.*\(2,\)",
    ),
    # Values.
    "nan in points": (
        lambda: _solve(_pde(points=interior.at[1].set(jnp.nan))),
        "points of condition 'pde' must be finite",
    ),
    "nan in targets": (
        lambda: _solve(_pde(target=sources.at[1].set(jnp.nan))),
        "target of condition 'pde' must be finite",
    ),
    "inf in targets": (
        lambda: _solve(_pde(target=-jnp.inf)),
        "target of condition 'pde' must be finite",
    ),
    "duplicates": (
        lambda: _solve(_pde(points=interior.at[1].set(interior[0]))),
        r"points of condition 'pde' have 1 duplicate\(s\)",
    ),
    "negative noise": (
        lambda: eb.Condition(_value, ends, noise=-0.1),
        "`noise` must be a finite positive number, got -0.1",
    ),
    "no noise": (
        lambda: eb.Condition(_value, ends, noise=0.0),
        "`noise` must be a finite positive number, got 0.0",
    ),
    "nan noise": (
        lambda: eb.Condition(_value, ends, noise=jnp.nan),
        "`noise` must be a finite positive number, got nan",
    ),
    "negative nugget": (
        lambda: eb.Condition(_value, ends, nugget=-1),
        "`nugget` must be a finite non-negative number, got -1.0",
    ),
    "no weight": (
        lambda: eb.Condition(_value, ends, weight=0),
        "`weight` must be a finite positive number, got 0.0",
    ),
    "noise and nugget": (
        lambda: eb.Condition(_value, ends, noise=0.1, nugget=0.1),
        "not both",
    ),
    "negative lengthscale": (lambda: eb.Gaussian(-1.0), "greater than zero, got -1.0"),
    # Priors and conditions.
    "no conditions": (lambda: _solve(), "`conditions` is empty"),
    "one condition": (
        lambda: eb.solve(_prior(), _pde()),
        "`conditions` must be a list of",
    ),
    "generator": (
        lambda: eb.solve(_prior(), (c for c in data)),
        "`conditions` must be a list of",
    ),
    "no condition": (
        lambda: _solve(_pde(), 3),
        "`conditions` must hold `eqx_bilevel.Condition`s, got a int",
    ),
    "names": (
        lambda: _solve(_pde(), _pde(), _ends()),
        r"Several conditions have the same name: \['pde'\]",
    ),
    "prior": (
        lambda: _solve(_pde(), prior=eb.Gaussian(0.5)),
        r"`prior` must be an `eqx_bilevel.GaussianProcess`, or a dictionary.*got a "
        r"Gaussian\. A kernel makes one: `GaussianProcess\(kernel\)`",
    ),
    "empty prior": (lambda: _solve(_pde(), prior={}), "`prior` must be an"),
    "kernel": (
        lambda: eb.GaussianProcess(0.5),
        "`kernel` must be an `eqx_bilevel.AbstractKernel`, got a float",
    ),
    "unconstrained unknown": (
        lambda: _solve(one_twice["u"], prior=both),
        r"No condition involves the unknown function\(s\) \['v'\]",
    ),
    "rough kernel": (
        lambda: _solve(_pde(), prior=eb.GaussianProcess(eb.Matern(0.5, nu=1.5))),
        "'pde' needs derivatives of order 2, but .* Matern have only 1",
    ),
    "rough sum": (
        lambda: _solve(
            _pde(), prior=eb.GaussianProcess(eb.Gaussian(0.5) + eb.Matern(0.5, nu=0.5))
        ),
        "'pde' needs derivatives of order 2, but .* Sum have only 0",
    ),
    "two dtypes": (
        lambda: _solve(_pde(), eb.Condition(_value, ends.astype(jnp.float32))),
        r"same dtype, but those of 'conditions\[1\]' are float32",
    ),
    # Operators.
    "operator": (
        lambda: eb.Condition(0.5, ends),
        r"`operator` must be a callable `\(u, x\)`, got a float",
    ),
    "outside the dimension": (
        lambda: _solve(_pde(operator=lambda u, x: u.d(0, 1))),
        r"derivative along dimension 1, but the points have 1 dimension",
    ),
    "constant operator": (
        lambda: _solve(_pde(operator=lambda u, x: x[0])),
        "'pde' does not depend on the unknown",
    ),
    "operator that returns the unknown": (
        lambda: _solve(_pde(operator=lambda u, x: u)),
        "'pde' returned the unknown itself",
    ),
    "operator that returns nothing": (
        lambda: _solve(_pde(operator=lambda u, x: None)),
        "'pde' returned nothing",
    ),
    "complex operator": (
        lambda: _solve(_pde(operator=lambda u, x: jax.lax.complex(u.value, u.d(0)))),
        "returned complex numbers",
    ),
    # Other arguments of `solve`.
    "solver": (
        lambda: _solve(_pde(), solver=optx.LevenbergMarquardt(1e-3, 1e-3)),
        "`solver` must be an `eqx_bilevel.GaussNewton`, got a LevenbergMarquardt",
    ),
    "whitened solver": (
        lambda: eb.solve_whitened(_prior(), data, optx.Newton(1e-3, 1e-3)),
        "`solver` must be an Optimistix least-squares solver, got a Newton",
    ),
    "adjoint": (
        lambda: _solve(_pde(), adjoint=optx.ImplicitAdjoint()),
        "`adjoint` must be an `eqx_bilevel.FixedPointAdjoint`.*got a ImplicitAdjoint",
    ),
    "initial": (
        lambda: _solve(_pde(), initial={"v": _exact}),
        r"`initial` is for unknown function\(s\) \['v'\]",
    ),
    "initial of one": (
        lambda: _solve(
            eb.Condition(lambda u, x: u["u"].value * u["v"].value, ends, noise=0.1),
            prior=both,
            initial=_exact,
        ),
        r"`initial` must be a function.*\['u', 'v'\]",
    ),
    "reference": (
        lambda: _solve(_pde(reference={"v": _exact})),
        r"`reference` must be a function.*\['u'\]",
    ),
    "axes in a tuple": (
        lambda: _solve(_pde(operator=lambda u, x: u.d((0, 0)))),
        r"one integer for each.*got \(0, 0\)",
    ),
    "max_steps": (
        lambda: _solve(_pde(), max_steps=0),
        "`max_steps` must be a positive integer, got 0",
    ),
    "initial that nobody needs": (
        lambda: _solve(
            eb.Condition(lambda u, x: u["u"].value - u["v"].value, ends, noise=0.1),
            prior=both,
            initial={"w": _exact},
        ),
        r"`initial` is for unknown function\(s\) \['w'\]",
    ),
    # The outer problem.
    "batch size": (
        lambda: eb.ValidationResidual(grid, batch_size=6),
        "`batch_size` must be between 1 and .* 5, got 6",
    ),
    "no batch": (lambda: eb.ValidationResidual(grid, batch_size=0), "got 0"),
    "validation points": (
        lambda: eb.ValidationResidual(jnp.ones(3)),
        r"`points` must have shape `\(n, d\)`",
    ),
    "gradient": (
        lambda: eb.learn(
            _prior(), data, eb.ValidationResidual(grid, "ends"), gradient="implict"
        ),
        "`gradient` must be 'implicit' or 'frozen', got 'implict'",
    ),
    "objective": (
        lambda: eb.learn(_prior(), data, lambda solution: 0.0),
        r"`objective` must be an `eqx_bilevel.AbstractObjective`, got a function\. A "
        r"function of the solution makes one: `eqx_bilevel.Objective\(fn\)`",
    ),
    "batches without key": (
        lambda: eb.learn(
            _prior(), data, eb.ValidationResidual(grid, "ends", batch_size=2)
        ),
        "`key` is needed",
    ),
    "nothing to learn": (
        lambda: eb.learn(
            _prior(eb.Frozen(0.5)), data, eb.ValidationResidual(grid, "ends")
        ),
        "nothing to learn",
    ),
    "optimiser of many points": (
        lambda: eb.learn(
            _prior(),
            data,
            eb.ValidationResidual(grid, "ends"),
            optimiser=optx.NelderMead(1e-3, 1e-3),
        ),
        "`optimiser` must evaluate the objective at one point.*NelderMead",
    ),
    "optimiser between bounds": (
        lambda: eb.learn(
            _prior(),
            data,
            eb.ValidationResidual(grid, "ends"),
            optimiser=optx.GoldenSearch(1e-3, 1e-3),
        ),
        "`optimiser` must evaluate the objective at one point.*GoldenSearch",
    ),
    "key of learn": (
        lambda: eb.learn(_prior(), data, _objective(), key=0),  # pyright: ignore
        r"`key` must be a JAX random key, such as `jax.random.key\(0\)`, got 0",
    ),
    "key of a sampler": (
        lambda: eb.Box(0.0, 1.0).interior(3, key=0),  # pyright: ignore
        r"`key` must be a JAX random key, such as `jax.random.key\(0\)`, got 0",
    ),
    "key of a combination": (
        lambda: (eb.Box(0.0, 2.0) | eb.Box(1.0, 3.0)).boundary(2, key=0),  # pyright: ignore
        "`key` must be a JAX random key",
    ),
    "key of points that are held out": (
        lambda: eb.hold_out(data[0], key=0),  # pyright: ignore
        "`key` must be a JAX random key",
    ),
    "key of a network": (
        lambda: eb.LengthscaleNetwork(1, key=0),  # pyright: ignore
        "`key` must be a JAX random key",
    ),
    "name of a face": (
        lambda: eb.Box(0.0, 1.0).boundary(2, faces=["left"]),  # pyright: ignore
        r"`faces` must be .*got \['left'\].*\[\(0, 'lower'\), \(0, 'upper'\)\]",
    ),
    "optimiser with a line search": (
        lambda: eb.learn(
            _prior(),
            data,
            eb.ValidationResidual(grid, "ends"),
            optimiser=optax.lbfgs(),
        ),
        "`optimiser` must make a step from the gradient and the objective at one point",
    ),
    "optimiser": (
        lambda: eb.learn(
            _prior(), data, eb.ValidationResidual(grid, "ends"), optimiser="adam"
        ),
        "`optimiser` must be an Optax optimiser.*got a str",
    ),
    "function as objective": (
        lambda: eb.Objective(1.0),  # pyright: ignore[reportArgumentType]
        "`fn` must be a function of a solution, got 1.0",
    ),
    "quadrature shape": (
        lambda: eb.Condition(_value, jnp.ones((3, 4, 1)), 1.0, quadrature=jnp.ones(3)),
        r"shape \(4,\) or \(3, 4\), got \(3,\)",
    ),
    "quadrature points": (
        lambda: eb.Condition(_value, grid, 1.0, quadrature=jnp.ones(5)),
        r"shape `\(n, q, d\)`",
    ),
    "quadrature target": (
        lambda: eb.Condition(
            _value, jnp.ones((3, 4, 1)), lambda x: x[0], quadrature=jnp.ones(4)
        ),
        "`target` must be numbers",
    ),
    "quadrature validation": (
        lambda: eb.learn(
            _prior(),
            [eb.Condition(_value, ends[None], 1.0, quadrature=jnp.ones(2), noise=0.1)],
            eb.ValidationResidual(grid),
        ),
        "is about averages",
    ),
    "max_inner_steps": (
        lambda: eb.learn(
            _prior(), data, eb.ValidationResidual(grid, "ends"), max_inner_steps=0
        ),
        "`max_inner_steps` must be a positive integer, got 0",
    ),
    "steps": (
        lambda: eb.learn(_prior(), data, _objective(), steps=-1),
        "`steps` must be a non-negative integer, got -1",
    ),
    "scale_search": (
        lambda: eb.learn(_prior(), data, _objective(), scale_search=-2),
        "`scale_search` must be a non-negative integer, got -2",
    ),
    "patience": (
        lambda: eb.learn(_prior(), data, _objective(), patience=0),
        "`patience` must be a positive integer, got 0",
    ),
    "rtol": (
        lambda: eb.learn(_prior(), data, _objective(), rtol=float("nan")),
        "`rtol` must be a finite non-negative number, got nan",
    ),
    "validation where it was fitted": (
        lambda: eb.learn(_prior(), data, eb.ValidationResidual(ends, "ends")),
        "All points of `ValidationResidual` are points of the condition itself",
    ),
    "target of the validation": (
        lambda: eb.learn(_prior(), data, eb.ValidationResidual(grid, target=ends)),
        r"target of `ValidationResidual` must be.*\[\(5,\)\].*got \[\(2, 1\)\]",
    ),
    "learn inside jit": (
        lambda: jax.jit(lambda x: eb.learn(_prior(x), data, _objective()))(0.5),
        "`learn` is a loop in Python",
    ),
    "name of a condition": (
        lambda: eb.learn(_prior(), data, eb.ValidationResidual(grid, "end")),
        r"about condition 'end', but the conditions are \['pde', 'ends'\]",
    ),
    "target at other points": (
        lambda: eb.learn(
            _prior(), data, eb.ValidationResidual(grid), optax.sgd(1e-3), steps=1
        ),
        "target of condition 'pde' is known at its own points only",
    ),
    "conditions of learn": (
        lambda: eb.learn(_prior(), [], eb.ValidationResidual(grid)),
        "`conditions` is empty",
    ),
}


def check(case: str) -> None:
    call, message = _wrong[case]
    with pytest.raises(ValueError, match=message):
        call()


# The tests' checks of annotations find these too, and first. They are tested without.
_annotated = {"points of another kind", "prior", "kernel", "operator", "no condition"}
_annotated |= {"one condition", "generator", "solver", "whitened solver"}
_annotated |= {key for key in _wrong if key.startswith(("key of", "name of a face"))}
_annotated |= {"objective", "optimiser", "axes in a tuple", "function as objective"}


@pytest.mark.parametrize("case", [case for case in _wrong if case not in _annotated])
def test_wrong_input(case, no_solve):
    check(case)


_without_checks = """
import jax

jax.config.update("jax_enable_x64", True)
from tests import test_errors

for case in test_errors._annotated:
    test_errors.check(case)
print("done")
"""


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    root = pathlib.Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_wrong_input_of_another_kind():
    assert _run(_without_checks) == "done\n"


def test_operators_attributes():
    message = "`u` has no `dt`.*`u.grad`.*`u.d\\(0\\)`"
    with pytest.raises(AttributeError, match=message) as error:
        _solve(_pde(operator=lambda u, x: u.dt))
    assert any("operator of condition 'pde'" in n for n in error.value.__notes__)


def test_parameters_are_no_numbers():
    parameter = eb.Positive(2.0)
    for call in (
        lambda: 2 * parameter,
        lambda: parameter * 2.0,
        lambda: jnp.ones(3) / parameter,
        lambda: np.ones(3) * parameter,
        lambda: np.float64(1.0) - parameter,
        lambda: parameter**2,
        lambda: parameter @ jnp.ones(3),
        lambda: -parameter,
        lambda: float(parameter),
        lambda: f"{parameter:.2f}",
        lambda: parameter > 1.0,
        lambda: parameter + parameter,
        lambda: Width(parameter)(ends[0], ends[1]),
    ):
        with pytest.raises(TypeError, match=r"no number.*`eqx_bilevel.unwrap"):
            call()
    assert f"{parameter}" == repr(parameter)
    # With kernels they are.
    assert eb.Positive(2.0) * eb.Gaussian(1.0) == eb.Gaussian(1.0) * eb.Positive(2.0)
    assert eb.unwrap(Width(parameter))(ends[0], ends[1]) == jnp.exp(-2.0)


class Width(eb.AbstractKernel):
    width: eb.AbstractParameter | float

    def __call__(self, x, y):
        return jnp.exp(-jnp.sum((x - y) ** 2) / self.width)


class Cusp(eb.AbstractKernel):
    def __call__(self, x, y):
        return jnp.exp(-jnp.sqrt(jnp.sum((x - y) ** 2)))


@pytest.mark.parametrize(
    "kernel, named",
    [
        (2.0 * Width(1.0), "`Width.width` will"),
        (eb.Gaussian(1.0) + eb.Subspace(Width(1.0), 0), "`Width.width` will"),
        (eb.Gaussian(1.0) + Width(eb.Frozen(1.0)) + eb.Frozen(Width(1.0)), None),
        (eb.Gaussian(1.0) + Width(eb.Positive(1.0)) + eb.Matern(1.0), None),
    ],
)
def test_floats_that_are_not_learned(kernel, named):
    args = eb.GaussianProcess(kernel), data, _objective(), optax.sgd(1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eb.learn(*args, steps=1, scale_search=False, throw=False)
    messages = [str(w.message) for w in caught]
    assert len(messages) == (named is not None)
    assert all(named in m for m in messages)


def test_kernel_that_is_not_differentiable():
    with pytest.raises(RuntimeError, match="Or it is the kernel that is not finite"):
        _solve(_pde(), prior=eb.GaussianProcess(Cusp()))


def test_operators_errors_say_where():
    for operator, kind in (
        (lambda u: u.value, TypeError),
        (lambda u, x: u["v"].value, TypeError),
        (lambda u, x: u.value + jnp.dot(jnp.ones(2), jnp.ones(3)), TypeError),
    ):
        with pytest.raises(kind) as error:
            _solve(_pde(operator=operator))
        assert any("operator of condition 'pde'" in n for n in error.value.__notes__)
    with pytest.raises(TypeError) as error:
        _solve(_pde(), prior=eb.GaussianProcess(OfNumbers()))
    assert any("`kernel` of a `GaussianProcess`" in n for n in error.value.__notes__)
    with pytest.raises(TypeError, match="not callable") as error:
        _solve(_pde(operator=lambda u, x: u.laplacian()))
    assert any("`u.laplacian`" in n for n in error.value.__notes__)


#
# What is known under a trace only
#


@eqx.filter_jit
def _traced(lengthscale, targets, points, strength, nugget):
    pde = _pde(points, targets, Cubic(strength), nugget)
    return _solve(pde, _ends(), prior=_prior(lengthscale), throw=False)


@eqx.filter_jit
def _traced_and_thrown(lengthscale, targets, points, strength, nugget):
    pde = _pde(points, targets, Cubic(strength), nugget)
    return _solve(pde, _ends(), prior=_prior(lengthscale)).weights


_traces = {
    "nan lengthscale": (dict(lengthscale=jnp.nan), "nonfinite_data"),
    "negative lengthscale": (dict(lengthscale=-1.0), "nonfinite_data"),
    "nan target": (dict(targets=sources.at[3].set(jnp.nan)), "nonfinite_data"),
    "inf target": (dict(targets=sources.at[3].set(jnp.inf)), "nonfinite_data"),
    "nan point": (dict(points=interior.at[3].set(jnp.nan)), "nonfinite_data"),
    "nan coefficient": (dict(strength=jnp.nan), "nonfinite_data"),
    "nan nugget": (dict(nugget=jnp.nan), "nonfinite_data"),
    "duplicate": (dict(points=interior.at[3].set(interior[5])), "duplicate_points"),
    "long lengthscale": (dict(lengthscale=1e8), "singular_gram"),
    "negative nugget": (dict(nugget=-0.1), "singular_gram"),
}


def _arguments(**changes):
    plain = dict(
        lengthscale=0.6, targets=sources, points=interior, strength=1.0, nugget=1e-6
    )
    return {k: jnp.asarray(v) for k, v in (plain | changes).items()}


@pytest.mark.parametrize("case", _traces)
def test_trouble_under_a_trace(case):
    changes, name = _traces[case]
    solution = _traced(**_arguments(**changes))
    assert solution.result == getattr(eb.RESULTS, name)
    # A usable object comes back, which knows nothing.
    for known in (solution(grid), solution.std(grid), solution.condition_number()):
        assert np.all(np.isnan(known))
    assert all(np.all(np.isnan(r)) for r in solution.residuals().values())
    message = eb.RESULTS[solution.result].split(".")[0].split(",")[0]
    with pytest.raises(eqx.EquinoxRuntimeError, match=message.replace("(", r"\(")):
        _traced_and_thrown(**_arguments(**changes))


def test_no_trouble_under_a_trace():
    solution = _traced(**_arguments())
    assert solution.result == eb.RESULTS.successful
    np.testing.assert_allclose(solution(grid), jax.vmap(_exact)(grid), atol=1e-2)
    _traced_and_thrown(**_arguments())


def test_targets_of_functions_are_known_late():
    bad = _pde(target=lambda x: jnp.log(x[0] - 1.0))
    with pytest.raises(eqx.EquinoxRuntimeError, match="a target is not finite"):
        _solve(bad, _ends())


def test_duplicates_are_fine_with_noise_and_across_conditions():
    twice = jnp.concatenate([ends, ends])
    noisy = eb.Condition(_value, twice, jnp.array([0.0, 1.0, 0.2, 1.4]), noise=0.1)
    solution = _solve(noisy, eb.Condition(lambda u, x: u.d(0), ends, 1.0, nugget=1e-6))
    assert solution.result == eb.RESULTS.successful
    np.testing.assert_allclose(solution(ends), [0.1, 1.2], atol=0.05)


#
# Numerical trouble
#


def _eikonal(u, x):
    return jnp.sum(u.grad**2)


def test_no_scale():
    # Linearised at zero there is nothing left of it.
    eikonal = eb.Condition(_eikonal, interior, 1.0, nugget=1e-6, name="eikonal")
    start = eb.Condition(_value, ends[:1], nugget=1e-6)
    solution = _solve(eikonal, start, throw=False)
    assert solution.result == eb.RESULTS.no_scale
    with pytest.raises(eqx.EquinoxRuntimeError, match="Give the condition a `refer"):
        _solve(eikonal, start)
    cured = eb.Condition(
        _eikonal, interior, 1.0, nugget=1e-6, reference=lambda x: x[0], name="eikonal"
    )
    half = lambda x: 0.5 * x[0]
    solution = _solve(cured, start, prior=_prior(1.0), initial=half)
    np.testing.assert_allclose(solution.d(0)(interior), 1.0, atol=1e-3)
    np.testing.assert_allclose(solution(grid), grid[:, 0], atol=1e-2)


@pytest.mark.parametrize("power", [0.5, -1])  # The slope is infinite; the value too.
def test_operator_that_is_not_finite_at_its_reference(power):
    root = eb.Condition(lambda u, x: u.value**power - u.d(0), interior, name="root")
    start = eb.Condition(_value, ends[:1], 1.0, nugget=1e-6)
    solution = _solve(root, start, throw=False)
    assert solution.result == eb.RESULTS.nonfinite_operator
    with pytest.raises(eqx.EquinoxRuntimeError, match="An operator or one of its deri"):
        _solve(root, start)


def test_operator_that_is_not_finite_at_the_start():
    root = lambda u, x: jnp.sqrt(u.value) + u.d(0)
    # u = x^2 / 4 + x + 1 satisfies sqrt(u) + u' = x + 2.
    pde = eb.Condition(root, interior, lambda x: x[0] + 2, noise=1e-3)
    start = eb.Condition(_value, ends[:1], 1.0, nugget=1e-6)
    solution = _solve(pde, start, throw=False)
    assert solution.result == eb.RESULTS.singular_gram
    with pytest.raises(eqx.EquinoxRuntimeError, match="could not be factorised"):
        _solve(pde, start)
    solution = _solve(pde, start, initial=lambda x: jnp.ones_like(x[0]))
    # Less the last point, which lies outside of those where the equation holds.
    inside = grid[:-1]
    truth = inside[:, 0] ** 2 / 4 + inside[:, 0] + 1
    np.testing.assert_allclose(solution(inside), truth, atol=1e-2)


def test_jitter_is_raised_and_reported():
    # Sixty values of a function that twenty determine.
    x = jnp.linspace(0.0, 2.0, 60)[:, None]
    values = jax.vmap(_exact)(x)
    solution = _solve(eb.Condition(_value, x, values), prior=_prior(1.0))
    jitter, smallest = solution.stats["jitter"], 0.125 * 60 * jnp.finfo(float).eps
    assert smallest <= jitter < 1e-8
    np.testing.assert_allclose(solution(x), values, atol=1e-5)
    exact = eb.Condition(_value, x, values, nugget=1e-18)
    solution = _solve(exact, prior=_prior(1.0))
    assert smallest <= solution.stats["jitter"] < 1e-8
    np.testing.assert_allclose(solution(x), values, atol=1e-5)
    # Not where it is not needed.
    plenty = _solve(eb.Condition(_value, x, values, nugget=1e-6), prior=_prior(1.0))
    assert plenty.stats["jitter"] == 0


def test_max_steps():
    hard = [_pde(operator=Cubic(20.0)), _ends()]
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of steps was"):
        _solve(*hard, max_steps=2)
    solution = _solve(*hard, max_steps=2, throw=False)
    assert solution.result == eb.RESULTS.nonlinear_max_steps_reached
    assert solution.stats["num_steps"] == solution.stats["max_steps"] == 2
    # What there is after two steps can be used.
    assert np.all(np.isfinite(solution(grid))) and np.all(solution.std(grid) > 0)


def test_steps_run_out_before_anything_was_solved():
    # The first factorisation fails, and there is no second one.
    x = jnp.linspace(0.0, 2.0, 40)[:, None]
    square = lambda u, x: u.value + u.value**2
    condition = eb.Condition(square, x, 1.0, nugget=1e-18)

    def at(length):
        solution = _solve(condition, prior=_prior(length), max_steps=1, throw=False)
        return solution(grid)[2], solution

    (value, solution), gradient = eqx.filter_value_and_grad(at, has_aux=True)(
        jnp.asarray(1.0)
    )
    assert solution.result == eb.RESULTS.nonlinear_max_steps_reached
    assert np.isnan(value) and np.all(np.isnan(solution.std(grid)))


#
# Precision, in a process of its own
#

_single = """
import warnings
import jax

before = dict(jax.config.values)
import eqx_bilevel as eb
changed = {k for k, v in jax.config.values.items() if before.get(k, v) != v}
assert not changed, changed

import jax.numpy as jnp
x = jnp.linspace(0.0, 2.0, 12)[:, None]
exact = lambda x: jnp.sin(3 * x[0])
source = lambda x: 9 * jnp.sin(3 * x[0]) + exact(x) ** 3
pde = eb.Condition(lambda u, x: -u.laplacian + u.value**3, x[1:-1], source)
ends = eb.Condition(lambda u, x: u.value, x[jnp.array([0, -1])], exact)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian(0.6)), [pde, ends])
(warning,) = [w for w in caught if "float32" in str(w.message)]
assert "jax_enable_x64" in str(warning.message) and "<string>" in warning.filename
grid = jnp.linspace(0.0, 2.0, 30)[:, None]
found = solution(grid)
assert found.dtype == solution.std(grid).dtype == jnp.float32
print(float(jnp.max(jnp.abs(found - jax.vmap(exact)(grid)))))
"""


def test_single_precision():
    assert float(_run(_single)) < 1e-2


def test_mixed_precision():
    points, targets = interior.astype(jnp.float32), sources.astype(jnp.float32)
    condition = eb.Condition(_value, points, targets)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(ValueError, match="points are float32, but the kernel retu"):
            _solve(condition, prior=_prior(jnp.asarray(0.5)))
