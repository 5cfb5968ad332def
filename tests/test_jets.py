import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_bilevel._jets import (
    derivative,
    derivatives,
    evaluate,
    Jet,
    linearise,
    nonlinear_part,
    residual,
    trace,
    Unknowns,
)


ONE = Unknowns(("u",), single=True)
TWO = Unknowns(("u", "a"), single=False)
F64 = jnp.dtype("float64")


def e(*axes, d=2):
    return tuple([axes.count(i) for i in range(d)])


def traced(operator, unknowns=ONE, dim=2):
    return trace(operator, unknowns, dim, F64, "pde")


def nonlinear(operator, unknowns=ONE, dim=2):
    found = traced(operator, unknowns, dim)
    return {found.jets[i] for i in found.nonlinear}


#
# A jet's entries
#


def _jet(dim=2):
    # The entry of index (i, j) is 10 i + j + 0.5.
    powers = lambda index: [10.0**i * n for i, n in enumerate(index[::-1])]
    return Jet(lambda index: jnp.array(sum(powers(index)) + 0.5), dim)


def test_entries():
    u = _jet()
    assert u.value == 0.5
    assert u.d() == 0.5
    assert u.d(0) == 10.5 and u.d(1) == 1.5
    assert u.d(0, 1) == u.d(1, 0) == 11.5
    assert u.d(0, 1, 0, 0) == 31.5
    assert u.d(-1) == 1.5 and u.d(-2, -1) == 11.5
    np.testing.assert_array_equal(u.grad, [10.5, 1.5])
    np.testing.assert_array_equal(u.hessian, [[20.5, 11.5], [11.5, 2.5]])
    assert u.laplacian == 20.5 + 2.5
    assert repr(u) == "Jet(dim=2)"
    assert _jet(1).laplacian == 2.5 and _jet(1).grad.shape == (1,)


@pytest.mark.parametrize("axes", ((2,), (-3,), (0, 5)))
def test_axis_out_of_range(axes):
    with pytest.raises(
        ValueError, match=r"`u.d\(.*2 dimension\(s\), counted from 0 to 1"
    ):
        _jet().d(*axes)


# Derivatives of functions, as they are taken for means and references.
def test_derivative():
    fn = lambda x: jnp.sin(2 * x[0]) * x[1] ** 3
    x = jnp.array([0.3, 0.7])
    at = lambda *index: derivative(fn, index)(x)
    s, c = jnp.sin(0.6), jnp.cos(0.6)
    np.testing.assert_allclose(at(0, 0), s * 0.343, rtol=1e-14)
    np.testing.assert_allclose(at(1, 0), 2 * c * 0.343, rtol=1e-14)
    np.testing.assert_allclose(at(2, 1), -4 * s * 3 * 0.49, rtol=1e-14)
    np.testing.assert_allclose(at(0, 3), s * 6, rtol=1e-14)
    np.testing.assert_allclose(at(3, 2), -8 * c * 6 * 0.7, rtol=1e-14)
    # Any pytree.
    tree = derivative(lambda x: {"a": x**2, "b": x[0] * x[1]}, (1, 1))(x)
    np.testing.assert_allclose(tree["a"], [0, 0], atol=1e-14)
    np.testing.assert_allclose(tree["b"], 1, rtol=1e-14)


@pytest.mark.parametrize(
    "indices",
    (
        [(0, 0)],
        [(1, 0)],
        [(0, 0), (1, 0), (0, 1), (0, 2)],
        [(2, 0), (0, 3)],
        [(0, 0), (1, 1), (2, 1), (0, 2)],
        [(1, 1)],
    ),
)
def test_several_derivatives(indices):
    fn = lambda x: {"a": jnp.sin(2 * x[0]) * x, "b": x[0] ** 3 * x[1] ** 4}
    x = jnp.array([0.3, 0.7])
    found = derivatives(fn, indices, x)
    assert found.keys() == set(indices)
    for index in indices:
        for name, truth in derivative(fn, index)(x).items():
            np.testing.assert_allclose(found[index][name], truth, rtol=1e-13)


