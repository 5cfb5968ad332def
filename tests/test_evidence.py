import functools as ft

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
import scipy.stats

from .helpers import (
    additive,
    averages,
    burgers,
    central_difference,
    dot,
    frozen,
    implicit,
    moved,
    random_direction,
    relative_error,
    tight,
    truth_of,
    value,
)


#
# Linear conditions: nothing is approximate
#


times = jnp.linspace(0.0, 3.0, 11)[:, None]


def _both(u, x):
    return jnp.stack([u.value, u.d(0)])


def _measured(x):
    return jnp.stack([jnp.sin(2 * x[0]) + 0.3, 2 * jnp.cos(2 * x[0])])


def _wavy(key=0):
    noise = 0.1 * jax.random.normal(jax.random.key(key), (len(times), 2))
    return jax.vmap(_measured)(times) + noise


def _linear(targets, points=times, lengthscale=0.8, noise=0.1):
    prior = eb.GaussianProcess(1.7 * eb.Gaussian(lengthscale), mean=0.2)
    start = eb.Condition(value, jnp.array([[-0.5]]), -0.5, nugget=1e-6, name="start")
    data = eb.Condition(_both, points, targets, noise=noise, name="data")
    return prior, [start, data]


def _covariance(lengthscale, variance):
    # Of values and derivatives of a Gaussian process, by hand.
    x = np.concatenate([[-0.5], np.asarray(times[:, 0])])
    r = (x[:, None] - x[None, :]) / lengthscale
    k = variance * np.exp(-0.5 * r**2)
    kd = k * r / lengthscale  # derivative in the second argument
    dd = k * (1 - r**2) / lengthscale**2
    whole = np.block([[k, kd], [kd.T, dd]])
    n = len(x)
    order = [0] + [i + j * n for i in range(1, n) for j in (0, 1)]
    return whole[np.ix_(order, order)]


def test_evidence_is_the_density_of_the_targets():
    targets = _wavy()
    found = eb.NegativeLogEvidence()(eb.solve(*_linear(targets)))
    covariance = _covariance(0.8, 1.7)
    gamma = [1.7e-6] + [0.01] * (2 * len(times))
    mean = np.array([0.2] + [0.2, 0.0] * len(times))
    density = scipy.stats.multivariate_normal(mean, covariance + np.diag(gamma))
    data = np.concatenate([[-0.5], np.asarray(targets).reshape(-1)])
    np.testing.assert_allclose(found, -density.logpdf(data), rtol=1e-10)


@pytest.mark.parametrize("num_folds", [None, 11, 4, 2])
def test_left_out_points_are_predicted_from_the_rest(num_folds):
    targets, num = _wavy(), num_folds or len(times)
    solution = eb.solve(*_linear(targets))
    squares, density = 0.0, 0.0
    for i in range(num):
        fold = np.arange(len(times)) % num == i
        prior, conditions = _linear(targets[~fold], times[~fold])
        rest = eb.solve(prior, conditions)
        mean = rest.apply(_both, times[fold])
        squares += 0.5 * np.sum((targets[fold] - mean) ** 2)
        # The fold's density is the ratio of two evidences.
        both = _linear(
            jnp.concatenate([targets[~fold], targets[fold]]),
            jnp.concatenate([times[~fold], times[fold]]),
        )
        evidence = eb.NegativeLogEvidence()
        density += evidence(eb.solve(*both)) - evidence(rest)
    if num_folds is None:  # All of the data, given the rest.
        start = eb.solve(_linear(targets)[0], _linear(targets)[1][:1])
        found = eb.NegativeLogEvidence("data")(solution)
        given = evidence(solution) - evidence(start)
        np.testing.assert_allclose(found, given, rtol=1e-8)
        found = eb.NegativeLogEvidence(["start", "data"])(solution)
        np.testing.assert_allclose(found, evidence(solution), rtol=1e-8)
    by_squares = eb.CrossValidation("data", num_folds)(solution)
    by_density = eb.NegativeLogPredictive("data", num_folds)(solution)
    np.testing.assert_allclose(by_squares, squares, rtol=1e-8)
    np.testing.assert_allclose(by_density, density, rtol=1e-8)


