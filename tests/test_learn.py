"""The outer problem, on a small one-dimensional one."""

import os
import threading
import warnings
import weakref
from typing import Any

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import threadpoolctl
from eqx_bilevel import _last_solve, _runs, _solve
from eqx_bilevel._checks import functions_as_pytrees
from eqx_bilevel._kernels import fixed_numbers
from eqx_bilevel._optimiser import as_optimiser
from eqx_bilevel._scale import search_scale

from .helpers import points_mesh


def _exact(x):
    return jnp.sin(3 * x[0]) + 0.3 * x[0]


def _source(x):
    second = jax.hessian(_exact)(x)[0, 0]
    return -second + _exact(x) ** 3


class Cubic(eqx.Module):
    strength: eb.AbstractParameter | float = 1.0

    def __call__(self, u, x):
        return -u.laplacian + self.strength * u.value**3


def _value(u, x):
    return u.value


interior = jnp.linspace(0.0, 2.0, 14)[1:-1, None]
ends = jnp.array([[0.0], [2.0]])
validation = jnp.linspace(0.05, 1.95, 16)[:, None]
grid = jnp.linspace(0.0, 2.0, 50)[:, None]


def _conditions(strength=1.0, nugget=1e-6):
    pde = eb.Condition(Cubic(strength), interior, _source, nugget=nugget, name="pde")
    return [pde, eb.Condition(_value, ends, _exact, nugget=nugget, name="ends")]


def _prior(lengthscale=0.3):
    return eb.GaussianProcess(eb.Gaussian(lengthscale))


def _error(solution):
    return jnp.max(jnp.abs(solution(grid) - jax.vmap(_exact)(grid)))


def _objective_at(lengthscale, nugget=1e-6):
    objective = eb.ValidationResidual(validation)
    solution = eb.solve(_prior(lengthscale), _conditions(nugget=nugget))
    return float(objective(solution))


@pytest.mark.parametrize(
    "optimiser",
    [
        None,
        optx.LevenbergMarquardt(1e-4, 1e-8),
        optx.BFGS(1e-4, 1e-8),
        optax.adam(0.1),
    ],
    ids=["default", "levenberg_marquardt", "bfgs", "adam"],
)
@pytest.mark.parametrize("gradient", ["implicit", "frozen"])
def test_finds_the_minimum(optimiser, gradient):
    learned = eb.learn(
        _prior(),
        _conditions(),
        eb.ValidationResidual(validation),
        optimiser,
        gradient=gradient,
        steps=60,
        scale_search=False,
        patience=60,
    )
    found = float(learned.prior.kernel.lengthscale.value)
    # The truth: a scan of the objective that `learn` does not see.
    near = found * np.array([0.9, 0.95, 1.05, 1.1])
    assert all(_objective_at(length) > learned.objective for length in near)
    assert learned.objective < 1e-3 * _objective_at(0.3)
    assert _error(learned.solution) < 0.2 * _error(
        eb.solve(_prior(), _conditions(), throw=False)
    )


@pytest.mark.parametrize(
    "optimiser",
    [
        optx.BFGS(1e-3, 1e-3),
        optx.BestSoFarMinimiser(optx.NonlinearCG(1e-3, 1e-3)),
        optx.Dogleg(1e-3, 1e-3),
    ],
    ids=["bfgs", "best_so_far", "dogleg"],
)
def test_rejected_steps_leave_no_trace(optimiser):
    # The first step of some is far too long: the solve fails there, or needs a nugget
    # that must not be kept.
    learned = eb.learn(
        _prior(0.2),
        _conditions(nugget=None),
        eb.ValidationResidual(validation),
        optimiser,
        steps=25,
        scale_search=False,
        throw=False,
    )
    history, accepted = learned.history, learned.history["accepted"]
    objective, jitter = history["objective"], history["jitter"]
    assert np.all(np.isfinite(objective))
    rejected = np.flatnonzero(~accepted)
    np.testing.assert_array_equal(objective[rejected], objective[rejected - 1])
    np.testing.assert_array_equal(jitter[rejected], jitter[rejected - 1])
    # Accepted steps have about what a solve without any history needs.
    anew = eb.solve(learned.prior, learned.conditions).stats["jitter"]
    assert np.max(jitter) <= 10 * max(jitter[0], anew)
    assert learned.objective < 1e-6 * objective[0]


