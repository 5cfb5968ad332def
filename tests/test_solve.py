import functools as ft

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from eqx_bilevel._subset import restored, thinned
from scipy.integrate import solve_bvp

from .helpers import (
    Arctan,
    eikonal,
    examples,
    forcing,
    mild,
    Oracle,
    relative_error,
    strong,
    truth_of,
    value,
)


tight = eb.GaussNewton(rtol=1e-12, atol=1e-12)
names = pytest.mark.parametrize("name", examples)


@ft.cache
def solved(name: str):
    example = examples[name]
    return eb.solve(*example.make(example.theta), tight), *truth_of(name)


# Of something in the order of the library's rows, which are sorted.
def in_order(solution, vector):
    parts, start = {}, 0
    for rows in solution._problem.rows:
        stop = start + rows.target.size
        parts[rows.name] = vector[start:stop]
        start = stop
    return by_condition(solution, parts)


def by_condition(solution, parts):
    default = [f"conditions[{i}]" for i in range(len(solution.conditions))]
    order = [c.name or d for c, d in zip(solution.conditions, default)]
    assert set(order) == set(parts)
    return jnp.concatenate([parts[name].reshape(-1) for name in order])


class Everything(eqx.Module):
    # All that is in the oracle's jets.
    axes: tuple = eqx.field(static=True)

    def __call__(self, u, x):
        jets = u if isinstance(u, dict) else {"": u}
        return [jets[k].d(*axes) for k, each in self.axes for axes in each]


@eqx.filter_jit
def predicted(oracle, stated, y, w, operators):
    return [oracle.predict(stated, y, w, operator) for operator in operators]


@names
def test_solution(name):
    solution, oracle, stated, y, w = solved(name)
    assert solution.result == eb.RESULTS.successful
    # Away from the points: values, derivatives, operators.
    x = examples[name].validation
    operators = [Everything(oracle.jets)] + [c.operator for c in oracle.conditions]
    truths = predicted(oracle, stated, y, w, operators)
    for operator, truth in zip(operators, truths):
        pairs = zip(
            jax.tree.leaves(solution.apply(operator, x)), jax.tree.leaves(truth)
        )
        assert all(relative_error(found, known) < 1e-8 for found, known in pairs)
    # Other ways to ask.
    names = [k for k, _ in oracle.jets]
    all_of = lambda found: found if isinstance(found, dict) else {"": found}
    pairs = [(k, axes) for k, each in oracle.jets for axes in each]
    for (k, axes), truth in zip(pairs, truths[0]):
        if all(axes in dict(oracle.jets)[other] for other in names):
            found = all_of(solution.d(*axes)(x))[k]
            assert relative_error(found, truth) < 1e-8
        if axes == ():
            assert relative_error(all_of(solution(x))[k], truth) < 1e-8
            assert relative_error(all_of(solution(x[0]))[k], truth[0]) < 1e-7


@names
def test_weights_and_statistics(name):
    solution, oracle, stated, y, w = solved(name)
    assert relative_error(in_order(solution, solution.weights), w) < 1e-7
    misfit = oracle.misfit(y)
    found = by_condition(solution, solution.residuals())
    assert relative_error(found, misfit) < 1e-6
    objective = oracle.objective(stated, y, w)
    assert relative_error(solution.stats["objective"], objective) < 1e-9
    norm = oracle.rkhs_norm(stated, y, w)
    assert relative_error(solution.stats["rkhs_norm"], norm) < 1e-9
    root_mean_square = jnp.sqrt(jnp.mean(misfit**2))
    assert relative_error(solution.stats["residual_norm"], root_mean_square) < 1e-7