#
# Which derivatives are asked for
#


ASKED = {
    "value": (lambda u, x: u.value, [e()]),
    "no_axes": (lambda u, x: u.d(), [e()]),
    "first": (lambda u, x: u.d(1), [e(1)]),
    "negative": (lambda u, x: u.d(-1) + u.d(-2, 1), [e(1), e(0, 1)]),
    "mixed": (lambda u, x: u.d(0, 1) - u.d(1, 0), [e(0, 1)]),
    "third": (lambda u, x: u.d(1, 0, 1), [e(0, 1, 1)]),
    "grad": (lambda u, x: jnp.sum(u.grad), [e(1), e(0)]),
    "laplacian": (lambda u, x: u.laplacian, [e(1, 1), e(0, 0)]),
    "hessian": (lambda u, x: jnp.trace(u.hessian), [e(1, 1), e(0, 1), e(0, 0)]),
    # Lower orders first, whatever order they are asked in.
    "order": (
        lambda u, x: u.d(0, 0) + u.d(0) + u.value + u.d(1, 1, 1) + u.d(1),
        [e(), e(1), e(0), e(0, 0), e(1, 1, 1)],
    ),
    "inside_jit": (jax.jit(lambda u, x: u.d(0), static_argnums=0), [e(0)]),
    # Not only what the result depends on: also an entry that is multiplied by zero.
    "zero": (lambda u, x: u.d(0) + 0.0 * u.value, [e(), e(0)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_asked(name):
    operator, expected = ASKED[name]
    found = traced(operator)
    assert found.jets == tuple(("u", index) for index in expected)
    assert found.size == 1 and found.shapes == ((),)
    assert hash(found) == hash(traced(operator)) and found == traced(operator)


def test_asked_of_several_unknowns():
    # In the order of the unknowns' names as given.
    operator = lambda u, x: u["a"].d(0) + u["u"].laplacian + u["a"].value
    found = traced(operator, TWO)
    expected = [("u", e(1, 1)), ("u", e(0, 0)), ("a", e()), ("a", e(0))]
    assert found.jets == tuple(expected)
    swapped = Unknowns(("a", "u"), single=False)
    assert traced(operator, swapped).jets == tuple(expected[2:] + expected[:2])
    # A dictionary of one is still a dictionary.
    alone = Unknowns(("a",), single=False)
    assert traced(lambda u, x: u["a"].value, alone).jets == (("a", e()),)


SHAPES = {
    "scalar": (lambda u, x: u.value, ((),)),
    "vector": (lambda u, x: u.grad, ((2,),)),
    "matrix": (lambda u, x: u.hessian, ((2, 2),)),
    "tuple": (lambda u, x: (u.value, u.grad), ((), (2,))),
    "dictionary": (lambda u, x: {"b": u.hessian, "a": u.d(1)}, ((), (2, 2))),
    "list": (lambda u, x: [u.value * jnp.ones((1, 3))], ((1, 3),)),
    "constant_beside": (lambda u, x: (u.value, 1.0, jnp.arange(2)), ((), (), (2,))),
    "none_beside": (lambda u, x: (u.value, None), ((),)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    operator, expected = SHAPES[name]
    found = traced(operator)
    assert found.shapes == expected
    assert found.size == sum(int(np.prod(shape)) for shape in expected)
    x, values = jnp.array([0.3, 0.6]), jnp.arange(1.0, len(found.jets) + 1)
    flat = residual(operator, ONE, found.jets, list(values), x)
    out = evaluate(operator, ONE, found.jets, values, x)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(out)]
    assert flat.dtype == F64
    np.testing.assert_array_equal(flat, np.concatenate(leaves))


def test_pytree_keeps_its_structure():
    operator = lambda u, x: {"b": u.grad, "a": (u.value, x[0])}
    found = traced(operator)
    x = jnp.array([0.3, 0.6])
    out = evaluate(operator, ONE, found.jets, jnp.array([1.0, 2.0, 3.0]), x)
    assert out["a"] == (1.0, 0.3)
    # `d(1)` comes before `d(0)` in the jet; in the gradient it is the other way round.
    np.testing.assert_array_equal(out["b"], [3.0, 2.0])


def test_float32():
    found = trace(lambda u, x: u.value**2 * x[0], ONE, 1, jnp.dtype("float32"), "c")
    z, x = jnp.array([2.0], jnp.float32), jnp.array([0.5], jnp.float32)
    jacobian, offset = linearise(lambda u, x: u.value**2 * x[0], ONE, found, z, x)
    assert jacobian.dtype == offset.dtype == jnp.float32
    np.testing.assert_allclose(jacobian, [[2.0]])
    np.testing.assert_allclose(offset, [2.0])


#
# Which of them enter nonlinearly
#


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, u, x):
        return u.d(0) + self.mlp(jnp.stack([u.value, x[0]]))


_network = Network(
    eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jax.random.key(0))
)


@jax.custom_jvp
def _cube(v):
    return v**3


@_cube.defjvp
def _(primals, tangents):
    return primals[0] ** 3, 3 * primals[0] ** 2 * tangents[0]


@jax.custom_jvp
def _twice(v):
    return 2 * v


@_twice.defjvp
def _(primals, tangents):
    return 2 * primals[0], 2 * tangents[0]


def _jump(u, x):
    return u.d(0) + jnp.where(u.value > 0.5, 1.0, 0.0)


LINEAR = {
    "value": lambda u, x: u.value,
    "coefficients": lambda u, x: jnp.exp(x[0]) * u.laplacian + x[1] ** 2 * u.value,
    "affine": lambda u, x: u.d(0) - 3.0 + jnp.sin(x[0]),
    "sum_of_products": lambda u, x: 2.0 * u.d(0) * jnp.array(3.0) - u.d(1) / 7.0,
    "zero": lambda u, x: 0.0 * u.value + u.d(0),
    "jit": lambda u, x: jax.jit(lambda v, w: 2 * v + x[0] * w)(u.value, u.d(0)),
    "nested_jit": lambda u, x: jax.jit(lambda v: jax.jit(jnp.negative)(v))(u.value),
    "checkpoint": lambda u, x: jax.checkpoint(lambda v: 2 * v)(u.value),
    "custom_jvp": lambda u, x: _twice(u.value),
    "stack": lambda u, x: jnp.stack([u.value, x[0] * u.d(0)]),
    "array": lambda u, x: jnp.array([u.value, 2.0 * u.d(0)]),
    "matrix_vector": lambda u, x: jnp.array([[1.0, 2.0], [0.0, 1.0]]) @ u.grad,
    "divergence": lambda u, x: jnp.trace(jnp.diag(x) @ u.hessian),
    "indexing": lambda u, x: u.grad[0] + u.hessian[1, 1],
    "where_of_the_point": lambda u, x: jnp.where(x[0] > 0, u.value, u.d(0)),
    "sign_of_the_point": lambda u, x: jnp.sign(x[0]) * u.value + jnp.floor(x[1]),
    "tuple": lambda u, x: (u.value, u.d(0), x[0]),
    "vmap": lambda u, x: jax.vmap(lambda c: c * u.value)(x),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name):
    assert nonlinear(LINEAR[name]) == set()


NONLINEAR = {
    "cube": (lambda u, x: -u.laplacian + u.value**3, [e()]),
    "burgers": (lambda u, x: u.d(0) + u.value * u.d(1) - u.d(1, 1), [e(), e(1)]),
    "eikonal": (lambda u, x: jnp.sum(u.grad**2) - u.laplacian, [e(0), e(1)]),
    "squared_norm": (lambda u, x: u.grad @ u.grad, [e(0), e(1)]),
    # Linear in each, but not in both.
    "product": (lambda u, x: u.d(0) * u.d(1) + u.value, [e(0), e(1)]),
    "quotient": (lambda u, x: u.d(0) / u.d(1), [e(0), e(1)]),
    "monge_ampere": (
        lambda u, x: jnp.linalg.det(u.hessian),
        [e(0, 0), e(0, 1), e(1, 1)],
    ),
    "jit": (lambda u, x: jax.jit(lambda v, w: v**2 + w)(u.value, u.d(0)), [e()]),
    "checkpoint": (lambda u, x: jax.checkpoint(jnp.sin)(u.value) + u.d(0), [e()]),
    "softplus": (lambda u, x: jax.nn.softplus(u.value) + u.d(0), [e()]),
    "relu": (lambda u, x: jax.nn.relu(u.value) + u.d(0), [e()]),
    "abs": (lambda u, x: jnp.abs(u.d(0)) + u.value, [e(0)]),
    "maximum": (lambda u, x: jnp.maximum(u.value, u.d(0)) + u.d(1), [e(), e(0)]),
    "custom_jvp": (lambda u, x: _cube(u.value) + u.d(0), [e()]),
    "network": (_network, [e()]),
    "vector": (lambda u, x: jnp.stack([u.value**2, u.d(0)]), [e()]),
    "array": (lambda u, x: jnp.array([u.value, u.d(0) ** 2]), [e(0)]),
    "dictionary": (lambda u, x: {"a": u.value, "b": jnp.sin(u.d(0))}, [e(0)]),
    "coefficient": (lambda u, x: jnp.exp(x[0] * u.value) + x[1] * u.d(1), [e()]),
    "switch": (
        lambda u, x: jax.lax.cond(u.value > 0, lambda v: v, lambda v: 2 * v, u.d(0)),
        [e(), e(0)],
    ),
    "upwind": (
        lambda u, x: jnp.where(u.value > 0, u.d(0), u.d(1)) + u.d(1, 1),
        [e()],
    ),
    # The derivative is zero or says nothing, but they are not constant.
    "jump": (_jump, [e()]),
    "sign": (lambda u, x: jnp.sign(u.d(0)) + u.value, [e(0)]),
    "round": (lambda u, x: jnp.round(u.d(0)) + u.value, [e(0)]),
    "floor": (lambda u, x: jnp.floor(2 * u.d(0)) + u.value, [e(0)]),
    "heaviside": (lambda u, x: jnp.heaviside(u.value, 0.5) + u.d(0), [e()]),
    "integer": (lambda u, x: u.value.astype(int).astype(x.dtype) + u.d(0), [e()]),
    "stop_gradient": (
        lambda u, x: jax.lax.stop_gradient(u.value) * u.d(0) + u.d(1),
        [e()],
    ),
    "stopped": (lambda u, x: jax.lax.stop_gradient(u.value**2) + u.d(0), [e()]),
    "jump_in_branch": (
        lambda u, x: jax.lax.cond(x[0] > 0, jnp.sign, jnp.ceil, u.value) + u.d(0),
        [e()],
    ),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear(name):
    operator, expected = NONLINEAR[name]
    found = nonlinear(operator)
    # `switch` and `stop_gradient` are linear in one of their entries: it may be counted
    # or not. All others are exact.
    expected = {("u", index) for index in expected}
    if name in ("switch", "stop_gradient"):
        assert found - expected <= {("u", e(0))} and ("u", e()) in found
    else:
        assert found == expected


# What is inside a loop or a branch is not looked at: in doubt, nonlinear.
def test_conservative():
    loop = lambda u, x: jax.lax.fori_loop(0, 3, lambda i, v: 2 * v, u.value) + u.d(0)
    assert nonlinear(loop) == {("u", e())}
    branch = lambda u, x: (
        u.d(0) + jax.lax.cond(x[0] > 0, lambda v: v, lambda v: 2 * v, u.value)
    )
    assert nonlinear(branch) == {("u", e())}


def test_nonlinear_with_two_unknowns():
    darcy = lambda u, x: (
        -jnp.exp(u["a"].value) * (u["u"].laplacian + u["a"].grad @ u["u"].grad)
    )
    expected = {("a", e()), ("a", e(0)), ("a", e(1)), ("u", e(0)), ("u", e(1))}
    expected |= {("u", e(0, 0)), ("u", e(1, 1))}
    assert nonlinear(darcy, TWO) == expected
    reaction = lambda u, x: {
        "u": u["u"].d(0) - u["u"].d(1, 1) + u["u"].value * u["a"].value ** 2,
        "a": u["a"].d(0) - 2.0 * u["a"].d(1, 1),
    }
    assert nonlinear(reaction, TWO) == {("u", e()), ("a", e())}
    coupled = lambda u, x: (u["u"].laplacian - u["a"].value, u["a"].laplacian)
    assert nonlinear(coupled, TWO) == set()


# Only coefficients that are traced from outside: still linear, and no leak.
def test_traced_coefficient():
    def under_grad(nu):
        found = traced(lambda u, x: u.value**2 - nu * u.laplacian)
        assert [found.jets[i] for i in found.nonlinear] == [("u", e())]
        return nu

    jax.grad(under_grad)(0.3)
    jax.jit(under_grad)(0.3)


#
# Linearisation
#


# Entries of the whole jet, around which they are linearised.
def _full_jacobian(operator, unknowns, found, values, x):
    def by_hand(values):
        table = dict(zip(found.jets, values))
        dim = x.shape[0]
        views = {
            name: Jet(lambda index, name=name: table[name, index], dim)
            for name in unknowns.names
        }
        out = operator(views["u"] if unknowns.single else views, x)
        leaves = jax.tree.leaves(out)
        return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)) for leaf in leaves])

    return by_hand(values), jax.jacrev(by_hand)(values)