def test_history_and_best():
    rows = []
    learned = eb.learn(
        _prior(),
        _conditions(),
        eb.ValidationResidual(validation),
        steps=6,
        scale_search=False,
        callback=rows.append,
    )
    history = learned.history
    assert len(rows) == len(history["objective"]) <= 6
    assert [row.step for row in rows] == list(range(1, len(rows) + 1))
    np.testing.assert_array_equal(
        history["best"], np.minimum.accumulate(history["objective"])
    )
    # The solution is that of the best hyperparameters, solved anew to the tolerance.
    np.testing.assert_allclose(learned.objective, history["best"][-1], rtol=1e-4)
    again = eb.solve(learned.prior, learned.conditions)
    np.testing.assert_allclose(again(grid), learned.solution(grid), atol=1e-8)
    assert np.all(np.diff(history["seconds"]) > 0)


def test_one_linearised_solve_for_each_step():
    learned = eb.learn(
        _prior(0.5),
        _conditions(),
        eb.ValidationResidual(validation),
        optax.adam(0.05),
        gradient="frozen",
        max_inner_steps=1,
        steps=50,
        scale_search=False,
    )
    assert np.all(learned.history["inner_steps"] == 1)
    # The final solve converges all the same.
    assert learned.solution.result == eb.RESULTS.successful
    assert learned.objective < 0.1 * _objective_at(0.5)


def test_batches_are_reproducible_and_best_is_of_the_whole():
    def run(key):
        return eb.learn(
            _prior(),
            _conditions(),
            eb.ValidationResidual(validation, batch_size=5),
            optax.adam(0.1),
            steps=15,
            scale_search=False,
            key=key,
        )

    one, same = run(jax.random.key(1)), run(jax.random.key(1))
    other = run(jax.random.key(2))
    np.testing.assert_array_equal(one.history["batch"], same.history["batch"])
    assert np.any(one.history["batch"] != other.history["batch"])
    # The whole objective where the first batch was used is known.
    np.testing.assert_allclose(
        one.history["objective"][0], _objective_at(0.3), rtol=1e-5
    )
    np.testing.assert_allclose(one.objective, min(one.history["objective"]), rtol=1e-4)


def test_batch_is_unbiased():
    objective = eb.ValidationResidual(validation, batch_size=4)
    solution = eb.solve(_prior(), _conditions())
    keys = jax.random.split(jax.random.key(0), 4000)
    values = jax.vmap(lambda key: objective.batch(key)(solution))(keys)
    deviation = jnp.std(values) / jnp.sqrt(len(keys))
    assert jnp.abs(jnp.mean(values) - objective(solution)) < 4 * deviation


def test_sums_of_objectives():
    solution = eb.solve(_prior(), _conditions())
    one = eb.ValidationResidual(validation)
    two = eb.ValidationResidual(ends + 0.1, "ends")
    total = one + 2.5 * two
    np.testing.assert_allclose(total(solution), one(solution) + 2.5 * two(solution))
    shifted = jax.vmap(_exact)(ends + 0.1)
    by_hand = 0.5 * jnp.sum((solution(ends + 0.1) - shifted) ** 2)
    without = eb.ValidationResidual(ends + 0.1, "ends", misfit_weight=0)
    np.testing.assert_allclose(without(solution), by_hand)
    misfits = jnp.concatenate([v.ravel() for v in solution.residuals().values()])
    weighed = 0.5 * two.misfit_weight * jnp.sum(misfits**2)
    np.testing.assert_allclose(two(solution) - by_hand, weighed, rtol=1e-4)


def _slope(u, x):
    return u.d(0)


def test_objective_sees_ignored_conditions():
    # u' = 0 with u = 1 at the ends. A kernel of linear functions through zero has
    # nothing like it, and fits u = 0 if the nugget is not tiny.
    conditions = [
        eb.Condition(_slope, interior, nugget=1e-6, name="slope"),
        eb.Condition(_value, ends, 1.0, name="ends"),
    ]
    linear = eb.GaussianProcess(eb.Polynomial(1, 1.0, eb.Frozen(0.0)))
    smooth = eb.GaussianProcess(eb.Gaussian(2.0))
    ignoring, heeding = (eb.solve(p, conditions) for p in (linear, smooth))
    assert jnp.max(jnp.abs(ignoring(ends) - 1)) > 0.5
    assert jnp.max(jnp.abs(heeding(ends) - 1)) < 1e-3
    published = eb.ValidationResidual(validation, misfit_weight=0)
    assert published(ignoring) < 10
    assert eb.ValidationResidual(validation)(ignoring) > 1e3
    assert eb.ValidationResidual(validation)(heeding) < 1
    # Data with noise are not meant to be met.
    noisy = [conditions[0], eb.Condition(_value, ends, 1.0, noise=0.1, name="ends")]
    solution = eb.solve(linear, noisy)
    slope = 0.5e4 * jnp.sum(solution.residuals()["slope"] ** 2)
    with_misfit = eb.ValidationResidual(validation)(solution)
    np.testing.assert_allclose(with_misfit - published(solution), slope, rtol=1e-6)