@pytest.mark.parametrize(
    "objective", [eb.NegativeLogEvidence(), eb.NegativeLogPredictive("data")]
)
def test_noise_is_learned(objective):
    # Fifty measurements with an error of 0.1 tell its size to about a tenth.
    x = jnp.linspace(0.0, 6.0, 50)[:, None]
    error = 0.1 * jax.random.normal(jax.random.key(3), (50,))
    prior = eb.GaussianProcess(eb.Scaled(eb.Gaussian(1.0), 1.0))
    noise = eb.Positive(1.0)
    y = jnp.sin(2 * x[:, 0]) + error
    data = eb.Condition(value, x, y, noise=noise, name="data")
    learned = eb.learn(prior, [data], objective)
    found = eb.unwrap(learned.conditions[0].noise)
    rms = jnp.sqrt(jnp.mean(error**2))
    assert 0.75 < found / rms < 1.25
    assert learned.converged and learned.objective < 0
    # The optimum is one: nearby values are worse.
    for factor in (0.9, 1.1):
        other = eqx.tree_at(lambda c: c.noise, data, jnp.asarray(factor * found))
        assert objective(eb.solve(learned.prior, [other])) > learned.objective


#
# Nonlinear ones, against the oracle and its differences
#


examples = dict(additive=additive, burgers=burgers, averages=averages)
objectives = dict(
    evidence=eb.NegativeLogEvidence(),
    squares=eb.CrossValidation(num_folds=5),
    density=eb.NegativeLogPredictive(num_folds=5),
    given=eb.NegativeLogEvidence("conditions[0]"),
)


def _judgements(oracle, stated, y, w):
    jacobian = jax.jacfwd(oracle.misfit)(y)
    matrix = jacobian @ stated.gram @ jacobian.T + jnp.diag(stated.gamma)
    # The first part is what the linearised problem's minimum is, also away from y.
    evidence = 0.5 * w @ matrix @ w
    evidence += 0.5 * jnp.linalg.slogdet(2 * jnp.pi * matrix)[1]
    # Predictions of a fold by the textbook: from the conditions that are left.
    rhs = matrix @ w
    n = len(oracle.conditions[0].points)
    q = oracle.residuals(y)[0].size // n
    squares = density = 0.0
    given = 0.0
    for i in range(6):
        fold = np.repeat((np.arange(n) % 5 == i) | (i == 5), q)
        fold = np.concatenate([fold, np.zeros(len(rhs) - len(fold), bool)])
        rest = ~fold
        across = jnp.linalg.solve(
            matrix[np.ix_(rest, rest)], matrix[np.ix_(rest, fold)]
        )
        error = rhs[fold] - across.T @ rhs[rest]
        left = matrix[np.ix_(fold, fold)] - matrix[np.ix_(fold, rest)] @ across
        its_density = 0.5 * error @ jnp.linalg.solve(left, error)
        its_density += 0.5 * jnp.linalg.slogdet(2 * jnp.pi * left)[1]
        if i == 5:  # All of them.
            given = its_density
        else:
            squares += 0.5 * error @ error
            density += its_density
    return jnp.stack([evidence, squares, density, given])


@ft.cache
def _truth(name):
    example = examples[name]
    oracle, stated, y, w = truth_of(name)
    jacobian = jax.jacfwd(oracle.misfit)(y)
    square = w @ (jacobian @ (stated.gram @ (jacobian.T @ w)) + stated.gamma * w)
    assert relative_error(0.5 * square, oracle.objective(stated, y, w)) < 1e-8

    @eqx.filter_jit
    def truths(theta):
        oracle = example.oracle(theta)
        stated = oracle.stated()
        exact = _judgements(oracle, stated, *oracle.newton(stated, y, w))
        _, w_fixed = oracle.linearised(stated, y)
        return jnp.stack([exact, _judgements(oracle, stated, y, w_fixed)])

    direction = random_direction(example.theta, jax.random.key(7))
    at = lambda step: truths(moved(example.theta, direction, step))
    return direction, at(0.0)[0], central_difference(at, 3e-5)


