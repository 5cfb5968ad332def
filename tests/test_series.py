"""Truncated Taylor arithmetic, against nested automatic differentiation."""

import itertools as it

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_bilevel._gram import _pairs
from eqx_bilevel._gram._pairs import one_sided, pairs


large = jnp.linspace(-1.0, 1.0, 120).reshape(60, 2)
two = jnp.array(2.0)
matrix = jnp.array([[0.3, -0.2], [0.1, 0.4], [0.5, 0.2]])


def squared(x, y):
    return jnp.sum((x - y) ** 2)


@jax.custom_jvp
def odd(s):
    return s**3


@odd.defjvp
def _(primals, tangents):
    (s,), (ds,) = primals, tangents
    return odd(s), 3 * s**2 * ds


whole = lambda x: x.astype(int).astype(x.dtype)
# Not all of them are positive definite, which plays no role here.
known = dict(
    exponential=lambda x, y: jnp.exp(-squared(x, y) / 2),
    rational=lambda x, y: 1 / (1 + squared(x, y)) + x[0] / (2 + y[1]),
    powers=lambda x, y: (1.5 + jnp.dot(x, y)) ** 3 + (1 + squared(x, y)) ** -1.5,
    negative_power=lambda x, y: (1 + squared(x, y)) ** -2,
    roots=lambda x, y: jnp.sqrt(1 + x @ y) * jax.lax.rsqrt(2 + squared(x, y)),
    logarithm=lambda x, y: jnp.log(2 + jnp.sum(x * y)),
    periodic=lambda x, y: jnp.prod(jnp.cos(3 * (x - y))) + jnp.sin(x[0] * y[1]),
    network=lambda x, y: jnp.tanh(matrix @ x) @ jax.nn.sigmoid(matrix @ y),
    softplus=lambda x, y: jax.nn.softplus(x[0] - y[1]) * jnp.expm1(y[0] * x[1]),
    error_function=lambda x, y: jax.lax.erf(x[0] * y[0]) + jnp.log1p(x[1] * y[1]),
    piecewise=lambda x, y: jnp.where(x[0] > y[0], x[0] ** 2 * y[1], jnp.exp(y[0])),
    extremes=lambda x, y: (
        jnp.maximum(x[0] * y[0], 0.2)
        + jnp.minimum(x, y).sum() * jnp.abs(x[1] - 2 * y[1])
    ),
    whole_power=lambda x, y: jnp.exp(-squared(x, y)),
    real_power=lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2.0)),
    array_power=lambda x, y: jnp.exp(-jnp.sum((x - y) ** two)),
    absolute_power=lambda x, y: jnp.exp(-jnp.sum(jnp.abs(x - y) ** 2.0)),
    step_power=lambda x, y: x[0] ** jnp.floor(4 * y[1]) * y[0],
    support=lambda x, y: jnp.maximum(squared(x, y) - 0.3, 0.0) ** 4.5,
    base=lambda x, y: 2.0 ** (x[0] * y[0]) + (1 + x[1]) ** y[0],
    moved=lambda x, y: (
        jnp.stack([x[::-1], y]).reshape(-1)[1:3] @ jnp.concatenate([y[:1], x[1:]])
    ),
    unpacked=lambda x, y: (lambda a, b: a**2 * jnp.exp(b * y[0]))(*x),
    parts=lambda x, y: jnp.prod(jnp.split(x, 2)[0] - y[1]) * x[jnp.array([1, 0])] @ y,
    jitted=lambda x, y: jax.jit(squared)(x, y) * jax.checkpoint(squared)(x, y),
    own_rule=lambda x, y: odd(squared(x, y)),
    constant=lambda x, y: jnp.asarray(2.0),
    whole=lambda x, y: whole(3 * x[0]) * y[0] + whole(4 * y[1]) * x[1],
    whole_parts=lambda x, y: (
        x[0]
        * y[0]
        * jnp.concatenate([(5 * x).astype(int), jnp.array([1, 0])])[:3]
        .sum()
        .astype(float)
    ),
    jumps=lambda x, y: jnp.floor(3 * x[0]) * y[0] + jax.lax.stop_gradient(x[1]) * y[1],
)
# For these there is no rule.
table = jnp.array([1.0, 3.0, 2.0])
steps = lambda x: jnp.floor(4 * x)
unknown = dict(
    cumulative=lambda x, y: jnp.cumsum(x * y)[1] ** 2,
    of_steps=lambda x, y: x[0] * y[0] * (jnp.cumsum(steps(x)) @ jnp.cumsum(steps(y))),
    sorted_steps=lambda x, y: x[1] * y[1] * (jnp.sort(steps(x)) @ jnp.sort(steps(y))),
    table=lambda x, y: jnp.exp(x[0] * y[0]) * table[(3 * x[1]).astype(int)],
    dynamic=lambda x, y: (
        y[1] * jax.lax.dynamic_index_in_dim(table, (3 * x[0]).astype(int), 0, False)
    ),
    reduced=lambda x, y: jax.nn.logsumexp(x * y) * jnp.max(x + y),
    branches=lambda x, y: jax.lax.cond(
        x[0] > y[0], lambda a: a**2, lambda a: 3 * a, x[1] * y[1]
    ),
    loop=lambda x, y: jax.lax.fori_loop(0, 3, lambda i, a: a * squared(x, y), 1.0),
    solved=lambda x, y: x @ jnp.linalg.solve(2 * jnp.eye(2) + jnp.outer(x, y), y),
    complex=lambda x, y: jnp.abs(jax.lax.complex(x[0], y[0]) ** 2),
    large=lambda x, y: jnp.tanh(large @ x) @ jnp.tanh(large @ y),
)