@names
def test_spectrum(name):
    solution, oracle, stated, y, _ = solved(name)
    step = lambda y: oracle.linearised(stated, y)[0]
    eigenvalues = jnp.linalg.eigvals(jax.jit(jax.jacfwd(step))(y))
    scale = jnp.max(jnp.abs(eigenvalues))
    assert jnp.max(jnp.abs(eigenvalues.imag)) < 1e-6 * scale
    smallest, largest = solution.spectrum()
    assert abs(smallest - jnp.min(eigenvalues.real)) < 1e-4 * scale
    assert abs(largest - jnp.max(eigenvalues.real)) < 1e-4 * scale
    assert relative_error(solution.spectral_radius(), scale) < 1e-4


def test_the_strong_problems_are_strong():
    for name in ("strong", "additive", "burgers", "pendulum"):
        assert 0.3 < solved(name)[0].spectral_radius() < 0.95
    assert solved("mild")[0].spectral_radius() < 0.05


@names
def test_condition_number(name):
    solution, oracle, stated, y, _ = solved(name)
    jacobian = jax.jacfwd(oracle.misfit)(y)
    matrix = jacobian @ stated.gram @ jacobian.T + jnp.diag(stated.gamma)
    scale = jnp.sqrt(jnp.diagonal(matrix))
    truth = jnp.linalg.cond(matrix / jnp.outer(scale, scale))
    assert truth / 2 < solution.condition_number() < 1.01 * truth


#
# Linear problems
#


def kriging(length, targets, points, x, noise):
    # Observations of u'' - 2 u + 0.5, with a Gaussian kernel written out.
    def kernel(a, b):
        s = (a - b) / length
        k = jnp.exp(-0.5 * s**2)
        second = (s**2 - 1) / length**2 * k
        fourth = (s**4 - 6 * s**2 + 3) / length**4 * k
        return k, second, fourth

    pairs = lambda a, b: kernel(a[:, None], b[None, :])
    k, second, fourth = pairs(points, points)
    gram = fourth - 4 * second + 4 * k + noise**2 * jnp.eye(len(points))
    # The prior mean is 0.3.
    w = jnp.linalg.solve(gram, targets - 0.5 + 0.6)
    k, second, _ = pairs(x, points)
    rows = second - 2 * k
    inverse = jnp.linalg.solve(gram, rows.T)
    variance = 1 - jnp.sum(rows * inverse.T, axis=1)
    return 0.3 + rows @ w, jnp.sqrt(variance)


def affine(u, x):
    return u.d(0, 0) - 2 * u.value + 0.5


def linear_problem(length, targets, points, x, noise, adjoint=eb.FixedPointAdjoint()):
    condition = eb.Condition(affine, points[:, None], targets, noise=noise)
    prior = eb.GaussianProcess(eb.Gaussian(length), 0.3)
    solution = eb.solve(prior, [condition], adjoint=adjoint)
    return solution(x[:, None]), solution.std(x[:, None]), solution.stats["num_steps"]


def test_linear():
    points, x = jnp.linspace(0.0, 1.0, 9), jnp.linspace(0.02, 0.9, 5)
    args = (jnp.asarray(0.3), jnp.sin(7 * points), points, x, jnp.asarray(0.1))
    mean, std, num_steps = linear_problem(*args)
    known_mean, known_std = kriging(*args)
    assert num_steps == 1
    assert relative_error(mean, known_mean) < 1e-11
    assert relative_error(std, known_std) < 1e-9

    def gradient(fn, argnums):
        def total(*args):
            mean, std, *_ = fn(*args)
            return jnp.sum(jnp.sin(mean)) + jnp.sum(std**2)

        return jax.jit(jax.grad(total, argnums))(*args)

    truth = gradient(kriging, (0, 1, 2, 3, 4))
    for found, known in zip(gradient(linear_problem, (0, 1, 2, 3, 4)), truth):
        assert relative_error(found, known) < 1e-9
    # With linear conditions the frozen gradient is exact.
    frozen = ft.partial(linear_problem, adjoint=eb.FrozenAdjoint())
    assert relative_error(gradient(frozen, 0), truth[0]) < 1e-9


#
# The way to the solution
#