def _check_linearisation(operator, unknowns, key):
    found = traced(operator, unknowns)
    key1, key2, key3 = jax.random.split(key, 3)
    values = jax.random.uniform(key1, (len(found.jets),), minval=0.6, maxval=1.4)
    x = jax.random.uniform(key2, (2,))
    z = values[jnp.array(found.nonlinear, int)]
    jacobian, offset = linearise(operator, unknowns, found, z, x)
    value, expected = _full_jacobian(operator, unknowns, found, values, x)
    assert jacobian.shape == (found.size, len(found.jets))
    np.testing.assert_allclose(jacobian, expected, rtol=1e-12, atol=1e-13)
    # `jacobian @ jets - offset` is the operator at these values ...
    np.testing.assert_allclose(
        jacobian @ values - offset, value, rtol=1e-12, atol=1e-12
    )
    # ... and, where only the linear entries change, everywhere.
    change = jax.random.normal(key3, values.shape)
    change = change.at[jnp.array(found.nonlinear, int)].set(0.0)
    moved = values + change
    value, _ = _full_jacobian(operator, unknowns, found, moved, x)
    np.testing.assert_allclose(jacobian @ moved - offset, value, rtol=1e-11, atol=1e-11)
    # The nonlinear part and the linear one make up the operator.
    linear = moved.at[jnp.array(found.nonlinear, int)].set(0.0)
    rest = nonlinear_part(operator, unknowns, found, z, x)
    np.testing.assert_allclose(rest + jacobian @ linear, value, rtol=1e-11, atol=1e-11)


