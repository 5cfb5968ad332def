"""Sparse inverse Cholesky factors, against dense matrices."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_bilevel._gram import Block, covariance, GramOperator
from eqx_bilevel._linearised import linearise, noise_variances, prior_z, z_functionals
from eqx_bilevel._problem import build
from eqx_bilevel._sparse import factorise, Functionals, SparseFactor
from eqx_bilevel._sparse._ordering import maximin
from eqx_bilevel._sparse._system import covariance_by_factor, layout, patterns


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_maximin(dim):
    rng = np.random.default_rng(dim)
    points, before = rng.uniform(size=(80, dim)), rng.uniform(size=(5, dim))
    for given in (None, before):
        order, distances = maximin(points, given)
        nearest = np.full(80, np.inf)
        if given is not None:
            nearest = np.linalg.norm(points[:, None] - given, axis=2).min(axis=1)
        left = nearest.copy()
        for i, distance in zip(order, distances):
            assert i == np.argmax(left) and distance == pytest.approx(left[i])
            nearest = np.minimum(nearest, np.linalg.norm(points - points[i], axis=1))
            left = np.where(np.isin(np.arange(80), i) | (left < 0), -1, nearest)


def _laplacian(points):
    dim = points.shape[1]
    jets = tuple(("u", tuple(2 * int(i == j) for j in range(dim))) for i in range(dim))
    coefficients = -jnp.ones((len(points), 1, dim))
    return Block(points, coefficients, jets)


def _functionals(n, m, dim):
    points = eb.Box([0.0] * dim, [1.0] * dim).interior(n, key=jax.random.key(dim))
    values = Block(points, None, (("u", (0,) * dim),))
    return Functionals(values, _laplacian(points[:m]))


def _dense(kernels, functionals):
    blocks = [functionals.values, functionals.others]
    return np.asarray(covariance(kernels, blocks, blocks))


def _rows(method, size):
    return np.asarray(jax.vmap(method)(jnp.eye(size)))


@pytest.mark.parametrize("dim, nu", [(1, 3.5), (2, 3.5), (3, 4.5)])
def test_with_all_parents_it_is_exact(dim, nu):
    kernels = {"u": eb.unwrap(eb.Matern(0.5, nu=nu))}
    functionals = _functionals(24, 16, dim)
    dense, nugget = _dense(kernels, functionals), 1e-8
    dense = dense + nugget * np.diag(np.diag(dense))
    pattern = patterns(functionals, 1e3)
    factor = eqx.filter_jit(factorise)(kernels, functionals, pattern, nugget)
    size = functionals.size
    upper = _rows(factor.multiply, size).T
    scale = np.sqrt(np.diag(dense))
    unit = scale[:, None] * upper @ upper.T * scale
    correlations = dense / scale[:, None] / scale
    np.testing.assert_allclose(unit @ correlations, np.eye(size), atol=1e-5)
    v = scale * np.asarray(jax.random.normal(jax.random.key(0), (size,)))
    product = dense @ (v / scale**2)
    found = factor.covariance(jnp.asarray(v / scale**2))
    np.testing.assert_allclose(found, product, atol=1e-9 * np.abs(product).max())
    determinant = np.linalg.slogdet(correlations)[1] + 2 * np.sum(np.log(scale))
    np.testing.assert_allclose(factor.log_determinant(), determinant, rtol=1e-6)


@pytest.fixture(scope="module")
def sparse():
    kernels = {"u": eb.unwrap(eb.Matern(0.3, nu=3.5))}
    functionals = _functionals(120, 60, 2)
    make = eqx.filter_jit(factorise)
    factors = [
        make(kernels, functionals, patterns(functionals, rho), 1e-10)
        for rho in (1.5, 3.0, 5.0)
    ]
    dense = _dense(kernels, functionals)
    return dense + 1e-10 * np.diag(np.diag(dense)), factors


def test_error_decreases_with_the_radius(sparse):
    dense, factors = sparse
    scale = np.sqrt(np.diag(dense))
    errors, entries = [], []
    for factor in factors:
        found = _rows(factor.covariance, factor.size)
        errors.append(np.max(np.abs((found - dense) / scale[:, None] / scale)))
        entries.append(sum(part.weights.size for part in factor.parts))
    assert errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]
    assert entries[0] < entries[1] < entries[2]


def test_each_functional_is_predicted_from_its_parents(sparse):
    # Of all factors with this sparsity it is the closest to the matrix if K U is zero
    # at the parents of each column (Schaefer, Katzfuss and Owhadi, theorem 2.1).
    dense, (_, factor, _) = sparse
    upper = _rows(factor.multiply, factor.size).T
    scale = np.sqrt(np.diag(dense))
    product = dense @ upper / scale[:, None]
    np.testing.assert_allclose(np.diag(upper.T @ dense @ upper), 1.0, atol=1e-6)
    count = 0
    for part in factor.parts:
        for parents, columns in zip(np.asarray(part.parents), np.asarray(part.columns)):
            parents = parents[parents < factor.size]
            columns = columns[columns < factor.size]
            assert not np.isin(parents, columns).any()
            here = product[np.ix_(parents, columns)]
            assert np.max(np.abs(here), initial=0) < 1e-5
            count += len(columns)
    assert count == factor.size


def test_products_and_solves_belong_together(sparse):
    _, (_, factor, _) = sparse
    key1, key2 = jax.random.split(jax.random.key(1))
    a, b = (jax.random.normal(k, (factor.size,)) for k in (key1, key2))
    there = factor.multiply(factor.solve(a))
    np.testing.assert_allclose(there, a, atol=1e-8)
    there = factor.multiply_transposed(factor.solve_transposed(a))
    np.testing.assert_allclose(there, a, atol=1e-8)
    for one, other in (
        (SparseFactor.multiply, SparseFactor.multiply_transposed),
        (SparseFactor.solve, SparseFactor.solve_transposed),
    ):
        left, right = b @ one(factor, a), a @ other(factor, b)
        np.testing.assert_allclose(left, right, rtol=1e-9)


def _burgers(u, x):
    return u.d(0) + u.value * u.d(1) - 0.1 * u.d(1, 1)


def test_system_of_a_nonlinear_problem():
    box = eb.Box([0.0, -1.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(2), 3)
    conditions = [
        eb.Condition(_burgers, box.interior(30, key=keys[0]), nugget=1e-6),
        eb.Condition(
            lambda u, x: u.value,
            box.boundary(20, key=keys[1]),
            lambda x: jnp.sin(x[1]),
            nugget=1e-6,
        ),
    ]
    prior = eb.GaussianProcess(eb.Matern(0.8, nu=4.5))
    problem = build(*eb.unwrap((prior, conditions)))
    z = prior_z(problem)
    z = z + 0.3 * jax.random.normal(keys[2], z.shape)
    linearised = linearise(problem, z)
    gamma = noise_variances(problem, jnp.zeros(()))
    operator = GramOperator(problem.kernels, linearised.functionals, gamma)

    places = layout(problem)
    functionals = places.functionals["u"]
    pattern = patterns(functionals, 1e3)
    factors = {"u": factorise(problem.kernels, functionals, pattern, 1e-12)}
    weights = jnp.linalg.solve(operator.as_matrix(), linearised.rhs)
    vectors = covariance_by_factor(
        problem, places, factors, linearised.jacobians, weights
    )
    product = places.apply(problem, linearised.jacobians, vectors) + gamma * weights
    size = jnp.max(jnp.abs(linearised.rhs))
    np.testing.assert_allclose(product, linearised.rhs, atol=1e-6 * size)
    rows = covariance(problem.kernels, z_functionals(problem), linearised.functionals)
    expected = rows @ weights
    found = places.read_z(problem, vectors)
    np.testing.assert_allclose(found, expected, atol=1e-6 * jnp.max(jnp.abs(expected)))