@pytest.mark.parametrize("name", examples)
@pytest.mark.parametrize("which", objectives)
def test_nonlinear_conditions(name, which):
    example, objective = examples[name], objectives[which]
    direction, values, (exact, fixed) = _truth(name)
    i = list(objectives).index(which)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def judged(theta, adjoint):
        return objective(eb.solve(*example.make(theta), tight, adjoint=adjoint))

    found, gradient = judged(example.theta, implicit)
    assert relative_error(found, values[i]) < 1e-8
    assert relative_error(dot(gradient, direction), exact[i]) < 1e-6
    _, gradient = judged(example.theta, frozen)
    assert relative_error(dot(gradient, direction), fixed[i]) < 1e-6


def test_second_derivatives():
    # `hessian` of the evidence, against differences of its gradient.
    targets = _wavy()

    @eqx.filter_jit
    def evidence(log_theta):
        lengthscale, noise = jnp.exp(log_theta)
        problem = _linear(targets, lengthscale=lengthscale, noise=noise)
        return eb.NegativeLogEvidence()(eb.solve(*problem))

    theta = jnp.log(jnp.array([0.8, 0.1]))
    hessian = jax.hessian(evidence)(theta)
    for i in range(2):
        at = lambda h, i=i: jax.grad(evidence)(theta.at[i].add(h))
        assert relative_error(hessian[i], central_difference(at, 1e-3)) < 1e-7


#
# Other objectives
#


def test_sums():
    solution = eb.solve(*_linear(_wavy()))
    squares, evidence = eb.CrossValidation("data"), eb.NegativeLogEvidence()
    validation = eb.ValidationResidual(times + 0.1, "data", target=_measured)
    one = validation + 2.0 * squares
    assert isinstance(one, eb.AbstractLeastSquaresObjective)
    expected = validation(solution) + 2 * squares(solution)
    np.testing.assert_allclose(one(solution), expected, rtol=1e-12)
    two = one + 0.5 * evidence
    assert not isinstance(two, eb.AbstractLeastSquaresObjective)
    expected = expected + 0.5 * evidence(solution)
    np.testing.assert_allclose(two(solution), expected, rtol=1e-12)
    assert two.readings(solution.conditions)
    with pytest.raises(ValueError, match="not negative, got -1.0"):
        -1.0 * evidence


def test_function_as_objective():
    # A prior so narrow that it decides.
    def log_normal(solution):
        lengthscale = eb.unwrap(solution.prior).kernel.lengthscale
        return 0.5e6 * jnp.log(lengthscale / 0.9) ** 2

    _, conditions = _linear(_wavy())
    prior = eb.GaussianProcess(eb.Gaussian(0.5))
    objective = eb.NegativeLogEvidence() + eb.Objective(log_normal)
    learned = eb.learn(prior, conditions, objective)
    lengthscale = eb.unwrap(learned.prior).kernel.lengthscale
    assert abs(lengthscale - 0.9) < 1e-3


class _Slope(eqx.Module):
    slope: jax.Array

    def __call__(self, x):
        return jnp.exp(self.slope * x[0])


def test_hyperprior():
    prior, conditions = _linear(_wavy(), noise=eb.Positive(0.1))
    known = eb.NegativeLogHyperprior(prior, conditions, std=0.5)
    np.testing.assert_array_equal(known(eb.solve(prior, conditions)), 0.0)
    # Twice the lengthscale, half the noise, and another mean.
    other, others = _linear(_wavy(), lengthscale=1.6, noise=eb.Positive(0.05))
    other = eqx.tree_at(lambda p: p.mean, other, jnp.asarray(0.7))
    found = known(eb.solve(other, others))
    expected = 0.5 * (2 * np.log(2) ** 2 + 0.5**2) / 0.5**2
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Of a kernel with another scale, which is one number more.
    kernel = eb.Gibbs(_Slope(jnp.array(0.5)))
    other = eb.GaussianProcess(eb.rescale(kernel, 1.0))
    known = eb.NegativeLogHyperprior(other, conditions)
    args = eb.GaussianProcess(kernel), conditions, eb.NegativeLogEvidence() + known
    with pytest.raises(ValueError, match="knows 3 hyperparameter.*but there are 2"):
        eb.learn(*args, steps=1, scale_search=False)
    with pytest.raises(ValueError, match="finite positive number, got 0"):
        eb.NegativeLogHyperprior(prior, conditions, std=0)


