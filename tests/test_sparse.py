"""Sparse inverse Cholesky factors, against dense linear algebra."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg
from eqx_bilevel._gram import Block, covariance
from eqx_bilevel._linear_solver import _most_dense
from eqx_bilevel._linearised import linearise
from eqx_bilevel._parameters import unwrap
from eqx_bilevel._problem import build
from eqx_bilevel._sparse import _pattern
from eqx_bilevel._sparse._factor import (
    covariance_product,
    CovarianceFactor,
    factorise as factorise_prior,
    Functionals,
    Pattern,
    PrecisionFactor,
    Prior,
)
from eqx_bilevel._sparse._ordering import maximin
from eqx_bilevel._sparse._pattern import following, ordered, supernodes
from eqx_bilevel._system import DenseSystem
from scipy.spatial.distance import cdist

from .helpers import close


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
    for node in in_order(supernodes(values, others, rho)):
        columns, parents = (set(x[x < len(both)]) for x in (node.columns, node.parents))
        # The same functionals, as the covariance has them.
        index = np.concatenate([node.values, n + node.others])[node.packed]
        every = np.concatenate([node.parents, node.columns])
        assert np.array_equal(index[every < len(both)], every[every < len(both)])
        assert parents <= set(seen)
        for j in columns:
            r = rho[0] if j < n else rho[1]
            near = np.flatnonzero(distance[j] <= r * lengthscales[j])
            assert set(near) & set(seen) <= parents
        seen.extend(columns)
    assert sorted(seen) == list(range(len(both)))
    # Values first.
    assert sorted(seen[:n]) == list(range(n))


def in_order(parts):
    each = [type(part)(*rows) for part in parts for rows in zip(*part)]
    return sorted(each, key=lambda node: node.number)


def test_shapes_follow_sizes(monkeypatch):
    # If compiling costs nothing then little is filled up.
    values, others = groups(random_points(600, 2), random_points(300, 2, seed=1))
    parts = supernodes(values, others, (3.0, 2.0))
    assert len(parts) == 2
    monkeypatch.setattr(_pattern, "_SHAPE", 0.0)
    many = supernodes(values, others, (3.0, 2.0))
    assert len(many) > 10
    share = lambda parts: np.mean(
        np.concatenate([p.parents.ravel() for p in parts]) < 900
    )
    assert share(parts) < 0.6 and share(many) > 0.9
    names = "parents", "columns"
    for one, other in zip(in_order(parts), in_order(many), strict=True):
        for x, y in ((getattr(one, name), getattr(other, name)) for name in names):
            assert np.array_equal(x[x < 900], y[y < 900])


def test_number_of_parents_does_not_grow():
    means = []
    for n in (30, 60):
        values, others = groups(grid(n, 2), grid(n, 2))
        parts = supernodes(values, others, (3.0, 2.0))
        entries = sum(np.sum(p.parents < n**2) for p in parts)
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
    pattern = Pattern.of(parts, n + n // 2)
    kernels = {"u": unwrap(eb.Matern(0.5, nu=nu))}
    return kernels, functionals, pattern


def factorise(kernels, functionals, pattern, nugget, kind=PrecisionFactor):
    return factorise_anew(Prior(kernels, functionals, nugget), pattern, kind)


def factorise_anew(prior, pattern, kind):
    none = kind.none(pattern, prior.noise.dtype)
    return factorise_prior(prior, pattern, none, jnp.array(True))


def dense_covariance(kernels, functionals, nugget=NUGGET):
    blocks = [functionals.values, functionals.others]
    matrix = np.array(covariance(kernels, blocks, blocks))
    return matrix + nugget * np.diag(np.diag(matrix))


@eqx.filter_jit
def dense_factor(factor):
    identity = jnp.eye(factor.size)
    return jax.vmap(factor.multiply, out_axes=1)(identity)


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
    for_products = eqx.filter_jit(factorise)(
        kernels, functionals, pattern, NUGGET, CovarianceFactor
    )
    vector = jax.random.normal(jax.random.key(0), (factor.size,))
    close(for_products.covariance(vector), matrix @ np.asarray(vector), 1e-8)


@pytest.mark.parametrize("seed, packed", ((0, True), (5, False)))
def test_covariances_of_supernodes(seed, packed):
    points = random_points(60, 2, seed)
    values = Block(jnp.asarray(points), None, (("u", (0, 0)),))
    functionals = Functionals(values, laplacian(points[:30]))
    parts = supernodes(*groups(points, points[:30]), (2.0, 1.5))
    kernels = {"u": unwrap(eb.Matern(0.5, nu=3.5))}
    expected = dense_covariance(kernels, functionals)
    prior = Prior(kernels, functionals, NUGGET)
    for part in parts:
        matrices, fill = jax.vmap(lambda node: prior.of_node(node))(part)
        every = np.concatenate([part.parents, part.columns], axis=1)
        more = part.values.shape[1] + part.others.shape[1] - every.shape[1]
        assert part.others.size == 0 or (more > 0) == packed
        assert np.array_equal(fill, every == 90)
        for matrix, used, index in zip(np.asarray(matrices), every < 90, every):
            index = index[used]
            close(matrix[used][:, used], expected[np.ix_(index, index)], 1e-12)


@pytest.mark.parametrize("seconds_per_shape", (0.0, 1.0))
def test_products_and_solves(seconds_per_shape, monkeypatch):
    monkeypatch.setattr(_pattern, "_SHAPE", seconds_per_shape)
    given = *stated(2, 60, laplacian, 3.5, rho=2.0), NUGGET
    factor, other = (factorise(*given, k) for k in (PrecisionFactor, CovarianceFactor))
    root = np.asarray(dense_factor(factor))
    vector = jax.random.normal(jax.random.key(0), (factor.size,))
    close(factor.multiply(vector), root @ np.asarray(vector), 1e-12)
    close(factor.multiply_transposed(vector), root.T @ np.asarray(vector), 1e-12)
    close(factor.precision(vector), root @ (root.T @ np.asarray(vector)), 1e-12)
    close(root @ other.solve(vector), np.asarray(vector), 1e-9)
    close(root.T @ other.solve_transposed(vector), np.asarray(vector), 1e-9)
    close(other.solve(factor.multiply(vector)), np.asarray(vector), 1e-9)
    log_determinant = -2 * np.linalg.slogdet(root)[1]
    for each in factor, other:
        assert np.isclose(each.log_determinant(), log_determinant, rtol=1e-10)


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
        pattern = Pattern.of(parts, len(points) + 50)
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
    assert np.isclose(jax.jacfwd(log_determinant)(0.5), difference, rtol=1e-5)


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


NO_JITTER = jnp.zeros(())


@eqx.filter_jit
def first_step(system, problem, linearised):
    last = system.no_factor(problem), jnp.zeros(problem.size)
    return system.regress(problem, linearised, NO_JITTER, last)


def both_steps(example, **radii):
    prior, conditions = example
    problem = build(*unwrap(example))
    system = eb.SparseCholesky(**radii).prepared(prior, conditions)
    dense, linearised = DenseSystem(lx.Cholesky()), at_random(problem)
    steps = [first_step(s, problem, linearised) for s in (system, dense)]
    return problem, linearised, system, *steps


EVERYTHING = dict(rho=(1e3, 1e3), rho_conditions=1e3)


@pytest.mark.parametrize("example", (elliptic, burgers, system))
def test_step_is_that_of_the_dense_solver(example):
    problem, linearised, system, found, expected = both_steps(example(24), **EVERYTHING)
    vector = linearised.rhs
    product, _ = system._changes(problem, linearised, found.factor, vector)
    blocks = linearised.functionals
    matrix = covariance(problem.kernels, blocks, blocks)
    close(product, np.asarray(matrix @ vector), 1e-8)
    close(found.z, np.asarray(expected.z), 1e-5)
    assert found.usable and found.num_products < 10


def test_step_with_few_parents():
    errors, num_steps = [], []
    for rho, rho_conditions in (((3.0, 2.0), 2.0), ((9.0, 4.0), 5.0)):
        radii = dict(rho=rho, rho_conditions=rho_conditions)
        *_, found, expected = both_steps(elliptic(200), **radii)
        assert found.usable
        num_steps.append(int(found.num_products))
        error, size = jnp.abs(found.z - expected.z), jnp.abs(expected.z)
        errors.append(np.max(error) / np.max(size))
    assert errors[1] < 1e-3 and errors[1] < 0.2 * errors[0]
    assert num_steps[1] < 50 and 1.5 * num_steps[1] < num_steps[0]


def test_factor_is_kept_until_its_nugget_changes():
    prior, conditions = elliptic(24)
    problem = build(*unwrap((prior, conditions)))
    system = eb.SparseCholesky().prepared(prior, conditions)
    first, second = at_random(problem), linearise(problem, jnp.ones(problem.z_size))
    kept = first_step(system, problem, first)
    last = kept.factor, kept.weights

    @eqx.filter_jit
    def again(linearised, jitter):
        return system.regress(problem, linearised, jitter, last)

    step, more = again(second, NO_JITTER), again(second, jnp.array(1e-8))
    determinant = lambda found: float(found.factor.prior["u"].log_determinant())
    assert determinant(step) == determinant(kept) != determinant(more)
    close(step.z, np.asarray(first_step(system, problem, second).z), 1e-7)


#
# Derivatives of products
#


def test_product_with_derivatives():
    # Of the approximation itself, against differences.
    _, functionals, pattern = stated(2, 40, laplacian, 3.5, rho=3.0)
    kind = CovarianceFactor
    one, other = jax.random.normal(jax.random.key(0), (2, 60))

    def prior(lengthscale):
        return Prior({"u": unwrap(eb.Matern(lengthscale, nu=3.5))}, functionals, 1e-8)

    @jax.jit
    def of_factor(lengthscale):
        return one @ factorise_anew(prior(lengthscale), pattern, kind).covariance(other)

    @jax.jit
    def with_derivatives(lengthscale, vector):
        p = prior(lengthscale)
        factor = factorise_anew(jax.lax.stop_gradient(p), pattern, kind)
        return one @ covariance_product(p, pattern, factor, vector)

    h, l = 1e-5, jnp.array(0.5)
    difference = (of_factor(l + h) - of_factor(l - h)) / (2 * h)
    assert np.isclose(with_derivatives(l, other), of_factor(l), rtol=1e-10)
    slope, weights = jax.grad(with_derivatives, (0, 1))(l, other)
    assert np.isclose(slope, difference, rtol=1e-5)
    _, forwards = jax.jvp(lambda l: with_derivatives(l, other), (l,), (jnp.ones(()),))
    assert np.isclose(forwards, slope, rtol=1e-8)
    close(weights, factorise_anew(prior(l), pattern, kind).covariance(one), 1e-9)


#
# Solutions
#


SQUARE = eb.Box([0.0, 0.0], [1.0, 1.0])
INTERIOR = np.asarray(SQUARE.interior(120, key=jax.random.key(0)))
BOUNDARY = np.asarray(SQUARE.boundary(40, key=jax.random.key(1)))


def nonlinear(p):
    operator = lambda u, x: -p["diffusion"] * u.laplacian + 10 * u.value**3
    conditions = [
        eb.Condition(operator, INTERIOR, p["source"], nugget=1e-8),
        eb.Condition(value, BOUNDARY, nugget=1e-8),
    ]
    kernel = p["variance"] * eb.Matern(p["lengthscale"], nu=3.5)
    return eb.GaussianProcess(kernel), conditions


PARAMETERS = dict(diffusion=1.3, source=20.0, variance=2.0, lengthscale=0.4)
TEST_POINTS = jnp.asarray(random_points(5, 2, seed=3))


def solved(p, linear_solver, rtol=1e-8, **kwargs):
    solver = eb.GaussNewton(rtol=rtol, linear_solver=linear_solver)
    return eb.solve(*nonlinear(p), solver, **kwargs)


@pytest.fixture(scope="module")
def solutions():
    wide = eb.SparseCholesky((12.0, 8.0), 6.0)
    return [solved(PARAMETERS, s) for s in (wide, lx.Cholesky())]


def flux(u, x):
    return u.value * u.d(0)


def test_solution(solutions):
    sparse, dense = solutions
    assert sparse.stats["num_products"] > 0 and dense.stats["num_products"] == 0
    size = jnp.max(jnp.abs(dense(TEST_POINTS)))
    assert jnp.max(jnp.abs(sparse(TEST_POINTS) - dense(TEST_POINTS))) < 2e-4 * size
    assert np.isclose(sparse.stats["rkhs_norm"], dense.stats["rkhs_norm"], rtol=1e-2)
    one, other = (s.apply(flux, TEST_POINTS) for s in solutions)
    close(one, np.asarray(other), 3e-3)


def test_error_bars(solutions):
    sparse, dense = solutions
    close(sparse.std(TEST_POINTS), np.asarray(dense.std(TEST_POINTS)), 2e-2)
    close(sparse.std(TEST_POINTS, flux), np.asarray(dense.std(TEST_POINTS, flux)), 2e-2)
    one, other = (np.asarray(s.covariance(TEST_POINTS)) for s in solutions)
    close(one, other, 3e-2)
    close(np.sqrt(np.diag(one)), sparse.std(TEST_POINTS), 1e-6)


def test_spectrum(solutions):
    sparse, dense = solutions
    assert np.isclose(sparse.spectral_radius(), dense.spectral_radius(), rtol=0.05)


def test_what_needs_the_whole_matrix(solutions):
    sparse, _ = solutions
    for call in (sparse.condition_number, sparse.standardised_errors):
        with pytest.raises(ValueError, match=r"available with `lineax.Cholesky\(\)`"):
            call()


def read(p, adjoint):
    found = solved(p, eb.SparseCholesky((3.0, 2.0)), 1e-11, adjoint=adjoint)
    return jnp.sum(found(TEST_POINTS) ** 2)


def test_gradient_is_that_of_what_is_computed():
    # With few parents, so that it is not the gradient of the dense solution.
    p = {name: jnp.asarray(v) for name, v in PARAMETERS.items()}
    implicit = jax.jit(jax.grad(lambda p: read(p, eb.FixedPointAdjoint())))(p)
    frozen = jax.jit(jax.grad(lambda p: read(p, eb.FrozenAdjoint())))(p)
    value = jax.jit(lambda p: read(p, eb.FrozenAdjoint()))
    for name in ("diffusion", "source", "lengthscale"):
        h = 2e-3 * p[name]
        at = [value({**p, name: p[name] + i * h}) for i in (-2, -1, 1, 2)]
        difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
        assert np.isclose(implicit[name], difference, rtol=1e-5)
        assert np.isclose(frozen[name], implicit[name], rtol=0.1)
        assert not np.isclose(frozen[name], implicit[name], rtol=1e-5)


def test_learn():
    # From a lengthscale that is much too short; against the dense solver.
    prior, conditions = nonlinear({**PARAMETERS, "lengthscale": 0.1})
    objective = eb.ValidationResidual(SQUARE.interior(30, key=jax.random.key(5)))
    run = lambda solver: eb.learn(
        prior,
        conditions,
        objective,
        solver=eb.GaussNewton(linear_solver=solver),
        scale_search=False,
        steps=10,
    )
    start = float(objective(eb.solve(prior, conditions)))
    sparse, dense = run(eb.SparseCholesky((9.0, 5.0))), run(lx.Cholesky())
    assert sparse.objective < 0.1 * start and dense.objective < 0.1 * start
    assert np.isclose(np.log(sparse.objective), np.log(dense.objective), atol=1.0)


#
# Errors
#


def test_conditions_at_points_only():
    points, weights = jnp.zeros((3, 2, 1)), jnp.array([0.5, 0.5])
    condition = eb.Condition(value, points, 0.0, quadrature=weights, noise=0.1)
    prior, solver = eb.GaussianProcess(eb.Gaussian(1.0)), eb.SparseCholesky()
    with pytest.raises(ValueError, match="quadrature"):
        eb.solve(prior, [condition], eb.GaussNewton(linear_solver=solver))


def test_points_must_be_known():
    prior, conditions = elliptic(10)

    def solve(points):
        other = eqx.tree_at(lambda c: c.points, conditions[0], points)
        solver = eb.GaussNewton(linear_solver=eb.SparseCholesky())
        return eb.solve(prior, [other, conditions[1]], solver).weights

    with pytest.raises(ValueError, match=r"points of condition .* are traced"):
        jax.jit(solve)(conditions[0].points)


def test_radii():
    with pytest.raises(ValueError, match="`rho` and `rho_conditions` must be greater"):
        eb.SparseCholesky(rho=(0.5, 3.0))


def test_coefficients_that_are_zero():
    # The second condition's derivative is in its operator, with a coefficient that
    # happens to vanish at this value of a parameter.
    def stated(c):
        prior, (pde, boundary) = elliptic(60)
        robin = lambda u, x: u.value + c * u.d(0)
        there = eb.Condition(robin, boundary.points, nugget=1e-6)
        return prior, [pde, there]

    solver = eb.GaussNewton(linear_solver=eb.SparseCholesky())
    robin = eb.solve(*stated(jnp.zeros(())), solver)(TEST_POINTS)
    dirichlet = eb.solve(*elliptic(60))(TEST_POINTS)
    close(robin, np.asarray(dirichlet), 2e-2)


def test_chosen_where_there_are_many_points(monkeypatch):
    # As if few were many.
    monkeypatch.setattr("eqx_bilevel._linear_solver._MANY", 30)
    prior, conditions = elliptic(24)
    chosen = lambda *problem: type(eb.solve(*problem).linear_solver)
    smooth = eb.GaussianProcess(eb.Gaussian(0.3))
    assert chosen(prior, conditions) == eb.SparseCholesky
    assert chosen(prior, conditions[:1]) == lx.Cholesky
    assert chosen(smooth, conditions) == lx.Cholesky
    # And as if there were little memory: for a matrix of 31 targets and no more.
    with monkeypatch.context() as patch:
        memory = dict(SC_PHYS_PAGES=8, SC_PAGE_SIZE=8 * 31**2)
        patch.setattr("os.sysconf", memory.get)
        assert _most_dense() == 31
    monkeypatch.setattr("eqx_bilevel._linear_solver._MANY", 8000)
    monkeypatch.setattr("eqx_bilevel._linear_solver._most_dense", lambda: 31)
    assert chosen(prior, conditions) == eb.SparseCholesky
    assert chosen(smooth, conditions) == eb.MatrixFree
    assert chosen(smooth, conditions[:1]) == lx.Cholesky


def test_learn_with_some_of_the_points():
    prior, conditions = nonlinear({**PARAMETERS, "lengthscale": 0.2})
    noisy = eb.Condition(value, TEST_POINTS, noise=eb.Positive(0.5), name="data")
    objective = eb.ValidationResidual(SQUARE.interior(30, key=jax.random.key(5)))
    sizes = []

    def count(progress):
        sizes.append([len(c.points) for c in progress.conditions])

    learned = eb.learn(
        prior,
        [*conditions, noisy],
        objective,
        subset=55,
        scale_search=False,
        steps=3,
        callback=count,
    )
    assert sizes[0] == [40, 14, 2]
    assert [len(c.points) for c in learned.conditions] == [120, 40, 5]
    assert [len(c.points) for c in learned.solution.conditions] == [120, 40, 5]
    assert not np.isclose(eb.unwrap(learned.conditions[2].noise), 0.5)
    again = eb.solve(learned.prior, learned.conditions)
    close(learned.solution(TEST_POINTS), np.asarray(again(TEST_POINTS)), 1e-6)
    assert learned.objective < objective(eb.solve(prior, [*conditions, noisy]))