def arctan_problem(mean, noise):
    x = jnp.linspace(0.0, 1.0, 8)[:, None]
    condition = eb.Condition(Arctan(), x, jnp.cos(3 * x[:, 0]), noise=noise)
    prior = eb.GaussianProcess(eb.Gaussian(jnp.asarray(0.2)), mean)
    return prior, [condition]


@pytest.mark.parametrize("mean, noise", [(1.0, 0.1), (1.0, 0.01), (2.0, 0.01)])
def test_globalisation(mean, noise):
    problem = arctan_problem(jnp.asarray(mean), jnp.asarray(noise))
    oracle = Oracle(*problem, {"": ((),)})
    stated = stated_once(oracle)
    # Full steps lead nowhere, not in a hundred of them.
    step = lambda y, _: (oracle.linearised(stated, y)[0],) * 2
    _, steps = jax.jit(lambda y: jax.lax.scan(step, y, length=100))(stated.mean)
    assert jnp.max(jnp.abs(steps[-1] - steps[-2])) > 0.1
    solution = eb.solve(*problem, tight)
    assert solution.result == eb.RESULTS.successful
    # The gradient of the objective (1), in the space of the kernel, is zero.
    y = solution(oracle.points)
    gradient, _ = oracle.optimality(stated, y, -oracle.misfit(y) / stated.gamma)
    assert jnp.max(jnp.abs(gradient)) < 1e-7 * jnp.max(jnp.abs(y))
    # And the undamped steps would stay there.
    assert jnp.max(jnp.abs(oracle.linearised(stated, y)[0] - y)) < 1e-9


# The eigenvalue of largest absolute value is -0.13 and -1.5: in the second, full steps
# move away from the solution. Rounding hides changes of the objective long before the
# tolerance is reached.
@pytest.mark.parametrize(
    "strength, amplitude", [(30.0, 4.0), (100.0, 5.0), (100.0, 6.0)]
)
def test_success_means_converged(strength, amplitude):
    theta = {
        **mild.theta,
        "lengthscale": jnp.asarray(0.8),
        "strength": jnp.asarray(strength),
        "targets": forcing(mild.theta["points"], amplitude, strength),
    }
    solution = eb.solve(*mild.make(theta))
    assert solution.result == eb.RESULTS.successful
    oracle = mild.oracle(theta)
    stated = stated_once(oracle)
    x = oracle.points
    y = jnp.stack([solution(x), solution.d(0, 0)(x), solution.d(1, 1)(x)], 1)
    y = y.reshape(-1)
    w = -oracle.misfit(y) / stated.gamma
    exact, _ = newton(oracle, stated, y, w)
    assert relative_error(y[::3], exact[::3]) < 1e-8


newton = eqx.filter_jit(lambda *args: Oracle.newton(*args, num_steps=10))
stated_once = eqx.filter_jit(Oracle.stated)


def test_warm_start():
    solution = solved("strong")[0]
    theta = {**strong.theta, "strength": jnp.asarray(4.01)}
    problem = strong.make(theta)
    cold = eb.solve(*problem)
    for initial in (solution, Before(solution)):
        warm = eb.solve(*problem, initial=initial)
        assert warm.stats["num_steps"] < cold.stats["num_steps"]
        x = strong.validation
        assert relative_error(warm(x), cold(x)) < 1e-6
    # From the solution itself.
    again = eb.solve(*strong.make(strong.theta), initial=solution)
    assert again.stats["num_steps"] == 1


class Before(eqx.Module):
    # A previous solution, as a function of which the solver knows nothing.
    solution: eb.Solution

    def __call__(self, x):
        return self.solution(x)


def test_max_steps():
    problem = strong.make(strong.theta)
    solution = eb.solve(*problem, tight, max_steps=3, throw=False)
    assert solution.result == eb.RESULTS.nonlinear_max_steps_reached
    assert solution.stats["num_steps"] == 3
    assert solution.stats["max_steps"] == 3
    assert jnp.all(jnp.isfinite(solution.weights))
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        eb.solve(*problem, tight, max_steps=3)