CHECKED = {name: operator for name, (operator, _) in NONLINEAR.items()}
CHECKED |= {"linear_" + name: operator for name, operator in LINEAR.items()}


@pytest.mark.parametrize("name", CHECKED)
def test_linearise(name, getkey):
    _check_linearisation(CHECKED[name], ONE, getkey())


def test_linearise_with_two_unknowns(getkey):
    darcy = lambda u, x: {
        "pde": -jnp.exp(u["a"].value) * (u["u"].laplacian + u["a"].grad @ u["u"].grad),
        "data": u["u"].value * x[0],
    }
    _check_linearisation(darcy, TWO, getkey())


def test_linearise_by_hand():
    burgers = lambda u, x: u.d(0) + u.value * u.d(1) - 0.1 * u.d(1, 1)
    found = traced(burgers)
    assert found.jets == (("u", e()), ("u", e(1)), ("u", e(0)), ("u", e(1, 1)))
    assert found.nonlinear == (0, 1)
    x, z = jnp.zeros(2), jnp.array([2.0, 3.0])
    jacobian, offset = linearise(burgers, ONE, found, z, x)
    np.testing.assert_allclose(jacobian, [[3.0, 2.0, 1.0, -0.1]])
    np.testing.assert_allclose(offset, [6.0])
    np.testing.assert_allclose(nonlinear_part(burgers, ONE, found, z, x), [6.0])


