"""Sparse inverse Cholesky factors, against dense linear algebra."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from eqx_bilevel._gauss_newton import _regress
from eqx_bilevel._gram import Block, covariance
from eqx_bilevel._linearised import linearise, noise_variances
from eqx_bilevel._parameters import unwrap
from eqx_bilevel._problem import build, with_readings
from eqx_bilevel._sparse import (
    conditions_operator,
    factorise,
    Functionals,
    Pattern,
    plan,
    regress,
)
from eqx_bilevel._sparse._ordering import maximin
from eqx_bilevel._sparse._pattern import following, ordered, supernodes
from scipy.spatial.distance import cdist


NUGGET = 1e-8


def random_points(n, d, seed=0):
    return np.random.default_rng(seed).random((n, d))


def grid(n, d):
    axes = np.meshgrid(*[np.linspace(0.0, 1.0, n)] * d, indexing="ij")
    return np.stack(axes, -1).reshape(-1, d)


#
# Orderings
#


@pytest.mark.parametrize("d", (1, 2, 3))
@pytest.mark.parametrize("num_before", (0, 5))
def test_ordering_is_maximin(d, num_before):
    points, before = random_points(200, d), random_points(num_before, d, seed=1)
    order, distances = maximin(points, before)
    nearest = np.full(200, np.inf)
    if num_before > 0:
        nearest = cdist(points, before).min(axis=1)
    for i, distance in zip(order, distances):
        assert i == np.argmax(nearest) and np.isclose(nearest[i], distance)
        nearest = np.minimum(nearest, cdist(points, points[i : i + 1])[:, 0])
        nearest[i] = -np.inf
    assert sorted(order) == list(range(200))


def test_points_that_coincide_have_the_same_place():
    points = np.concatenate([grid(4, 2), grid(4, 2)])
    group = ordered(points)
    assert np.array_equal(group.rank[:16], group.rank[16:])
    assert np.all(group.lengthscales > 0)


#
# Patterns
#


def groups(points, others):
    values = ordered(points)
    return values, following(others, values)


@pytest.mark.parametrize("d", (1, 2, 3))
@pytest.mark.parametrize(
    "sample", (random_points, lambda n, d: grid(round(n ** (1 / d)), d))
)
def test_parents_are_all_near_functionals_that_come_before(d, sample):
    points = sample(300, d)
    values, others = groups(points, points[::2])
    rho = 2.0, 1.5
    both = np.concatenate([values.points, others.points])
    lengthscales = np.concatenate([values.lengthscales, others.lengthscales])
    distance = cdist(both, both)
    n, seen = len(points), []
    for part in supernodes(values, others, rho):
        pattern = Pattern.of(part, n, len(others.points))
        for columns, parents in zip(pattern.columns, pattern.parents):
            columns = [int(i) for i in columns if i < len(both)]
            parents = {int(i) for i in parents if i < len(both)}
            assert parents <= set(seen)
            r = rho[0] if part.of_values else rho[1]
            for j in columns:
                near = np.flatnonzero(distance[j] <= r * lengthscales[j])
                assert set(near) & set(seen) <= parents
            seen.extend(columns)
    assert sorted(seen) == list(range(len(both)))
    # Values first.
    assert sorted(seen[:n]) == list(range(n))


def test_number_of_parents_does_not_grow():
    means = []
    for n in (30, 60):
        values, others = groups(grid(n, 2), grid(n, 2))
        parts = supernodes(values, others, (3.0, 2.0))
        entries = sum(np.sum(p.value_parents < n**2) for p in parts)
        means.append(entries / sum(len(p.columns) for p in parts))
    assert means[1] < 1.4 * means[0]


#
# The factor
#


def laplacian(points):
    d = points.shape[1]
    jets = tuple(("u", tuple(2 * int(i == j) for i in range(d))) for j in range(d))
    return Block(jnp.asarray(points), jnp.full((len(points), 1, d), -1.0), jets)


def slope(points):
    # With a coefficient that differs from point to point.
    d = points.shape[1]
    jets = ("u", (0,) * d), ("u", (1, *[0] * (d - 1)))
    x = jnp.asarray(points)
    coefficients = jnp.stack([jnp.sin(3 * x[:, 0]), jnp.ones(len(x))], axis=1)
    return Block(x, coefficients[:, None, :], jets)


def stated(d, n, others, nu, rho):
    points = random_points(n, d)
    values = Block(jnp.asarray(points), None, (("u", (0,) * d),))
    functionals = Functionals(values, others(points[: n // 2]))
    parts = supernodes(*groups(points, points[: n // 2]), (rho, rho))
    pattern = tuple(Pattern.of(p, n, n // 2) for p in parts)
    kernels = {"u": unwrap(eb.Matern(0.5, nu=nu))}
    return kernels, functionals, pattern


def dense_covariance(kernels, functionals, nugget=NUGGET):
    blocks = [functionals.values, functionals.others]
    matrix = np.array(covariance(kernels, blocks, blocks))
    return matrix + nugget * np.diag(np.diag(matrix))


@eqx.filter_jit
def dense_factor(factor):
    identity = jnp.eye(factor.size)
    return jax.vmap(factor.multiply, out_axes=1)(identity)


def close(actual, expected, rtol):
    scale = np.max(np.abs(expected))
    assert scale > 0
    assert np.max(np.abs(np.asarray(actual) - expected)) <= rtol * scale


@pytest.mark.parametrize(
    "d, nu, others",
    [(1, 2.5, slope), (1, 3.5, laplacian), (2, 2.5, laplacian), (3, 3.5, laplacian)],
)
def test_exact_if_all_are_parents(d, nu, others):
    kernels, functionals, pattern = stated(d, 30, others, nu, rho=1e3)
    factor = eqx.filter_jit(factorise)(kernels, functionals, pattern, NUGGET)
    matrix = dense_covariance(kernels, functionals)
    scale = np.sqrt(np.diag(matrix))
    root = dense_factor(factor) * scale[:, None]
    correlation = matrix / scale[:, None] / scale
    close(root.T @ correlation @ root, np.eye(factor.size), 1e-6)
    assert np.isclose(factor.log_determinant(), np.linalg.slogdet(matrix)[1], rtol=1e-6)
    vector = jax.random.normal(jax.random.key(0), (factor.size,))
    close(factor.covariance(vector), matrix @ np.asarray(vector), 1e-8)


def test_products_and_solves():
    factor = factorise(*stated(2, 60, laplacian, 3.5, rho=2.0), NUGGET)
    root = np.asarray(dense_factor(factor))
    vector = jax.random.normal(jax.random.key(0), (factor.size,))
    close(factor.multiply(vector), root @ np.asarray(vector), 1e-12)
    close(factor.multiply_transposed(vector), root.T @ np.asarray(vector), 1e-12)
    close(factor.precision(vector), root @ (root.T @ np.asarray(vector)), 1e-12)
    close(root @ factor.solve(vector), np.asarray(vector), 1e-9)
    close(root.T @ factor.solve_transposed(vector), np.asarray(vector), 1e-9)
    close(factor.solve(factor.multiply(vector)), np.asarray(vector), 1e-9)
    log_determinant = -2 * np.linalg.slogdet(root)[1]
    assert np.isclose(factor.log_determinant(), log_determinant, rtol=1e-10)


def test_columns_minimise_the_divergence():
    # The closed form of Schaefer, Katzfuss and Owhadi (2021, theorem 2.1).
    kernels, functionals, pattern = stated(2, 60, laplacian, 3.5, rho=1.5)
    factor = factorise(kernels, functionals, pattern, 1e-6)
    root = np.asarray(dense_factor(factor))
    matrix = dense_covariance(kernels, functionals, 1e-6)
    sparse = 0
    for j, column in enumerate(root.T):
        support = np.flatnonzero(column)
        unit = (support == j).astype(float)
        inverse = np.linalg.solve(matrix[np.ix_(support, support)], unit)
        expected = inverse / np.sqrt(unit @ inverse)
        close(column[support], expected, 1e-6)
        sparse += len(support) < 45
    assert sparse > 45


def divergence(root, matrix):
    # Of N(0, K) from N(0, (U U^T)^-1).
    eigenvalues = scipy.linalg.eigvalsh(root.T @ matrix @ root)
    return 0.5 * np.sum(eigenvalues - 1 - np.log(eigenvalues))


@pytest.mark.parametrize("nu", (2.5, 3.5))
def test_error_decreases_exponentially(nu):
    points = grid(12, 2)
    values = Block(jnp.asarray(points), None, (("u", (0, 0)),))
    functionals = Functionals(values, laplacian(points[:50]))
    kernels = {"u": unwrap(eb.Matern(0.3, nu=nu))}
    matrix = dense_covariance(kernels, functionals)
    found = []
    for rho in (1.5, 3.0, 4.5, 6.0):
        parts = supernodes(*groups(points, points[:50]), (rho, rho))
        pattern = tuple(Pattern.of(p, len(points), 50) for p in parts)
        factor = eqx.filter_jit(factorise)(kernels, functionals, pattern, NUGGET)
        found.append(divergence(np.asarray(dense_factor(factor)), matrix))
    assert all(4 * after < before for before, after in zip(found, found[1:])), found


def test_gradient_of_determinant():
    _, functionals, pattern = stated(2, 40, laplacian, 3.5, rho=2.0)

    @jax.jit
    def log_determinant(lengthscale):
        kernels = {"u": unwrap(eb.Matern(lengthscale, nu=3.5))}
        return factorise(kernels, functionals, pattern, 1e-8).log_determinant()

    h = 1e-5
    difference = (log_determinant(0.5 + h) - log_determinant(0.5 - h)) / (2 * h)
    assert np.isclose(jax.grad(log_determinant)(0.5), difference, rtol=1e-5)


#
# Steps of Gauss-Newton
#


def value(u, x):
    return u.value


def elliptic(n):
    box = eb.Box([0.0, 0.0], [1.0, 1.0])
    operator = lambda u, x: -u.laplacian + u.value**3
    keys = jax.random.split(jax.random.key(0))
    conditions = [
        eb.Condition(operator, box.interior(n, key=keys[0]), 10.0, nugget=1e-6),
        eb.Condition(value, box.boundary(n // 2, key=keys[1]), nugget=1e-6),
    ]
    return eb.GaussianProcess(eb.Matern(0.4, nu=3.5)), conditions


def burgers(n):
    # Derivatives that enter nonlinearly, a coefficient that is learned and a mean.
    box = eb.Box([0.0, -1.0], [1.0, 1.0])
    operator = lambda u, x: u.d(0) + u.value * u.d(1) - 0.1 * u.d(1, 1)
    sine = lambda x: -jnp.sin(jnp.pi * x[1])
    conditions = [
        eb.Condition(operator, box.interior(n, key=jax.random.key(0)), nugget=1e-6),
        eb.Condition(value, box.face(0, "lower", 6, method="grid"), sine, nugget=1e-6),
    ]
    return eb.GaussianProcess(eb.Matern([0.5, 0.5], nu=3.5), mean=0.1), conditions


def system(n):
    # Two unknowns, two components, one of which is linear.
    def operator(u, x):
        return u["p"].d(0) * u["v"].value + u["v"].d(1, 1), u["v"].d(0) - u["p"].d(1)

    box = eb.Box([0.0, 0.0], [1.0, 1.0])
    start = lambda u, x: (u["p"].value, u["v"].value)
    targets = jnp.sin(3 * jnp.arange(n // 2)), jnp.ones(n // 2)
    conditions = [
        eb.Condition(
            operator, box.interior(n, key=jax.random.key(0)), 1.0, nugget=1e-6
        ),
        eb.Condition(
            start, box.face(0, "lower", n // 2, method="grid"), targets, nugget=1e-6
        ),
    ]
    kernels = dict(p=eb.Matern(0.5, nu=2.5), v=eb.Gaussian(0.4))
    return {name: eb.GaussianProcess(k) for name, k in kernels.items()}, conditions


def at_random(problem):
    z = 0.3 * np.random.default_rng(0).standard_normal(problem.z_size)
    return linearise(problem, jnp.asarray(z))


@eqx.filter_jit
def sparse_step(problem, made, linearised, nugget, tolerance=1e-10):
    jitter = jnp.zeros(())
    factors = made.factorise(problem, nugget)
    found = regress(problem, made, factors, linearised, jitter, tolerance=tolerance)
    gamma = noise_variances(problem, jitter)
    operator = conditions_operator(problem, made, factors, linearised, gamma)
    return found, operator.mv(linearised.rhs)


def dense_step(problem, linearised):
    solver = eb.GaussNewton().linear_solver
    return _regress(problem, linearised, jnp.zeros(()), solver)


@pytest.mark.parametrize("example", (elliptic, burgers, system))
def test_step_is_that_of_the_dense_solver(example):
    problem = build(*unwrap(example(24)))
    linearised = at_random(problem)
    made = plan(problem, rho=(1e3, 1e3), rho_conditions=1e3)
    found, product = sparse_step(problem, made, linearised, 1e-13)
    blocks = linearised.functionals
    matrix = covariance(problem.kernels, blocks, blocks)
    matrix = matrix + jnp.diag(noise_variances(problem, jnp.zeros(())))
    close(product, np.asarray(matrix @ linearised.rhs), 1e-8)
    expected = dense_step(problem, linearised)
    close(found.z, np.asarray(expected.z), 1e-5)
    assert found.residual < 1e-8
    assert found.num_steps < 10


def test_step_reads_elsewhere():
    prior, conditions = unwrap(elliptic(16))
    flux = lambda u, x: u.d(0) * u.d(1)
    where = jnp.asarray(random_points(5, 2))
    problem = with_readings(build(prior, conditions), prior, [(flux, where)])
    linearised = at_random(problem)
    made = plan(problem, rho=(1e3, 1e3), rho_conditions=1e3)
    found, _ = sparse_step(problem, made, linearised, 1e-13)
    expected = dense_step(problem, linearised)
    assert problem.z_size == 16 + 10
    close(found.z, np.asarray(expected.z), 1e-5)


def test_step_with_few_parents():
    problem = build(*unwrap(elliptic(200)))
    linearised = at_random(problem)
    expected = np.asarray(dense_step(problem, linearised).z)
    errors, num_steps = [], []
    for rho, rho_conditions in (((3.0, 2.0), 2.0), ((9.0, 4.0), 5.0)):
        made = plan(problem, rho=rho, rho_conditions=rho_conditions)
        found, _ = sparse_step(problem, made, linearised, 1e-10, 1e-8)
        assert found.residual < 1e-6
        num_steps.append(int(found.num_steps))
        errors.append(np.max(np.abs(found.z - expected)) / np.max(np.abs(expected)))
    assert errors[1] < 1e-3 and errors[1] < 0.2 * errors[0]
    assert num_steps[1] < 40 and 2 * num_steps[1] < num_steps[0]


def test_plan_needs_pointwise_conditions():
    points, weights = jnp.zeros((3, 2, 1)), jnp.array([0.5, 0.5])
    condition = eb.Condition(value, points, 0.0, quadrature=weights, noise=0.1)
    prior = eb.GaussianProcess(eb.Gaussian(1.0))
    with pytest.raises(ValueError, match="quadrature"):
        plan(build(*unwrap((prior, [condition]))))


def test_plan_needs_radii_above_one():
    with pytest.raises(ValueError, match="`rho`.*0.5"):
        plan(build(*unwrap(elliptic(10))), rho=(0.5, 3.0))