def _wave(x):
    return jnp.sin(8 * x[1]) * jnp.exp(x[0] / 4)


def test_scale_search_of_each_dimension():
    square = eb.Box([0.0, 0.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(0), 3)
    conditions = [
        eb.Condition(_laplacian, square.interior(60, key=keys[0]), _laplacian_of_wave),
        eb.Condition(_value, square.boundary(40, key=keys[1]), _wave),
    ]
    objective = eb.ValidationResidual(square.interior(60, key=keys[2]))

    def searched(lengthscale):
        prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
        learned = eb.learn(prior, conditions, objective, steps=1, throw=False)
        return learned.scale_search

    even, uneven = searched(0.5), searched([0.5, 0.5])
    assert len(even) == 13 and even[0].lengths == (0.5, 0.5)
    assert all(tried.lengths[0] == tried.lengths[1] for tried in even)
    assert uneven[:13] == even
    best = min(uneven, key=lambda tried: tried.objective)
    assert best.lengths[0] >= 2 * best.lengths[1]
    assert best.objective < 0.5 * min(tried.objective for tried in even)


def _laplacian(u, x):
    return u.laplacian


def _laplacian_of_wave(x):
    return (1 / 16 - 64) * _wave(x)


class Fragile(eb.AbstractKernel):
    # A kernel of a user, without a lengthscale of the usual kind, and that breaks.
    log_rate: jax.Array

    def __call__(self, x, y):
        rate = jnp.exp(self.log_rate)
        rate = jnp.where(rate > 2.0, jnp.nan, rate)
        return jnp.exp(-rate * jnp.sum((x - y) ** 2))


@pytest.mark.parametrize("optimiser", [optax.sgd(1e3), optax.adam(3.0)])
def test_steps_that_are_not_finite_are_taken_back(optimiser):
    # Too long lengthscales are bad here, so that steps overshoot to where it breaks.
    prior = eb.GaussianProcess(Fragile(jnp.log(jnp.array(0.05))))
    learned = eb.learn(
        prior,
        _conditions(),
        eb.ValidationResidual(validation, misfit_weight=0),
        optimiser,
        steps=30,
        scale_search=False,
    )
    assert not np.all(learned.history["accepted"])
    assert learned.history["accepted"][0]
    assert learned.objective < 0.9 * learned.history["objective"][0]
    assert jnp.isfinite(learned.prior.kernel.log_rate)


def test_error_carries_what_there_is():
    prior = eb.GaussianProcess(Fragile(jnp.log(jnp.array(10.0))))
    arguments = (prior, _conditions(), eb.ValidationResidual(validation))
    with pytest.raises(eb.LearningError, match="Nothing useful was learned") as error:
        eb.learn(*arguments, optax.adam(1e-2), steps=5, scale_search=False)
    assert isinstance(error.value.learned, eb.Learned)
    learned = eb.learn(
        *arguments, optax.adam(1e-2), steps=5, scale_search=False, throw=False
    )
    assert learned.solution.result != eb.RESULTS.successful


def test_default_optimisers():
    objective = eb.ValidationResidual(validation)
    kind = lambda n: type(as_optimiser(None, jnp.zeros(n), objective, True))
    assert kind(1) == kind(6000) == eb.BoundedBFGS
    assert kind(6001) == type(optax.adam(1e-3))


@pytest.mark.parametrize("length, warns", [(1e-4, True), (0.3, False)])
def test_a_solution_that_is_zero_between_the_points(length, warns):
    # It satisfies Burgers' equation, and the objective is as small as it can be.
    box = eb.Box([0.0, -1.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(0), 3)
    burgers = lambda u, x: u.d(0) + u.value * u.d(1) - 0.5 * u.d(1, 1)
    start = lambda x: jnp.where(x[0] == 0, -jnp.sin(jnp.pi * x[1]), 0.0)
    faces = [(0, "lower"), (1, "lower"), (1, "upper")]
    sides = box.boundary(30, key=keys[1], faces=faces)
    conditions = [
        eb.Condition(burgers, box.interior(60, key=keys[0])),
        eb.Condition(lambda u, x: u.value, sides, start),
    ]
    objective = eb.ValidationResidual(box.interior(60, key=keys[2]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = dict(steps=0, scale_search=False)
        learned = eb.learn(_prior(length), conditions, objective, **options)
    assert (learned.objective < 1e-10) == warns
    messages = [str(w.message) for w in caught]
    assert any("correlated with none" in message for message in messages) == warns


@pytest.mark.parametrize("start", [0.01, 20.0])
def test_scale_search(start):
    learned = eb.learn(
        _prior(start), _conditions(), eb.ValidationResidual(validation), steps=15
    )
    lengths = np.array([tried.lengths[0] for tried in learned.scale_search])
    values = np.array([tried.objective for tried in learned.scale_search])
    # From the distance of the points to the size of the domain.
    np.testing.assert_allclose(lengths[[1, 8]], [2.0 / 14, 2.0], rtol=1e-6)
    assert np.min(values) >= learned.objective
    assert _error(learned.solution) < 1e-4


def test_scale_search_alone(compiled):
    objective = eb.ValidationResidual(validation)
    learned = eb.learn(_prior(0.03), _conditions(nugget=2e-6), objective, steps=0)
    # Its best: no step is made, and none compiled.
    best = min(learned.scale_search, key=lambda tried: tried.objective)
    found = learned.prior.kernel.lengthscale.value, learned.objective
    expected = best.lengths[0], best.objective
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(len(column) == 0 for column in learned.history.values())
    assert learned.history["accepted"].dtype == bool and not learned.converged
    assert not any("optimistix_step" in name for name in compiled.names)


@pytest.mark.parametrize("narrow", [0.172, 0.366, 0.78])
def test_scale_search_of_two_valleys(narrow):
    # A wide one beyond the largest length, and one that falls between two lengths.
    def value(lengths, prior):
        (length,) = lengths
        at = prior.kernel.lengthscale.value
        np.testing.assert_allclose(at, length, rtol=0.2)  # Of few points.
        far = np.log(length / narrow) / 0.13
        return 2.0 - 0.1 * length - np.exp(-(far**2))

    prior, tried = search_scale(_prior(), _conditions(), value, 8)
    best = min(tried, key=lambda each: each.objective)
    assert best.objective < 1.1 and len(tried) == 17
    np.testing.assert_allclose(best.lengths, narrow, rtol=0.15)
    np.testing.assert_allclose(prior.kernel.lengthscale.value, narrow, rtol=0.3)


def test_what_is_given_is_tried_with_many_inner_steps():
    # Values that are found in some steps from zero, and not in a few.
    far = lambda x: 50.0 * _exact(x)
    source = lambda x: -50 * jax.hessian(_exact)(x)[0, 0] + far(x) ** 3
    stated = [
        eb.Condition(Cubic(), interior, source, nugget=1e-6),
        eb.Condition(_value, ends, far, nugget=1e-6),
    ]
    solution = eb.solve(_prior(0.6), stated)
    assert 12 < solution.stats["num_steps"] < 100
    objective = eb.ValidationResidual(validation)
    learned = eb.learn(_prior(0.6), stated, objective, scale_search=1, steps=1)
    given, other = learned.scale_search
    np.testing.assert_allclose(given.lengths, 0.6, rtol=0.2)
    np.testing.assert_allclose(given.objective, objective(solution), rtol=1e-3)
    # And the first step starts from there.
    assert learned.history["inner_steps"][0] <= 2


class Own(eb.AbstractKernel):
    def __call__(self, x, y):
        return jnp.exp(-0.5e4 * jnp.sum((x - y) ** 2))


class Wide(eb.AbstractKernel):
    width: eb.AbstractParameter

    def __call__(self, x, y):
        return jnp.exp(-jnp.sum((x - y) ** 2) / (2 * self.width**2))


@eb.rescale.register(Wide)
def _(kernel, factor):
    factor = jnp.exp(jnp.mean(jnp.log(factor)))
    new = eb.with_value(kernel.width, factor * kernel.width.value)
    return eqx.tree_at(lambda k: k.width, kernel, new)


def test_scale_search_without_lengthscale():
    kernel = eb.Stretched(Own(), 1.0)
    assert eqx.tree_equal(kernel, eb.rescale(Own(), 1.0))
    learned = eb.learn(
        eb.GaussianProcess(kernel),
        _conditions(),
        eb.ValidationResidual(validation),
        steps=15,
    )
    assert _error(learned.solution) < 1e-4


_by_itself = eb.Gibbs(lambda x: 0.3 + 0 * x[0])


@pytest.mark.parametrize(
    "kernel, named",
    [
        (Wide(eb.Positive(0.1)), None),
        (2.0 * Own() + eb.Gaussian(0.1), "Own"),
        (eb.Subspace(Own(), 0) * eb.Gaussian(0.1), "Own"),
        (eb.Warped(Own() + 1.0, lambda x: x), "Own"),
        (_by_itself + eb.Stretched(Own(), 2.0), "Gibbs"),
        (eb.Frozen(Own()) + eb.Gaussian(0.1), None),
        (eb.Stretched(Own(), eb.Frozen(2.0)) + 1.0, "Own"),
    ],
)
def test_what_is_learned_has_the_structure_of_what_was_given(kernel, named, tmp_path):
    # A given prior may have functions, which become modules.
    kernel, wide = functions_as_pytrees(kernel), Wide(eb.Positive(1.0))
    priors = {"u": eb.GaussianProcess(kernel), "v": eb.GaussianProcess(wide)}
    conditions = [
        eb.Condition(lambda u, x: u["u"].value + u["u"].d(0, 0), validation[::3], 1.0),
        eb.Condition(lambda u, x: u["v"].value - u["u"].value, validation[1::3]),
    ]
    objective = eb.ValidationResidual(validation, "conditions[0]")
    args = priors, conditions, objective, optax.adam(0.01)
    seen = []
    kwargs = dict(steps=1, scale_search=2, throw=False, callback=seen.append)
    if named is None:
        learned = eb.learn(*args, **kwargs)
    else:
        with pytest.warns(UserWarning, match=f"of 'u' as it is, .* `{named}` would"):
            learned = eb.learn(*args, **kwargs)
    assert jax.tree.structure(learned.prior) == jax.tree.structure(priors)
    stated = list(map(functions_as_pytrees, conditions))
    assert jax.tree.structure(learned.conditions) == jax.tree.structure(stated)
    # The rest is searched for nevertheless.
    assert len(learned.scale_search) >= 2
    widths = [float(each.prior["v"].kernel.width.value) for each in seen]
    assert widths[0] == 1.0 and len(set(widths)) >= 6
    eqx.tree_serialise_leaves(tmp_path / "prior", learned.prior)
    read = eqx.tree_deserialise_leaves(tmp_path / "prior", priors)
    assert eqx.tree_equal(read, learned.prior)


def test_nothing_to_rescale():
    prior = eb.GaussianProcess(eb.Positive(0.1) * Own())
    args = prior, _conditions(), eb.ValidationResidual(validation), optax.adam(0.01)
    with pytest.warns(UserWarning, match="Stretched") as caught:
        learned = eb.learn(*args, steps=1, throw=False)
    assert len(caught) == 1 and learned.scale_search == []


class Fixed(eb.AbstractKernel):
    width: float

    def __call__(self, x, y):
        return jnp.exp(-jnp.sum((x - y) ** 2) / (2 * self.width**2))


class Slope(eqx.Module):
    slope: Any

    def __call__(self, x):
        return self.slope * x


class Trend(eqx.Module):
    slope: Any
    offset: Any = 0.0

    def __call__(self, x):
        return self.slope * x[0] + self.offset


class Settings(eqx.Module):
    rtol: float = 1e-3


class Helped(eqx.Module):
    settings: Settings
    slope: eb.AbstractParameter

    def __call__(self, x):
        return self.slope * x[0]


_gaussian = eb.Gaussian(0.3)


@pytest.mark.parametrize(
    "kernel, mean, named",
    [
        (2.0 * Fixed(0.3), None, ["Fixed.width"]),
        (eb.Stretched(Fixed(0.3), eb.Frozen(2.0)), None, ["Fixed.width"]),
        (eb.Stretched(Fixed(0.3), 1.0), None, []),
        (_gaussian, Trend(1.0), ["Trend.slope", "Trend.offset"]),
        (eb.Warped(_gaussian, Slope(0.5)), None, ["Slope.slope"]),
        (_gaussian, lambda x: Trend(1.0)(x), []),
        # Who thought of one number thought of the other.
        (_gaussian, Trend(jnp.array(1.0)), []),
        (_gaussian, Trend(eb.Frozen(1.0), eb.Frozen(0.0)), []),
        (_gaussian, eb.Frozen(Trend(1.0)), []),
        (eb.Scaled(eb.Frozen(Fixed(0.3)), 2.0), None, []),
        (_gaussian, Helped(Settings(), eb.Positive(1.0)), []),
        (_gaussian, 1.0, []),
    ],
)
def test_floats_that_stay(kernel, mean, named):
    prior = functions_as_pytrees(eb.GaussianProcess(kernel, mean))
    assert fixed_numbers({"u": prior, "v": _prior()}) == named


def test_warns_of_boundary_values_before_the_equation():
    pde, end = _conditions()
    solution = eb.solve(_prior(), [end, pde])
    with pytest.warns(UserWarning, match=r"`ValidationResidual\(points, 'pde'\)`"):
        eb.ValidationResidual(validation)(solution)
    named = eb.ValidationResidual(validation, "pde")(solution)
    in_order = eb.solve(_prior(), [pde, end])
    first = eb.ValidationResidual(validation)(in_order)
    np.testing.assert_allclose(named, first, rtol=1e-6)
    eb.ValidationResidual(validation, "ends")(solution)  # No warning.


def test_warns_of_floats_that_stay():
    # Of those in the prior: in a condition, numbers are data.
    prior = eb.GaussianProcess(eb.Gaussian(0.3), Trend(1.0))
    args = prior, _conditions(), eb.ValidationResidual(validation)
    with pytest.warns(UserWarning, match="will not be learned") as caught:
        eb.learn(*args, steps=1, scale_search=False, throw=False)
    (warning,) = caught
    assert "`Trend.slope` and `Trend.offset` will" in str(warning.message)


def test_frozen_stays_and_coefficients_are_learned():
    # An inverse problem: the strength of the nonlinearity from values of the solution.
    data = jnp.linspace(0.1, 1.9, 9)[:, None]
    conditions = [
        *_conditions(eb.Positive(0.5)),
        eb.Condition(_value, data, _exact, noise=1e-3, name="data"),
    ]
    kernel = eb.Frozen(2.0) * eb.Gaussian(eb.Frozen(0.8))
    learned = eb.learn(
        eb.GaussianProcess(kernel),
        conditions,
        eb.ValidationResidual(validation, "data"),
        scale_search=False,
    )
    assert eqx.tree_equal(learned.prior, eb.GaussianProcess(kernel))
    strength = learned.conditions[0].operator.strength
    assert isinstance(strength, eb.Positive)
    np.testing.assert_allclose(strength.value, 1.0, atol=1e-2)
    assert eqx.tree_equal(learned.conditions[0].points, interior)


def test_compiles_once():
    traced = []

    def operator(u, x):
        traced.append(None)
        return -u.laplacian + u.value**3

    def run(start, steps, mean=None, optimiser=None):
        pde = eb.Condition(operator, interior, _source, name="pde")
        conditions = [pde, eb.Condition(_value, ends, _exact)]
        before = len(traced)
        eb.learn(
            eb.GaussianProcess(eb.Gaussian(start), mean),
            conditions,
            eb.ValidationResidual(validation),
            optimiser,
            steps=steps,
            patience=100,
        )
        return len(traced) - before

    first = run(0.3, 4)
    # Later calls look at the operator once more, to check it, and compile nothing; nor
    # does a further step.
    assert run(0.7, 4) == run(0.2, 9) < first / 5
    # A number has a weak type, which it has not after a step.
    assert run(0.3, 4, 0.0) <= first
    # Optimisers are functions, and are new ones each time.
    by_adam = lambda: run(0.3, 4, optimiser=optax.adam(1e-2))
    assert 5 * by_adam() > first > 5 * by_adam()


def _compiling(compiled, name: str) -> list[threading.Thread]:
    both = zip(compiled.names, compiled.threads)
    return [thread for fn, thread in both if fn == f"jit({name})"]


@pytest.mark.parametrize(
    "optimiser, step, scale_search",
    [
        (None, "optimistix_step", True),
        (None, "optimistix_step", False),
        (optx.LevenbergMarquardt(1e-3, 1e-3), "optimistix_step", 2),
        (optax.adam(0.1), "optax_step", False),
    ],
)
def test_programs_are_compiled_once_and_ahead(compiled, optimiser, step, scale_search):
    jax.clear_caches()
    args = _prior(0.8), _conditions(), eb.ValidationResidual(validation), optimiser
    eb.learn(*args, steps=3, scale_search=scale_search)
    for name in ("evaluate", step):
        (thread,) = _compiling(compiled, name)
        assert thread is not threading.main_thread()


@pytest.mark.parametrize("cores", [2, 4])
def test_blas_leaves_the_cores_to_the_compiler(cores, monkeypatch):
    # And to everything, where there are few.
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    later = {1 if cores == 2 else 2}
    threads = lambda: {lib["num_threads"] for lib in threadpoolctl.threadpool_info()}
    compiling, seen = _runs.compiling, []

    def noted(*args):
        seen.append(threads())
        return compiling(*args)

    monkeypatch.setattr(_runs, "compiling", noted)
    args = _prior(0.8), _conditions(), eb.ValidationResidual(validation)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        during = []
        note = lambda progress: during.append((progress.step, threads()))
        eb.learn(*args, steps=2, scale_search=2, callback=note)
        assert seen == [{1}, {1}] and threads() == {2}
        assert [used for step, used in during if step > 0] == [later] * 2

        def interrupted(progress):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            eb.learn(*args, steps=2, scale_search=2, callback=interrupted)
        assert threads() == {2}


@pytest.mark.parametrize("cores,expected", [(2, 1), (8, 4)])
def test_blas_leaves_the_cores_to_other_devices(cores, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    solve, seen = _solve._solve, []

    def noted(*args):
        seen.extend(lib["num_threads"] for lib in threadpoolctl.threadpool_info())
        return solve(*args)

    monkeypatch.setattr(_solve, "_solve", noted)
    with threadpoolctl.threadpool_limits(8, user_api="blas"):
        with jax.set_mesh(points_mesh(2)):
            eb.solve(_prior(0.8), _conditions())
    assert set(seen) == {expected}


@pytest.mark.parametrize("optimiser", [None, optax.adam(0.1)])
def test_on_a_device_programs_are_compiled_once(compiled, optimiser):
    # And not ahead: it would not be what is called.
    jax.clear_caches()
    x = jax.device_put(jnp.linspace(0.1, 1.9, 13)[:, None], jax.devices()[1])
    conditions = [eb.Condition(Cubic(), x, _source), *_conditions()[1:]]
    args = _prior(0.8), conditions, eb.ValidationResidual(validation), optimiser
    key = jax.device_put(jax.random.key(0), jax.devices()[0])
    learned = eb.learn(*args, steps=3, key=key)
    for name in ("evaluate", "optimistix_step" if optimiser is None else "optax_step"):
        assert _compiling(compiled, name) == [threading.main_thread()]
    assert learned.solution.weights.devices() == x.devices()


def test_starts_from_where_the_gradient_points_the_wrong_way():
    # Lengthscales are much longer than what the points resolve: there rounding decides
    # the nugget, and the objective decreases towards longer ones still.
    conditions = _conditions(nugget=None)
    objective = eb.ValidationResidual(validation)
    learned = eb.learn(_prior(4.0), conditions, objective, scale_search=False, steps=40)
    # How far down the last digits of it go is a matter of rounding.
    assert learned.objective < 1e-7
    assert learned.prior.kernel.lengthscale.value < 2.0
    assert _error(learned.solution) < 1e-5
    # A stage has one nugget: it is reduced in between, and not raised and reduced from
    # step to step.
    jitter = learned.history["jitter"][learned.history["accepted"]]
    assert np.sum(np.diff(np.log(jitter)) != 0) <= 4


def test_the_start_is_evaluated_once(monkeypatch):
    evaluate, seen = _runs.evaluate, []

    def counted(theta, task, start):
        if not isinstance(start.z, jax.core.Tracer):
            seen.append(float(theta[0].kernel.lengthscale.value))
        return evaluate(theta, task, start)

    counted.lower = evaluate.lower  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(_runs, "evaluate", counted)
    args = _prior(4.0), _conditions(nugget=None), eb.ValidationResidual(validation)
    eb.learn(*args, scale_search=False, steps=1)
    # It goes on from there, so that nothing but the comparison can need it again.
    assert len(seen) > 4 and np.sum(np.isclose(seen, 4.0)) == 1


@pytest.mark.parametrize("optimiser", [None, optax.adam(0.1)])
def test_one_solution_is_kept_at_a_time(monkeypatch, optimiser):
    evaluate, weights = _runs.evaluate, []

    def checked(theta, task, start):
        if not isinstance(start.z, jax.core.Tracer):
            assert all(reference() is None for reference in weights)
        found, outcome = evaluate(theta, task, start)
        weights.append(weakref.ref(found.solution.weights))
        return found, outcome

    checked.lower = evaluate.lower  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(_runs, "evaluate", checked)
    args = _prior(0.8), _conditions(), eb.ValidationResidual(validation), optimiser
    eb.learn(*args, scale_search=False, steps=4)
    assert len(weights) > 4


@pytest.mark.parametrize("times", [1, 9])
def test_last_solve_ends_where_the_best_did(monkeypatch, times):
    # The square of u is known, and so there are two solutions.
    conditions = [
        eb.Condition(lambda u, x: u.value**2, interior, lambda x: 2 + x[0], noise=0.01)
    ]
    objective = eb.Objective(lambda s: jnp.log(jnp.mean((s(validation) - 1.7) ** 2)))
    evaluate, left = _last_solve.evaluate, [None] * times

    def astray(theta, task, start):
        if left:
            left.pop()
            z = jnp.where(start.cold, -1.7, -start.z)
            start = eqx.tree_at(lambda s: s.z, start, z)
            start = eqx.tree_at(lambda s: s.cold, start, jnp.array(False))
        return evaluate(theta, task, start)

    monkeypatch.setattr(_last_solve, "evaluate", astray)
    prior = eb.GaussianProcess(4.0 * eb.Gaussian(0.8), mean=eb.Frozen(1.0))
    args = prior, conditions, objective, optax.adam(0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learned = eb.learn(*args, steps=3, scale_search=False)
    np.testing.assert_allclose(learned.objective, objective(learned.solution))
    best = learned.history["best"][-1]
    found_again = times == 1
    assert (learned.objective == best) == found_again
    assert len(caught) == (not found_again)
    assert all("smallest objective while learning" in str(w.message) for w in caught)


def test_where_the_first_solves_start():
    # Of the solutions -1 and 1.
    operator = lambda u, x: u.value**2 - 0.01 * u.laplacian
    stated = [eb.Condition(operator, interior, 1.0)]
    options = dict(objective=eb.ValidationResidual(validation), steps=3)
    learn = lambda initial, conditions=stated: eb.learn(
        _prior(), conditions, initial=initial, scale_search=2, **options
    )
    for sign in (-1.0, 1.0):
        learned = learn(lambda x, sign=sign: 2 * sign + 0.1 * x[0])
        np.testing.assert_allclose(learned.solution(grid), sign, atol=1e-3)
        # At other points.
        others = [eb.Condition(operator, interior[1:] - 0.05, 1.0)]
        again = learn(learned.solution, others)
        np.testing.assert_allclose(again.solution(grid), sign, atol=1e-3)
    # A solve that failed knows nothing.
    ordinary, after = [learn(f, _conditions()) for f in (None, lambda x: np.nan * x[0])]
    assert eqx.tree_equal(after.prior, ordinary.prior)
    with pytest.raises(ValueError, match="`initial` is for unknown function"):
        learn({"v": lambda x: 1.0})


def test_pooled_points():
    for objective, target in (
        (eb.ValidationResidual(validation), _source),
        (eb.ValidationResidual(validation, target=_targets), _targets),
    ):
        settings = dict(steps=1, scale_search=False, pool=True)
        learned = eb.learn(_prior(0.8), _conditions(), objective, **settings)
        points = jnp.concatenate([interior, validation])
        others = _targets if target is _targets else jax.vmap(_source)(validation)
        targets = jnp.concatenate([jax.vmap(_source)(interior), others])
        pde = eb.Condition(
            Cubic(), points, targets, nugget=jnp.asarray(1e-6), name="pde"
        )
        by_hand = eb.solve(learned.prior, [pde, _conditions()[1]])
        np.testing.assert_allclose(learned.solution(grid), by_hand(grid), atol=1e-8)


_targets = jax.vmap(_source)(validation) + 0.1


def test_wrong_objectives_are_found_before_compiling():
    cases = [
        (eb.ValidationResidual(validation, "other"), "about condition 'other'"),
        (eb.ValidationResidual(jnp.ones((3, 2))), "2 dimension"),
        (1.0 * eb.ValidationResidual(ends, "data"), "its own points only"),
    ]
    data = eb.Condition(_value, ends + 0.5, jnp.ones(2), name="data")
    for objective, message in cases:
        with pytest.raises(ValueError, match=message):
            eb.learn(_prior(), [*_conditions(), data], objective)


def test_progress(capsys):
    rows = []
    objective = eb.ValidationResidual(validation)
    arguments = dict(steps=2, scale_search=2)
    eb.learn(_prior(), _conditions(), objective, callback=rows.append, **arguments)
    assert [row.step for row in rows] == [0] * 7 + [1, 2]
    assert rows[6].best == min(row.objective for row in rows[:7])
    eb.learn(_prior(), _conditions(), objective, verbose=True, **arguments)
    lines = capsys.readouterr().out.splitlines()
    expected = ["Compiling", *["scale"] * 7, "Compiling", *["step"] * 2]
    assert [line.split()[0] for line in lines] == expected


class Late(eb.AbstractObjective):
    # All that one of a user has to have.
    weight: jax.Array

    def __call__(self, solution):
        return self.weight * jnp.mean(solution.apply(Cubic(), validation) ** 2)


class LateSquares(eb.AbstractLeastSquaresObjective):
    def residuals(self, solution):
        return solution.apply(Cubic(), validation) - jax.vmap(_source)(validation)


@pytest.mark.parametrize(
    "objective, optimiser",
    [
        (Late(jnp.array(2.0)), optax.sgd(1e-9)),
        (LateSquares(), optx.LevenbergMarquardt(1e-3, 1e-3)),
        (3.0 * Late(jnp.array(2.0)) + eb.ValidationResidual(validation), optax.sgd(0)),
        (LateSquares() + eb.ValidationResidual(validation, batch_size=4), None),
    ],
)
def test_objective_of_ones_own(objective, optimiser):
    key = jax.random.key(0)
    args = _prior(), _conditions(), objective, optimiser
    learned = eb.learn(*args, steps=2, key=key, scale_search=False, pool=True)
    with_same = eb.solve(learned.prior, _conditions())
    np.testing.assert_allclose(learned.objective, objective(with_same), rtol=1e-3)
    # The points of those that have some join the conditions.
    has_points = hasattr(objective, "pooled")
    num = len(interior) + has_points * len(validation)
    assert len(learned.conditions[0].points) == num