def test_linearise_under_transformations(getkey):
    operator = lambda u, x: u.value**3 * x[0] - u.laplacian
    found = traced(operator)
    zs, xs = jax.random.normal(getkey(), (4, 1)), jax.random.uniform(getkey(), (4, 2))
    at = lambda z, x: linearise(operator, ONE, found, z, x)
    jacobian, offset = jax.jit(jax.vmap(at))(zs, xs)
    np.testing.assert_allclose(jacobian[:, 0, 0], 3 * zs[:, 0] ** 2 * xs[:, 0])
    np.testing.assert_allclose(jacobian[:, 0, 1:], -1.0)
    np.testing.assert_allclose(offset[:, 0], 2 * zs[:, 0] ** 3 * xs[:, 0])


# Nothing is nonlinear in a linear operator, so that `z` is empty.
def test_linearise_without_nonlinear_entries():
    operator = lambda u, x: u.laplacian - x[0]
    found = traced(operator)
    z, x = jnp.zeros(0), jnp.array([0.25, 0.5])
    jacobian, offset = linearise(operator, ONE, found, z, x)
    np.testing.assert_array_equal(jacobian, [[1.0, 1.0]])
    np.testing.assert_array_equal(offset, [0.25])
    rest = nonlinear_part(operator, ONE, found, z, x)
    np.testing.assert_array_equal(rest, [-0.25])