def test_conjugate_gradients():
    # `test_gradients` has the derivatives.
    linear_solver = lx.CG(rtol=1e-13, atol=1e-13, max_steps=500)
    solver = eb.GaussNewton(1e-10, 1e-10, linear_solver=linear_solver)
    solution = eb.solve(*strong.make(strong.theta), solver)
    found = solution(strong.validation)
    (truth,) = predicted(*truth_of("strong"), [value])
    assert relative_error(found, truth) < 1e-7


#
# Noise, nugget and weight
#


observed = jnp.linspace(0.0, 1.0, 6)[:, None]
targets = jnp.cos(3 * observed[:, 0])


class Reading(eqx.Module):
    def __call__(self, u, x):
        return u.value + u.value**2 / 5 + u.d(0) / 9


def observe(x, weight=1.0, **kwargs):
    prior = eb.GaussianProcess(eb.Gaussian(0.3))
    condition = eb.Condition(Reading(), observed, targets, weight=weight, **kwargs)
    return eb.solve(prior, [condition], tight)(x)


def test_noise_and_weight():
    x = jnp.linspace(0.05, 0.9, 7)[:, None]
    weighted = observe(x, noise=0.6, weight=9.0)
    assert relative_error(weighted, observe(x, noise=0.2)) < 1e-11
    assert relative_error(weighted, observe(x, noise=0.6)) > 1e-2
    weighted = observe(x, nugget=0.9, weight=9.0)
    assert relative_error(weighted, observe(x, nugget=0.1)) < 1e-11
    # Of a derivative at one point, the prior variance is 1 / 0.09. At the prior mean
    # the operator is u + u' / 9.
    absolute = (0.1 * (1 + 1 / 81 / 0.09)) ** 0.5
    assert relative_error(weighted, observe(x, noise=absolute)) < 1e-11
    # At u = x, it is (1 + 2 x / 5) u + u' / 9.
    mean_square = jnp.mean((1 + 2 * observed / 5) ** 2)
    absolute = (0.1 * (mean_square + 1 / 81 / 0.09)) ** 0.5
    referred = observe(x, nugget=0.1, reference=lambda x: x[0])
    assert relative_error(referred, observe(x, noise=absolute)) < 1e-11
    assert relative_error(referred, weighted) > 1e-3


def correlated(n):
    root = jnp.tril(jnp.cos(3 * jnp.arange(1.0 * n * n)).reshape(n, n))
    return 0.02 * (root @ root.T + 0.1 * jnp.eye(n))


def test_noise_of_each_point():
    x = jnp.linspace(0.05, 0.9, 7)[:, None]
    each = jnp.array([0.1, 0.2, 0.4, 0.1, 0.3, 0.2])
    prior = eb.GaussianProcess(eb.Gaussian(0.3))
    single = [
        eb.Condition(Reading(), x[None], y, noise=noise)
        for x, y, noise in zip(observed, targets, each)
    ]
    truth = eb.solve(prior, single, tight)
    assert relative_error(observe(x, noise=each), truth(x)) < 1e-10
    matrix = jnp.diag(each**2)
    assert relative_error(observe(x, noise=matrix), truth(x)) < 1e-10
    weighted = observe(x, noise=3 * each, weight=9.0)
    assert relative_error(weighted, truth(x)) < 1e-10