class User(eb.AbstractKernel):
    fn: str

    def __call__(self, x, y):
        return (known | unknown)[self.fn](x, y)


class UserFeatures(eb.AbstractFeatureKernel):
    fn: str

    def features(self, x):
        return {"point": x, "network": jnp.tanh(matrix @ x)}

    def pair(self, f, g):
        fn = (known | unknown)[self.fn]
        return fn(f["point"] * f["network"][1], g["network"][:2]) * jnp.sum(g["point"])


class StepFeatures(eb.AbstractFeatureKernel):
    # One feature has no derivatives.
    reduced: bool

    def features(self, x):
        return x, (3 * x).astype(int)

    def pair(self, f, g):
        factor = jax.nn.logsumexp(f[0]) if self.reduced else 1.0
        return (
            factor * jnp.exp(-squared(f[0], g[0])) * (1 + (f[1] @ g[1]).astype(float))
        )


indices = ((0, 0), (0, 1), (2, 0), (1, 1))
x, y = jnp.array([0.7, 0.4]), jnp.array([0.2, 0.9])


def truth(kernel, a, b):
    out = lambda x, y: kernel(x, y)
    for argnum, index in ((1, b), (0, a)):
        for axis in it.chain(*[[d] * n for d, n in enumerate(index)]):
            differentiated = jax.jacfwd(out, argnum)
            out = lambda x, y, f=differentiated, axis=axis: f(x, y)[..., axis]
    return out(x, y)


def numbers(array):
    out = np.empty(array.shape, object)
    for i in np.ndindex(array.shape):
        out[i] = array[i]
    return out


def table_of(kernel, lefts, rights, x, y):
    left = jax.tree.map(numbers, one_sided(kernel, lefts, x))
    right = jax.tree.map(numbers, one_sided(kernel, rights, y))
    return pairs(kernel, lefts, rights, left, right)


def check(kernel):
    table = jax.jit(lambda x, y: table_of(kernel, indices, indices, x, y))(x, y)
    truths = jax.jit(
        lambda: {k: truth(kernel, *k) for k in it.product(indices, indices)}
    )()
    size = max(abs(float(v)) for v in truths.values())
    for key, expected in truths.items():
        assert abs(table[key] - expected) <= 1e-12 * size, key


@pytest.mark.parametrize("name", known)
def test_known(name, monkeypatch):
    def forbidden(*_):
        raise AssertionError("This must not need automatic differentiation.")

    monkeypatch.setattr(_pairs, "derivative", forbidden)
    check(User(name))


@pytest.mark.parametrize("name", ["exponential", "piecewise", "cumulative"])
def test_features(name):
    check(UserFeatures(name))


@pytest.mark.parametrize("reduced", [False, True])
def test_whole_features(reduced):
    check(StepFeatures(reduced))


@pytest.mark.parametrize("name", unknown)
def test_unknown(name, monkeypatch):
    called = []
    derivative = _pairs.derivative

    def counted(*args):
        called.append(args)
        return derivative(*args)

    monkeypatch.setattr(_pairs, "derivative", counted)
    check(User(name))
    assert called


def test_at_coinciding_points():
    # Squares and powers must not become divisions by zero.
    kernel = User("powers")
    table = table_of(kernel, indices, indices, x, x)
    assert all(np.isfinite(v) for v in table.values())


@pytest.mark.parametrize("name", ["real_power", "array_power", "absolute_power"])
def test_powers_at_zero(name):
    # These are the same function, but automatic differentiation does not know it.
    expected = table_of(User("whole_power"), indices, indices, x, x)
    found = table_of(User(name), indices, indices, x, x)
    for key, value in expected.items():
        assert abs(found[key] - value) <= 1e-14, key


def test_beyond_the_support():
    table = table_of(User("support"), indices, indices, x, x)
    assert all(v == 0 for v in table.values())


def test_vanishing_derivatives_are_not_formed():
    # For a function of differences in one dimension each, no mixed term exists.
    jaxpr = jax.make_jaxpr(
        lambda x, y: table_of(User("exponential"), ((1, 0),), ((0, 0),), x, y)
    )(x, y)
    assert len(jaxpr.jaxpr.eqns) < 40