#
# Mistakes
#


def _note(error):
    return " ".join(getattr(error.value, "__notes__", []))


@pytest.mark.parametrize(
    "operator", (lambda u, x: u.d(2), lambda u, x: u.d(0, -3) + u.value)
)
def test_axis_out_of_range_names_the_condition(operator):
    with pytest.raises(ValueError, match="2 dimension") as error:
        traced(operator)
    assert "'pde'" in _note(error) and "(2,)" in _note(error)


def test_missing_unknown():
    with pytest.raises(
        KeyError, match=r"no unknown function 'b'.*\['u', 'a'\]"
    ) as error:
        traced(lambda u, x: u["b"].value, TWO)
    assert "'pde'" in _note(error)
    assert "'u'" in _note(error) and "'a'" in _note(error)


def test_dictionary_or_jet():
    with pytest.raises(TypeError, match=r"There is one, and `u` is its jet") as error:
        traced(lambda u, x: u["u"].value)
    assert "'pde'" in _note(error) and "a jet" in _note(error)
    with pytest.raises(AttributeError, match=r"use `u\['u'\].value`") as error:
        traced(lambda u, x: u.value, TWO)
    assert "'pde'" in _note(error) and "dictionary" in _note(error)


def test_not_a_function():
    with pytest.raises(TypeError, match="`u` is not a function"):
        traced(lambda u, x: u(x))


@pytest.mark.parametrize(
    "operator",
    [
        lambda u, x: u**3,
        lambda u, x: x[0] * u,
        lambda u, x: u.laplacian - u,
        lambda u, x: 1.0 / u,
        lambda u, x: -u,
        lambda u, x: abs(u),
    ],
)
def test_no_arithmetic(operator):
    with pytest.raises(TypeError, match="`u` is not a number .* use `u.value`"):
        traced(operator)


def test_wrong_signature():
    with pytest.raises(TypeError, match="positional argument") as error:
        traced(lambda u: u.value)
    assert "`operator(u, x)`" in _note(error)


@pytest.mark.parametrize("wrap", (lambda u: u, lambda u: (u.value, u), lambda u: [u]))
def test_returns_the_unknown(wrap):
    with pytest.raises(ValueError, match="'pde' returned the unknown itself"):
        traced(lambda u, x: wrap(u))