def test_correlated_noise():
    # Two numbers at each point. The same as their combinations with independent errors.
    operator = lambda u, x: [u.value + u.value**2 / 5, u.d(0) / 4]
    prior = eb.GaussianProcess(eb.Gaussian(0.3))
    noise = correlated(12)
    known = jnp.stack([targets, jnp.sin(observed[:, 0])], axis=1)

    def solved(noise, **kwargs):
        target = [known[:, 0], known[:, 1]]
        condition = eb.Condition(operator, observed, target, noise=noise)
        return eb.solve(prior, [condition], tight, **kwargs)

    solution = solved(noise)
    root = jnp.linalg.cholesky(noise)
    inverse = jax.scipy.linalg.solve_triangular(root, jnp.eye(12), lower=True)

    class Combined(eqx.Module):
        def __call__(self, u, x):
            # The last coordinate says how much of each.
            return x[1] * (u.value + u.value**2 / 5) + x[2] * u.d(0) / 4

    points = jnp.concatenate(
        [
            jnp.broadcast_to(observed, (12, 6, 1)),
            inverse.reshape(12, 6, 2),
        ],
        axis=-1,
    )
    combined = eb.Condition(
        Combined(),
        points,
        inverse @ known.reshape(-1),
        quadrature=jnp.ones(6),
        noise=1.0,
    )
    lifted = eb.GaussianProcess(eb.Subspace(eb.Gaussian(0.3), 0))
    truth = eb.solve(lifted, [combined], tight)
    x = jnp.linspace(0.05, 0.9, 7)[:, None]
    lifted_x = jnp.concatenate([x, jnp.zeros((7, 2))], axis=1)
    assert relative_error(solution(x), truth(lifted_x)) < 1e-9
    assert relative_error(solution.std(x), truth.std(lifted_x)) < 1e-7
    objective = solution.stats["objective"], truth.stats["objective"]
    assert jnp.abs(objective[0] - objective[1]) < 1e-8 * objective[1]
    loss = lambda noise: jnp.sum(solved(noise)(x) ** 2)
    change = jnp.diag(jnp.linspace(1.0, 2.0, 12)) + 0.3
    _, slope = jax.jvp(loss, (noise,), (change,))
    gradient = jnp.vdot(jax.grad(loss)(noise), change)
    central = (loss(noise + 1e-6 * change) - loss(noise - 1e-6 * change)) / 2e-6
    assert jnp.abs(slope - central) < 1e-6 * jnp.abs(central)
    assert jnp.abs(gradient - central) < 1e-6 * jnp.abs(central)


@pytest.mark.parametrize("noise", (0.2, -0.2))
def test_known_noise_under_a_trace(noise):
    noise = jnp.asarray(noise)

    @jax.jit
    def fn(targets):
        return eb.Condition(value, observed, targets, noise=noise).noise

    if noise > 0:
        assert fn(targets) == noise
    else:
        with pytest.raises(ValueError, match="`noise`"):
            fn(targets)


def test_nugget_is_not_relative_to_the_start():
    solution = solved("eikonal")[0]
    assert eikonal.make(eikonal.theta)[1][0].nugget is not None
    other = eb.solve(
        *eikonal.make(eikonal.theta), tight, initial=lambda x: 2 * x[0] + x[1]
    )
    x = eikonal.validation
    assert relative_error(other(x), solution(x)) < 1e-9
    assert relative_error(other.stats["objective"], solution.stats["objective"]) < 1e-9


def smooth(length, num_points):
    # u'' + u^3 = f.
    points = jnp.linspace(0.0, 1.0, num_points)[:, None]
    ends = jnp.asarray([[0.0], [1.0]])
    u = lambda x: jnp.sin(2 * x[0])
    f = lambda x: -4 * u(x) + u(x) ** 3
    ode = eb.Condition(lambda u, x: u.d(0, 0) + u.value**3, points, f)
    data = eb.Condition(value, ends, u)
    prior = eb.GaussianProcess(eb.Gaussian(length))
    x = jnp.linspace(0.01, 0.98, 9)[:, None]
    solution = eb.solve(prior, [ode, data])
    return solution, relative_error(solution(x), jax.vmap(u)(x))


def test_automatic_nugget():
    eps = float(jnp.finfo(jnp.float64).eps)
    solution, error = smooth(0.3, 10)
    assert jnp.allclose(solution.stats["jitter"], 0.125 * 12 * eps, rtol=1e-12, atol=0)
    assert error < 1e-4
    # It is part of the problem that is solved.
    axes = {"": ((), (0, 0))}
    oracle = Oracle(
        solution.prior, solution.conditions, axes, jitter=solution.stats["jitter"]
    )
    w = in_order(solution, solution.weights)
    misfit = in_order(
        solution,
        jnp.concatenate([r.reshape(-1) for r in solution.residuals().values()]),
    )
    assert jnp.max(jnp.abs(misfit + oracle.stated().gamma * w)) < 1e-9


