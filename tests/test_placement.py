import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest


candidates = jax.random.uniform(jax.random.key(0), (300, 2))


def test_constant_lengthscales_give_euclidean_distances():
    scale = jnp.array([0.1, 0.4])
    found = eb.farthest_points(candidates, 3.0 * eb.Gaussian(scale), 40)
    # By hand.
    scaled = np.asarray(candidates / scale[None, :])
    chosen = [0]
    for _ in range(39):
        apart = scaled[:, None, :] - scaled[None, chosen, :]
        chosen.append(int(np.argmax(np.min(np.sum(apart**2, axis=2), axis=1))))
    np.testing.assert_array_equal(found, candidates[np.array(chosen)])


def test_more_points_where_lengthscales_are_short():
    line = jnp.linspace(0.0, 1.0, 2001)[:, None]
    kernel = eb.Gibbs(lambda x: jnp.where(x[0] < 0.2, 0.01, 0.1))
    found = eb.farthest_points(line, kernel, 60)[:, 0]
    near = jnp.sum(found < 0.2)
    # Twenty lengths on the left and eight on the right.
    assert abs(near / 60 - 20 / 28) < 0.1
    apart = jnp.diff(jnp.sort(found))
    assert jnp.max(apart) < 0.1


@pytest.mark.parametrize("n", [0, 301])
def test_wrong_numbers(n):
    with pytest.raises(ValueError, match=f"which is 300, got {n}"):
        eb.farthest_points(candidates, eb.Gaussian(1.0), n)


def test_under_jit():
    fn = jax.jit(lambda x: eb.farthest_points(x, eb.Gaussian(0.3), 5))
    expected = eb.farthest_points(candidates, eb.Gaussian(0.3), 5)
    np.testing.assert_array_equal(fn(candidates), expected)


#
# Adaptive points
#


def _front(x):
    return jnp.tanh(40 * (x[0] - 0.6))


def _source(x):
    return -jnp.trace(jax.hessian(_front)(x))


_line = eb.Box(0.0, 1.0)
_fine = _line.grid(400)


def _solve_front(points, target=_source):
    conditions = [
        eb.Condition(lambda u, x: -u.laplacian, points, target, name="pde"),
        eb.Condition(lambda u, x: u.value, _line.boundary(2), _front, name="ends"),
    ]
    prior = eb.GaussianProcess(eb.Matern(0.15, nu=4.5))
    return eb.solve(prior, conditions)


def _rms(solution):
    return jnp.sqrt(jnp.mean((solution(_fine) - jax.vmap(_front)(_fine)) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_adaptive_points_are_better_than_more_of_a_sequence(seed):
    keys = jax.random.split(jax.random.key(seed))
    points = _line.interior(70, key=keys[0])
    few = _solve_front(points[:40])
    new = eb.adaptive_points(few, _line, 30, "pde", key=keys[1])
    assert new.shape == (30, 1)
    adapted = _solve_front(jnp.concatenate([points[:40], new]))
    assert _rms(adapted) < 0.1 * _rms(_solve_front(points))
    # At the front, mostly, but not only.
    near = jnp.sum(jnp.abs(new - 0.6) < 0.1)
    assert 12 <= near <= 29


def _greedy_by_hand(candidates, points, size, n):
    dim = candidates.shape[1]
    scale = np.ptp(candidates, axis=0)
    density = (size + np.mean(size)) ** (1 / dim)
    known, chosen = [p / scale for p in points], []
    for _ in range(n):
        apart = candidates[:, None] / scale - np.stack(known)[None]
        nearest = np.min(np.linalg.norm(apart, axis=2), axis=1)
        chosen.append(int(np.argmax(density * nearest)))
        known.append(candidates[chosen[-1]] / scale)
    return chosen


@pytest.mark.parametrize("criterion", ("residual", "std"))
def test_adaptive_points_by_hand(criterion, getkey):
    box = eb.Box([0.0, 0.0], [1.0, 5.0])
    operator = lambda u, x: u.laplacian + u.value**2
    points = box.interior(20, key=getkey())
    conditions = [eb.Condition(operator, points, lambda x: x[0], name="pde")]
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian([0.5, 1.0])), conditions)
    candidates = box.interior(200, key=getkey())
    found = eb.adaptive_points(solution, candidates, 15, criterion=criterion)
    if criterion == "std":
        size = solution.std(candidates, operator)
    else:
        size = jnp.abs(solution.apply(operator, candidates) - candidates[:, 0])
    by_hand = _greedy_by_hand(*map(np.asarray, (candidates, points, size)), 15)
    np.testing.assert_array_equal(found, candidates[np.array(by_hand)])
    assert len(np.unique(np.asarray(found), axis=0)) == 15


def test_standard_deviations_become_smaller():
    # Than by as many points of the sequence: the largest one.
    key1, key2 = jax.random.split(jax.random.key(0))
    points = _line.interior(20, key=key1)
    few = _solve_front(points[:10])
    new = eb.adaptive_points(few, _line, 10, "pde", criterion="std", key=key2)
    operator = few.conditions[1].operator
    largest = lambda points: jnp.max(_solve_front(points).std(_fine, operator))
    assert largest(jnp.concatenate([points[:10], new])) < 0.8 * largest(points)


def test_nothing_to_improve(getkey):
    # Points are spread, and differ, also if the criterion is zero everywhere.
    points = _line.interior(10, key=getkey())
    condition = eb.Condition(lambda u, x: u.value, points)
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian(0.1)), [condition])
    new = np.sort(np.asarray(eb.adaptive_points(solution, _fine, 10)), axis=0)
    assert np.min(np.diff(new[:, 0])) > 0.02


def test_wrong_adaptive_points(getkey):
    points = _line.interior(10, key=getkey())
    solution = _solve_front(points)
    choose = lambda *args, **kwargs: eb.adaptive_points(solution, *args, **kwargs)
    with pytest.raises(ValueError, match="'residual' or 'std', got 'error'"):
        choose(_fine, 3, criterion="error")
    with pytest.raises(ValueError, match="`adaptive_points` is about condition"):
        choose(_fine, 3, "data")
    with pytest.raises(ValueError, match="which is 400, got 401"):
        choose(_fine, 401)
    with pytest.raises(ValueError, match="`key` is needed"):
        choose(_line, 3)
    with pytest.raises(ValueError, match="`x` must be one point of shape"):
        choose(candidates, 3)
    solution = _solve_front(points, jnp.ones(10))
    with pytest.raises(ValueError, match="known at its own points only"):
        choose(_fine, 3, "pde")
    assert choose(_fine, 3, "pde", criterion="std").shape == (3, 1)