def test_returns_the_unknowns():
    with pytest.raises(ValueError, match="'pde' returned the unknown itself"):
        traced(lambda u, x: u, TWO)


@pytest.mark.parametrize("nothing", (None, (), {}, (None,)))
def test_returns_nothing(nothing):
    def operator(u, x):
        u.value
        return nothing

    with pytest.raises(ValueError, match="'pde' returned nothing"):
        traced(operator)


def test_does_not_use_the_unknown():
    with pytest.raises(ValueError, match="'pde' does not depend on the unknown"):
        traced(lambda u, x: x[0])


# `1j * x` is not allowed in these tests, which do not mix dtypes.
_c = jax.lax.complex


@pytest.mark.parametrize(
    "operator",
    (
        lambda u, x: _c(u.value, u.d(0)),
        lambda u, x: (u.value, jnp.exp(_c(x[0], x[1]))),
        lambda u, x: u.value.astype(complex),
    ),
)
def test_complex(operator):
    with pytest.raises(ValueError, match="complex.*imaginary part") as error:
        traced(operator)
    assert "'pde'" in _note(error)


# But what is complex inside is fine.
def test_complex_inside():
    phase = lambda x: jnp.exp(_c(jnp.zeros_like(x), x))
    wave = lambda u, x: jnp.real(phase(x[0]) * _c(u.value, u.d(0)))
    assert nonlinear(wave) == set()
    modulus = lambda u, x: jnp.abs(_c(u.value, u.d(0))) ** 2 + u.d(1)
    assert nonlinear(modulus) == {("u", e()), ("u", e(0))}


@pytest.mark.parametrize("operator", (None, 1.0, jnp.ones(3), "u"))
def test_not_callable(operator):
    with pytest.raises(ValueError, match="'pde' must be a callable"):
        traced(operator)


def test_python_control_flow():
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        traced(lambda u, x: u.value if u.value > 0 else u.d(0))
    assert "'pde'" in _note(error)


# A text or the like instead of a number; or a derivative without its dimension.
@pytest.mark.parametrize("wrong", (lambda u: "u", lambda u: u.d))
def test_not_a_number(wrong):
    with pytest.raises(ValueError, match="must return numbers, got a") as error:
        traced(lambda u, x: (u.value, wrong(u)))
    assert "'pde'" in _note(error)


def test_truth_value():
    with pytest.raises(ValueError, match="returned a truth value"):
        traced(lambda u, x: u.value > 0)


#
# Known functions
#


def test_apply():
    def operator(u, x):
        return -u.laplacian + u.value**3 + x[0] * u.d(0, 1), u.grad

    exact = lambda x: jnp.sin(2 * x[0]) * jnp.exp(x[1])
    x = jnp.array([[0.3, 0.1], [-0.4, 0.7]])
    value = jax.vmap(exact)(x)
    mixed = 2 * jnp.cos(2 * x[:, 0]) * jnp.exp(x[:, 1])
    equation, slope = eb.apply(operator, exact, x)
    np.testing.assert_allclose(equation, 3 * value + value**3 + x[:, 0] * mixed)
    np.testing.assert_allclose(slope, jnp.stack([mixed, value], axis=1))
    one = eb.apply(operator, exact, x[1])
    np.testing.assert_allclose(one[0], equation[1])

    def coupled(u, x):
        return u["a"].value * u["b"].d(0)

    both = {"a": exact, "b": lambda x: x[0] ** 2}
    np.testing.assert_allclose(eb.apply(coupled, both, x), value * 2 * x[:, 0])


def test_apply_to_what_is_not_known():
    with pytest.raises(ValueError, match="`fn` must return a scalar .* shape .2,."):
        eb.apply(lambda u, x: u.value, lambda x: x, jnp.zeros(2))
    with pytest.raises(ValueError, match="from 'b'"):
        functions = {"a": jnp.sum, "b": lambda x: x}
        eb.apply(lambda u, x: u["a"].value, functions, jnp.zeros((3, 2)))