def test_automatic_nugget_is_raised():
    solution, error = smooth(3.0, 40)
    smallest = 0.125 * 42 * float(jnp.finfo(jnp.float64).eps)
    assert solution.stats["jitter"] > 5 * smallest
    assert solution.stats["jitter"] < 1e-4
    assert jnp.max(jnp.abs(solution.residuals()["conditions[0]"])) < 1e-3
    assert error < 1e-3


def test_no_jitter_where_it_is_not_needed():
    assert solved("mild")[0].stats["jitter"] == 0


@pytest.mark.parametrize(
    "mean, initial, lowest",
    [(None, None, -0.33), (1.0, None, 0.80), (None, lambda x: 1.0, 0.80)],
)
def test_which_of_several_solutions(mean, initial, lowest):
    # The example of the FAQ.
    line = eb.Box(-1.0, 1.0)
    conditions = [
        eb.Condition(
            lambda u, x: -0.1 * u.laplacian - u.value * (1 - u.value),
            line.interior(30, method="grid"),
        ),
        eb.Condition(
            lambda u, x: u.grad @ line.normal(x) + 2 * u.value, line.boundary(2), 1.0
        ),
    ]
    prior = eb.GaussianProcess(eb.Gaussian(0.5), mean)
    found = np.asarray(eb.solve(prior, conditions, initial=initial)(line.grid(41)))
    x = np.linspace(-1, 1, 41)
    reference = solve_bvp(
        lambda x, y: np.stack([y[1], -10 * y[0] * (1 - y[0])]),
        lambda a, b: np.array([-a[1] + 2 * a[0] - 1, b[1] + 2 * b[0] - 1]),
        x,
        np.stack([found, np.gradient(found, x)]),
        tol=1e-8,
    )
    assert reference.success
    assert np.max(np.abs(found - reference.sol(x)[0])) < 1e-5
    assert abs(found.min() - lowest) < 5e-3


def test_noise_at_fewer_points():
    each = jnp.linspace(0.1, 0.6, 6)
    pairs = lambda u, x: [u.value, u.d(0)]
    conditions = [
        eb.Condition(value, observed, targets, noise=each),
        eb.Condition(pairs, observed, noise=correlated(12)),
    ]
    fewer = thinned(conditions, 6)
    chosen = jnp.searchsorted(observed[:, 0], fewer[0].points[:, 0])
    assert len(chosen) == 3
    assert jnp.array_equal(fewer[0].noise, each[chosen])
    blocks = correlated(12).reshape(6, 2, 6, 2)[chosen][:, :, chosen]
    assert jnp.array_equal(fewer[1].noise, blocks.reshape(6, 6))
    for new, old in zip(restored(fewer, conditions), conditions):
        assert eqx.tree_equal(new, old)
    learned = eb.Condition(value, observed, targets, noise=eb.Positive(each))
    with pytest.raises(ValueError, match="`noise` that is learned must be one number"):
        thinned([learned], 3)


def test_wrong_noise():
    prior = eb.GaussianProcess(eb.Matern(0.3, nu=3.5))
    sparse = eb.GaussNewton(linear_solver=eb.SparseCholesky())
    condition = eb.Condition(value, observed, targets, noise=correlated(6), name="a")
    with pytest.raises(ValueError, match="The `noise` of condition 'a' is a matrix"):
        eb.solve(prior, [condition], sparse)
    for noise in (-jnp.ones(6), jnp.full((6, 6), jnp.nan)):
        with pytest.raises(ValueError, match="`noise` must be finite and positive"):
            eb.Condition(value, observed, targets, noise=noise)
    with pytest.raises(ValueError, match="an array of them or a matrix"):
        eb.Condition(value, observed, targets, noise=jnp.ones((1, 1, 1)))