def test_hold_out():
    targets = _wavy()
    _, (start, data) = _linear(targets)
    kept, held = eb.hold_out(data, 0.3, key=jax.random.key(0))
    assert kept.points.shape == (8, 1) and held.points.shape == (3, 1)
    points = jnp.concatenate([kept.points, held.points])
    both = jnp.concatenate([kept.target, held.target])
    order = jnp.argsort(points[:, 0])
    np.testing.assert_array_equal(points[order], times)
    np.testing.assert_array_equal(both[order], targets)
    prior, _ = _linear(targets)
    solution = eb.solve(prior, [start, kept])
    error = solution.apply(_both, held.points) - held.target
    np.testing.assert_allclose(held(solution), 0.5 * jnp.sum(error**2), rtol=1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda data: eb.CrossValidation("dat"),
            "`CrossValidation` is about condition 'dat'",
        ),
        (lambda data: eb.CrossValidation("data", 1), "between 2 and"),
        (lambda data: eb.NegativeLogPredictive("data", 12), "which is 11, got 12"),
        (lambda data: eb.Objective(lambda s: s.weights), "one number"),
        (
            lambda data: eb.hold_out(data, 0.01, key=jax.random.key(0))[1],
            "of 11",
        ),
    ],
)
def test_mistakes(wrong, message):
    prior, conditions = _linear(_wavy())
    with pytest.raises(ValueError, match=message):
        eb.learn(prior, conditions, wrong(conditions[1]), steps=1)


def test_least_squares_solver_needs_squares():
    prior, conditions = _linear(_wavy())
    solver = optx.LevenbergMarquardt(1e-3, 1e-3)
    with pytest.raises(ValueError, match="no sum of squares"):
        eb.learn(prior, conditions, eb.NegativeLogEvidence(), solver)


#
# Without a matrix
#


SYSTEMS = dict(
    sparse=eb.SparseCholesky((1e3, 1e3), rho_conditions=2.0, rtol=1e-11),
    # Of too low a rank to be all there is.
    matrix_free=eb.MatrixFree(rank=20, rtol=1e-11),
)
PLACES = np.random.default_rng(0).random((50, 2))


def _at(parameters, linear_solver, objective):
    steep = lambda u, x: u.value + 0.1 * u.d(0)
    kernel = parameters["variance"] * eb.Matern(parameters["lengthscale"], nu=3.5)
    conditions = [
        eb.Condition(value, PLACES[:20], lambda x: x[0], noise=0.1),
        eb.Condition(
            steep, PLACES[20:], lambda x: jnp.sin(5 * x[1]), noise=parameters["noise"]
        ),
    ]
    solver = eb.GaussNewton(linear_solver=linear_solver)
    return objective(eb.solve(eb.GaussianProcess(kernel), conditions, solver))


@pytest.mark.parametrize("name", SYSTEMS)
def test_evidence_without_a_matrix(name, monkeypatch):
    parameters = dict(variance=1.5, lengthscale=0.6, noise=0.2)
    parameters = jax.tree.map(jnp.asarray, parameters)

    def evidence(linear_solver, num_probes):
        objective = eb.NegativeLogEvidence(num_probes=num_probes)
        fn = lambda p: _at(p, linear_solver, objective)
        return jax.jit(jax.value_and_grad(fn))(parameters)

    exact, slope = evidence(lx.Cholesky(), 1)
    # With few random vectors.
    found, estimate = evidence(SYSTEMS[name], 16)
    assert abs(found - exact) < 1.0
    for key in parameters:
        assert abs(estimate[key] - slope[key]) < 0.3 * abs(slope[key]) + 1
    # And if they are an orthogonal basis then nothing is random.
    basis = lambda key, shape, dtype: np.sqrt(50) * jnp.eye(50, dtype=dtype)
    monkeypatch.setattr(jax.random, "normal", basis)
    found, estimate = evidence(SYSTEMS[name], 50)
    assert np.isclose(found, exact, rtol=1e-8)
    for key in parameters:
        assert np.isclose(estimate[key], slope[key], rtol=1e-5), key
