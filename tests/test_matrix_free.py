"""Linear systems without a matrix, against those with one."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from eqx_bilevel import _jit
from eqx_bilevel._conjugate_gradients import ConjugateGradients
from eqx_bilevel._gram import covariance, Noise
from eqx_bilevel._linear_solver import with_system
from eqx_bilevel._low_rank import low_rank, LowRank

from .helpers import close, points_mesh


def sizes_in(jaxpr):
    # Of everything that is computed, also within loops and the like.
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for leaf in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


SQUARE = eb.Box([0.0, 0.0], [1.0, 1.0])
KEYS = jax.random.split(jax.random.key(0), 4)
INTERIOR = SQUARE.interior(90, key=KEYS[0])
BOUNDARY = SQUARE.boundary(30, key=KEYS[1])
TEST_POINTS = SQUARE.interior(7, key=KEYS[2])
# Averages over squares around these points.
CENTRES = SQUARE.interior(6, key=KEYS[3])
CORNERS = 0.05 * jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
AVERAGED = CENTRES[:, None] + CORNERS[None]


def value(u, x):
    return u.value


def flux(u, x):
    return u.value * u.d(0)


def problem(p):
    # Two unknowns, one of which is a source; an equation that is nonlinear in values
    # and derivatives; averages with noise; coefficients, and a kernel's parameters.
    def equation(u, x):
        bent = u["u"].value ** 3 + u["u"].value * u["u"].d(0)
        return -p["diffusion"] * u["u"].laplacian + bent - u["f"].value

    average = lambda u, x: u["f"].value
    on_boundary = lambda u, x: u["u"].value
    conditions = [
        eb.Condition(equation, INTERIOR, p["source"], nugget=1e-6),
        eb.Condition(on_boundary, BOUNDARY, nugget=1e-6),
        eb.Condition(average, AVERAGED, 1.0, quadrature=jnp.full(4, 0.25), noise=0.01),
    ]
    kernel = p["variance"] * eb.Gaussian(p["lengthscale"])
    priors = dict(u=eb.GaussianProcess(kernel), f=eb.GaussianProcess(eb.Gaussian(0.8)))
    return priors, conditions


PARAMETERS = dict(
    diffusion=jnp.array(1.3),
    source=jnp.array(20.0),
    variance=jnp.array(2.0),
    lengthscale=jnp.array(0.6),
)
MATRIX_FREE = eb.MatrixFree(rank=100)


def solved(p, linear_solver=MATRIX_FREE, **kwargs):
    solver = eb.GaussNewton(rtol=1e-10, linear_solver=linear_solver)
    return eb.solve(*problem(p), solver, **kwargs)


@pytest.fixture(scope="module")
def solutions():
    return solved(PARAMETERS), solved(PARAMETERS, lx.Cholesky())


#
# Conjugate gradients
#


def test_steps_where_the_preconditioner_is_large():
    # It may be 1e12 times the inverse of the largest eigenvalue. Then residuals that
    # are computed anew, and not by the recurrence, are nothing but rounding to it.
    n = 300
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    eigenvalues = np.maximum(np.exp(-0.5 * np.arange(n)), 1e-12)
    wrong = 10.0 ** rng.uniform(-0.5, 0.5, n)
    matrix = jnp.asarray((basis * eigenvalues) @ basis.T)
    inverse = jnp.asarray((basis / (eigenvalues * wrong)) @ basis.T)
    iteration = ConjugateGradients(
        noise=Noise((jnp.zeros(n),)),
        deviations=jnp.ones(n),
        precondition=lambda r: inverse @ r,
        rtol=1e-9,
        max_steps=100,
    )
    rhs = jnp.asarray(basis @ (eigenvalues**0.6 * rng.standard_normal(n)))
    found, num_steps = iteration.solve(lambda w: matrix @ w, rhs, 0 * rhs)
    # In exact arithmetic, eigenvalues within a factor of ten need so many.
    assert 10 < num_steps < 35
    close(matrix @ found, rhs, 1e-8)


#
# The preconditioner
#


def gram(solution):
    blocks, kernels = solution._linearised.functionals, solution._problem.kernels
    return blocks, kernels, np.asarray(covariance(kernels, blocks, blocks))


@pytest.mark.parametrize("nugget", (1e-4, 1e-8, 1e-12))
def test_preconditioner_is_the_inverse(solutions, nugget):
    functionals, kernels, matrix = gram(solutions[1])
    noise = nugget * np.diagonal(matrix)
    found = eqx.filter_jit(low_rank)(kernels, functionals, jnp.asarray(noise), 126)
    inverse = np.stack([found(e) for e in jnp.eye(len(noise))])
    close(inverse, inverse.T, 1e-3)
    # In units in which what it is an inverse of is about the identity.
    root = np.linalg.cholesky(0.5 * (inverse + inverse.T))
    product = root.T @ (matrix + np.diag(noise)) @ root
    eigenvalues = np.linalg.eigvalsh(product)
    limit = 3 if nugget > 1e-9 else 30
    assert eigenvalues.max() < limit * eigenvalues.min()


def test_what_low_rank_leaves(solutions):
    functionals, kernels, matrix = gram(solutions[1])
    rests = []
    for rank in (20, 60):
        noise = 1e-8 * jnp.diagonal(jnp.asarray(matrix))
        found = eqx.filter_jit(low_rank)(kernels, functionals, noise, rank)
        # The diagonal that is added is the noise and the rest of the variance.
        diagonal = 1 / np.asarray(found.root) ** 2
        rest = np.max(((diagonal - noise) / noise)[6:])  # Without averages.
        assert np.isclose(rest, found.rest, rtol=1e-3)
        rests.append(rest)
    assert rests[1] < 0.1 * rests[0]


@pytest.mark.parametrize("rank", (0, 1, 9, 30, 64))
@pytest.mark.parametrize("size", (20, 200))
def test_low_rank_of_so_many_columns(getkey, size, rank):
    # Of all that there is room for, and of more than there are rows.
    normal = lambda *shape: jax.random.normal(getkey(), shape)
    left = normal(size, 64) * 10.0 ** normal(1, 64)
    left = jnp.where(jnp.arange(64)[None] < rank, left, 0)
    root = 10.0 ** normal(size)
    found = eqx.filter_jit(LowRank)(left, root, jnp.zeros(()), jnp.asarray(rank))
    matrix = left @ left.T + jnp.diag(root**-2)
    vector = normal(size)
    close(matrix @ found(vector), vector, 1e-6)
    sign, expected = jnp.linalg.slogdet(matrix)
    assert sign == 1 and np.isclose(found.whitening.log_determinant, expected)


#
# Solutions
#


def test_solution(solutions):
    found, expected = solutions
    assert 0 < found.stats["num_products"] < 20 * found.stats["num_steps"]
    for name in ("u", "f"):
        close(found(TEST_POINTS)[name], expected(TEST_POINTS)[name], 1e-6)
    one, other = (s.apply(lambda u, x: flux(u["u"], x), TEST_POINTS) for s in solutions)
    close(one, other, 1e-5)
    close(found.stats["rkhs_norm"], expected.stats["rkhs_norm"], 1e-5)


def test_error_bars(solutions):
    found, expected = solutions
    for name in ("u", "f"):
        close(found.std(TEST_POINTS)[name], expected.std(TEST_POINTS)[name], 1e-3)
    assert np.isclose(found.spectral_radius(), expected.spectral_radius(), rtol=1e-3)


@pytest.mark.parametrize("adjoint", (eb.FixedPointAdjoint(), eb.FrozenAdjoint()))
def test_gradients(adjoint):
    def objective(p, linear_solver):
        return jnp.sum(solved(p, linear_solver, adjoint=adjoint)(TEST_POINTS)["u"] ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(objective))
    found, expected = (gradient(PARAMETERS, s) for s in (MATRIX_FREE, lx.Cholesky()))
    for name, slope in expected.items():
        assert np.isclose(found[name], slope, rtol=1e-4, atol=1e-5)
    along = lambda p: objective(p, MATRIX_FREE)
    ones = jax.tree.map(jnp.ones_like, PARAMETERS)
    _, forwards = eqx.filter_jit(eqx.filter_jvp)(along, (PARAMETERS,), (ones,))
    assert np.isclose(forwards, sum(expected.values()), rtol=1e-4)


def test_learn():
    prior, conditions = problem({**PARAMETERS, "lengthscale": jnp.array(0.4)})
    validation = SQUARE.interior(20, key=jax.random.key(5))
    objective = eb.ValidationResidual(validation, target=PARAMETERS["source"])
    run = lambda solver: eb.learn(
        prior,
        conditions,
        objective,
        solver=eb.GaussNewton(linear_solver=solver),
        optimiser=optax.adam(0.1),
        scale_search=False,
        steps=4,
    )
    solvers = MATRIX_FREE, lx.Cholesky()
    found, expected = (run(s).history["objective"] for s in solvers)
    assert np.allclose(found, expected, rtol=1e-2) and expected[-1] < 0.8 * expected[0]


def test_no_matrix():
    # Nothing is of the size of the square of the number of points, in the gradient
    # neither.
    num = 600
    points = SQUARE.interior(num, key=jax.random.key(0))
    edge = SQUARE.boundary(num // 4, key=jax.random.key(1))

    def objective(lengthscale):
        operator = lambda u, x: -u.laplacian + u.value**3
        conditions = [eb.Condition(operator, points, 1.0), eb.Condition(value, edge)]
        prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
        solver = eb.GaussNewton(linear_solver=eb.MatrixFree(rank=64))
        return jnp.sum(eb.solve(prior, conditions, solver, throw=False)(TEST_POINTS))

    sizes = list(sizes_in(jax.make_jaxpr(jax.grad(objective))(0.3).jaxpr))
    assert num**2 > max(sizes) > num * 64


def test_rank_that_is_too_small():
    # It converges at the least nugget for which it is large enough.
    prior = eb.GaussianProcess(eb.Gaussian(0.5))
    conditions = [
        eb.Condition(lambda u, x: -u.laplacian + u.value**3, INTERIOR, 1.0),
        eb.Condition(value, BOUNDARY),
    ]
    solve = lambda rank: eb.solve(
        prior, conditions, eb.GaussNewton(linear_solver=eb.MatrixFree(rank))
    )
    small, large = solve(60), solve(120)
    assert small.stats["jitter"] > 10 * large.stats["jitter"]
    close(small(TEST_POINTS), large(TEST_POINTS), 1e-2)


@pytest.mark.parametrize("arguments", (dict(rank=0), dict(rank=-3), dict(max_steps=0)))
def test_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        eb.MatrixFree(**arguments)


#
# Several devices
#


def test_devices_share_it():
    objective = lambda p: jnp.sum(solved(p)(TEST_POINTS)["u"] ** 2)
    fn = eqx.filter_jit(eqx.filter_value_and_grad(objective))
    known = fn(PARAMETERS)
    with jax.set_mesh(points_mesh(2)):
        found = fn(PARAMETERS)
        factor = solved(PARAMETERS)._factor
    assert np.isclose(found[0], known[0], rtol=1e-8)
    for name, slope in known[1].items():
        assert np.isclose(found[1][name], slope, rtol=1e-4, atol=1e-5)
    shares = {shard.data.shape for shard in factor.basis.addressable_shards}
    assert shares == {(63, 100)}


#
# Compiling
#


def test_options_of_the_compiler(monkeypatch):
    # Only at the outermost level, and only where XLA knows them.
    same = np.testing.assert_array_equal
    monkeypatch.setattr(_jit, "_FEWER_MODULES", {"xla_no_such_option": True})
    program, x = _jit.jit(lambda system, x: 2 * x), jnp.arange(3.0)
    monkeypatch.setattr(_jit, "_are_options", _jit._are_options.__wrapped__)
    same(program(eb.MatrixFree(), x), 2 * x)
    monkeypatch.setattr(_jit, "_are_options", lambda: True)
    same(program(lx.Cholesky(), x), 2 * x)
    one = jnp.ones(())
    within = lambda x: program(eb.MatrixFree(), x)
    same(jax.jit(within)(x), 2 * x)
    same(jax.jit(lambda: within(np.ones(())))(), 2 * one)
    same(jax.grad(within)(one), 2 * one)
    same(jax.vmap(within)(x), 2 * x)
    same(jax.lax.map(within, x), 2 * x)
    for fn in (within, lambda x: program.lower(eb.MatrixFree(), x).compile()):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            fn(x)


@pytest.mark.parametrize("solver", (eb.MatrixFree(), eb.SparseCholesky()))
def test_options_that_there_are(solver):
    assert _jit._are_options() and solver.cheap_to_compile


@pytest.mark.parametrize("num,cheap", ((500, True), (501, False)))
def test_options_with_few_conditions(num, cheap):
    x = jnp.linspace(0, 1, num)[:, None]
    conditions = [eb.Condition(lambda u, x: u.value, x)]
    for given in (None, lx.LU()):
        solver = eb.GaussNewton(linear_solver=given)
        system = with_system(solver, eb.GaussianProcess(eb.Gaussian(0.3)), conditions)
        assert system.system.cheap_to_compile == cheap
