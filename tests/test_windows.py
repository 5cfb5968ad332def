"""Long times in windows, against exact solutions and single solves."""

import dataclasses

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from .helpers import relative_error, value
from .test_references import references


def grid(t, x):
    return jnp.stack(jnp.meshgrid(t, x, indexing="ij"), -1).reshape(-1, 2)


def stated(equation, initial, end, num_times, num_points, side=0.0, **kwargs):
    # On the interval from -1 to 1.
    t, x = jnp.linspace(0, end, num_times), jnp.linspace(-1, 1, num_points)
    operator, target = equation
    read, start = initial
    return [
        eb.Condition(operator, grid(t, x[1:-1]), target, name="equation"),
        eb.Condition(value, grid(t[1:], x[jnp.array([0, -1])]), side, name="sides"),
        eb.Condition(read, grid(t[:1], x), start, name="start", **kwargs),
    ]


def in_windows(prior, conditions, num_windows, length, *args, **kwargs):
    options = dict(initial_condition="start", num_windows=num_windows, length=length)
    return eb.solve_windows(prior, conditions, *args, **options, **kwargs)


#
# The heat equation: coefficient, source and boundary values depend on the true time
#


class Heat(eqx.Module):
    def __call__(self, u, x):
        return u.d(0) - 0.1 * (1 + jnp.sin(3 * x[0])) * u.d(1, 1)


def heat_exact(x):
    t, x = x
    passed = t + (1 - jnp.cos(3 * t)) / 3
    decay = jnp.exp(-0.1 * jnp.pi**2 * passed)
    return 3 * decay * jnp.sin(jnp.pi * x) + x * jnp.sin(t)


def heat_source(x):
    return x[1] * jnp.cos(x[0])


def heat(end, num_times):
    equation, initial = (Heat(), heat_source), (value, heat_exact)
    return stated(equation, initial, end, num_times, 14, heat_exact)


def smooth_in(*lengthscales):
    return eb.GaussianProcess(eb.Scaled(eb.Gaussian(jnp.array(lengthscales)), 4.0))


smooth = smooth_in(0.5, 0.5)


def test_heat():
    length, num = 0.2, 20
    windows = in_windows(smooth, heat(length, 5), num, length)
    assert windows.num_windows == num and windows.result == eb.RESULTS.successful
    x = grid(jnp.linspace(0.05, num * length, 33), jnp.linspace(-0.95, 0.95, 11))
    truth = jax.vmap(heat_exact)(x)
    errors, std = jnp.abs(windows(x) - truth), windows.std(x)
    assert jnp.max(errors) < 1e-4
    assert jnp.all(errors < 2 * std) and jnp.max(std) < 2e-4
    # A single solve of half of that time is as good.
    whole = eb.solve(smooth, heat(2.0, 41))
    x = x[x[:, 0] < 2]
    truth = jax.vmap(heat_exact)(x)
    errors = [jnp.max(jnp.abs(found(x) - truth)) for found in (windows, whole)]
    assert 0.5 < errors[0] / errors[1] < 2
    # What is open between the points of different windows counts as independent, so
    # that error bars are smaller after some time.
    x = x[x[:, 0] > 1]
    ratio = windows.std(x) / whole.std(x)
    assert 0.4 < jnp.min(ratio) and jnp.max(ratio) < 1.5


def test_without_a_matrix():
    solver = eb.GaussNewton(linear_solver=eb.MatrixFree(200, rtol=1e-12))
    # With the same nuggets, except for what is added where a window starts.
    conditions = [dataclasses.replace(c, nugget=1e-9) for c in heat(0.2, 4)]
    one, other = [in_windows(smooth, conditions, 3, 0.2, *s) for s in ([], [solver])]
    x = grid(jnp.linspace(0.05, 0.6, 5), jnp.linspace(-0.9, 0.9, 5))
    assert relative_error(other(x), one(x)) < 1e-6
    assert relative_error(other.std(x), one.std(x)) < 1e-3


def test_time_as_another_coordinate():
    swap = lambda x: x[..., ::-1]

    class Swapped(eqx.Module):
        def __call__(self, u, x):
            return u.d(1) - 0.1 * (1 + jnp.sin(3 * x[1])) * u.d(0, 0)

    conditions = heat(0.2, 4)
    swapped = [
        eb.Condition(
            Swapped() if c.name == "equation" else value,
            swap(c.points),
            lambda x, c=c: c.target(x[::-1]),
            name=c.name,
        )
        for c in conditions
    ]
    one = in_windows(smooth_in(0.6, 0.4), conditions, 3, 0.2)
    other = in_windows(smooth_in(0.4, 0.6), swapped, 3, 0.2, axis=1)
    x = grid(jnp.linspace(0.05, 0.6, 5), jnp.linspace(-0.9, 0.9, 5))
    assert relative_error(other(swap(x)), one(x)) < 1e-6


def test_which_window_answers():
    windows = in_windows(smooth, heat(0.2, 4), 3, 0.2)
    operator = lambda u, x: x[0] * u.value + u.d(1)
    for t, i in ((-0.1, 0), (0.0, 0), (0.19, 0), (0.21, 1), (0.59, 2), (0.8, 2)):
        x, one = jnp.array([t, 0.3]), windows.window(i)
        assert jnp.allclose(windows(x), one(x), rtol=1e-12)
        assert jnp.allclose(windows.d(0)(x), one.d(0)(x), rtol=1e-12)
        assert jnp.allclose(windows.apply(operator, x), one.apply(operator, x))
        assert jnp.allclose(windows.std(x), one.std(x), atol=1e-9)
        slope = jax.jit(jax.grad(windows))(x)
        assert jnp.allclose(slope[1], one.d(1)(x), rtol=1e-10)
    x = grid(jnp.array([0.1, 0.5]), jnp.array([0.2, 0.4]))
    each = jnp.stack([windows(point) for point in x])
    assert jnp.allclose(windows(x), each, rtol=1e-12)
    assert jnp.allclose(jax.vmap(windows)(x), each, rtol=1e-12)
    assert windows.stats["num_steps"].shape == (3,)
    assert "num_steps" in repr(windows)
    with pytest.raises(ValueError, match=r"`x` must be one point of shape \(2,\)"):
        windows(jnp.zeros(3))


def test_one_scan():
    calls = []

    def operator(u, x):
        calls.append(None)
        return Heat()(u, x)

    counts = []
    for num in (2, 3, 7):
        conditions = heat(0.2, 4)
        where = lambda c: c[0].operator
        conditions = eqx.tree_at(where, conditions, operator)
        before = len(calls)
        in_windows(smooth, conditions, num, 0.2)
        counts.append(len(calls) - before)
    assert counts[1] == counts[2] > 0  # The first also prepares what is used again.


#
# Burgers' equation
#


class Burgers(eqx.Module):
    viscosity: jax.Array

    def __call__(self, u, x):
        return u.d(0) + u.value * u.d(1) - self.viscosity * u.d(1, 1)


def burgers(end, num_times, num_points, viscosity=0.05, **kwargs):
    initial = value, lambda x: -jnp.sin(jnp.pi * x[1])
    equation = Burgers(jnp.array(viscosity)), 0.0
    return stated(equation, initial, end, num_times, num_points, **kwargs)


def test_burgers():
    prior = eb.GaussianProcess(eb.Matern(jnp.array([0.3, 0.2]), nu=4.5))
    length, num = 0.1, 10
    windows = in_windows(prior, burgers(length, 5, 61), num, length)
    t, x = jnp.array([0.1, 0.25, 0.5, 0.75, 1.0]), jnp.linspace(-0.98, 0.98, 41)
    truth = references.burgers(np.asarray(t), np.asarray(x), 0.05).reshape(-1)
    errors = jnp.abs(windows(grid(t, x)) - truth)
    assert jnp.max(errors) < 3e-4
    # The bars grow from window to window, and hold.
    std = windows.std(grid(t, x))
    assert jnp.all(errors < 2 * std)
    means = jnp.mean(std.reshape(5, -1), axis=1)
    assert jnp.all(jnp.diff(means) > 0) and means[-1] < 5e-3
    # They are not much smaller than those of a single solve, which knows more.
    whole = eb.solve(prior, burgers(3 * length, 13, 61))
    x = grid(jnp.array([0.12, 0.21, 0.3]), x)
    assert jnp.max(jnp.abs(windows(x) - whole(x))) < 2e-4
    ratio = windows.std(x) / whole.std(x)
    assert 0.7 < jnp.min(ratio) and jnp.max(ratio) < 1.1
    # Each window starts close to where it ends.
    assert jnp.max(windows.stats["num_steps"][1:]) <= windows.stats["num_steps"][0]


@pytest.mark.parametrize("adjoint", (eb.FixedPointAdjoint(), eb.FrozenAdjoint()))
def test_gradient(adjoint):
    tight = eb.GaussNewton(rtol=1e-12, atol=1e-12)
    linear = isinstance(adjoint, eb.FrozenAdjoint)
    base = heat(0.2, 3) if linear else burgers(0.2, 3, 11, 0.1)
    x = grid(jnp.array([0.1, 0.35, 0.58]), jnp.array([-0.5, 0.1, 0.7]))

    def loss(theta):
        kernel = eb.Gaussian(jnp.exp(theta[:2]))
        where = lambda c: [each.nugget for each in c]
        nugget = jnp.exp(theta[2])
        none = lambda x: x is None
        conditions = eqx.tree_at(where, base, [nugget] * 3, is_leaf=none)
        prior = eb.GaussianProcess(eb.Scaled(kernel, jnp.array(2.0)))
        windows = in_windows(prior, conditions, 3, 0.2, tight, adjoint=adjoint)
        return jnp.sum(windows(x) ** 2) + 100 * jnp.sum(windows.std(x))

    theta = jnp.log(jnp.array([0.7, 0.5, 1e-5]))
    gradient = jax.jit(jax.grad(loss))(theta)
    compiled = jax.jit(loss)
    for i in range(3):
        step = jnp.zeros(3).at[i].set(2e-3)
        central = lambda h: compiled(theta + h) - compiled(theta - h)
        difference = (8 * central(step) - central(2 * step)) / (12 * 2e-3)
        assert jnp.abs(gradient[i] - difference) < 1e-5 * jnp.abs(difference)


#
# The wave equation: two values at the start
#


class Wave(eqx.Module):
    def __call__(self, u, x):
        return u.d(0, 0) - u.d(1, 1)


def value_and_velocity(u, x):
    return [u.value, u.d(0)]


def wave_exact(x):
    return jnp.sin(jnp.pi * x[1]) * jnp.cos(jnp.pi * x[0] + 0.4)


def test_wave():
    # With measured initial data: many draws of their errors.
    length, num, noise = 0.25, 12, 0.02
    read = lambda x: jnp.stack([wave_exact(x), jax.grad(wave_exact)(x)[0]])
    prior = smooth_in(0.5, 0.4)
    base = stated((Wave(), 0.0), (value_and_velocity, 0.0), length, 7, 21, noise=noise)
    known = jax.vmap(read)(base[2].points)
    draws = noise * jax.random.normal(jax.random.key(0), (24, *known.shape))
    x = grid(jnp.array([0.2, 1.4, 2.9]), jnp.linspace(-0.8, 0.8, 6))

    def solved(error):
        at = [known[:, i] + error[:, i] for i in range(2)]
        initial = value_and_velocity, at
        conditions = stated((Wave(), 0.0), initial, length, 7, 21, noise=noise)
        windows = in_windows(prior, conditions, num, length)
        return windows(x), windows.std(x)

    found, std = jax.jit(jax.vmap(solved))(draws)
    scores = (found - jax.vmap(wave_exact)(x)[None]) / std
    spread = jnp.sqrt(jnp.mean(scores.reshape(24, 3, 6) ** 2, axis=(0, 2)))
    assert jnp.all((0.75 < spread) & (spread < 1.25))
    assert 0.003 < jnp.min(std) and jnp.max(std) < 0.04
    # As in a single solve of all the time.
    initial = value_and_velocity, [known[:, 0], known[:, 1]]
    conditions = stated((Wave(), 0.0), initial, 1.5, 37, 21, noise=noise)
    whole = eb.solve(prior, conditions)
    x = x[:12]
    ratio = std[0, :12] / whole.std(x)
    assert 0.9 < jnp.min(ratio) and jnp.max(ratio) < 1.1


#
# Several unknowns, without space
#


def predator_prey(w, x):
    u, v = w["u"], w["v"]
    return [u.d(0) - u.value * (1 - v.value), v.d(0) - v.value * (u.value - 1)]


def test_system():
    one = eb.GaussianProcess(eb.Gaussian(1.0), 1.0)
    read = lambda w, x: {"u": w["u"].value, "v": w["v"].value}
    start, length, num = {"u": jnp.array([1.5]), "v": jnp.array([0.7])}, 0.8, 20
    conditions = [
        eb.Condition(predator_prey, 1.0 + jnp.linspace(0, length, 14)[:, None]),
        eb.Condition(read, jnp.ones((1, 1)), start, name="start"),
    ]
    windows = in_windows({"u": one, "v": one}, conditions, num, length)

    def velocity(_, y):
        return [y[0] * (1 - y[1]), y[1] * (y[0] - 1)]

    t = np.linspace(1, 1 + num * length, 50)
    options = dict(t_eval=t, rtol=1e-11, atol=1e-12)
    truth = solve_ivp(velocity, (t[0], t[-1]), [1.5, 0.7], "DOP853", **options).y
    found = windows(jnp.asarray(t)[:, None])
    assert jnp.max(jnp.abs(found["u"] - truth[0])) < 1e-6
    assert jnp.max(jnp.abs(found["v"] - truth[1])) < 1e-6


#
# What goes wrong
#


def test_failed_window():
    def operator(u, x):
        return Heat()(u, x) + jnp.where(x[0] > 0.5, jnp.nan, 0.0)

    conditions = eqx.tree_at(lambda c: c[0].operator, heat(0.2, 4), operator)
    windows = in_windows(smooth, conditions, 5, 0.2, throw=False)
    failed = windows.solutions.result != eb.RESULTS.successful
    assert failed.tolist() == [False, False, True, True, True]
    assert windows.result != eb.RESULTS.successful
    assert windows.result == windows.window(2).result
    x = grid(jnp.array([0.1, 0.3, 0.5]), jnp.array([0.2]))
    truth = jax.vmap(heat_exact)(x)
    assert jnp.allclose(windows(x)[:2], truth[:2], atol=1e-3)
    assert jnp.isnan(windows(x)[2])
    with pytest.raises(eqx.EquinoxRuntimeError):
        in_windows(smooth, conditions, 5, 0.2)


def test_wrong_use():
    conditions = heat(0.2, 4)
    use = lambda conditions=conditions, num=2, length=0.2, *args, **kwargs: in_windows(
        smooth, conditions, num, length, *args, **kwargs
    )
    with pytest.raises(ValueError, match="`num_windows` must be a positive integer"):
        use(num=0)
    with pytest.raises(ValueError, match="`length` must be a finite positive number"):
        use(length=-1.0)
    with pytest.raises(ValueError, match="points at times from 0 to 0.2"):
        use(length=0.1)
    with pytest.raises(ValueError, match="`axis` must be a dimension below 2, got 2"):
        use(axis=2)
    with pytest.raises(ValueError, match="initial condition must have the same time"):
        use(axis=1)
    with pytest.raises(ValueError, match="condition 'start', but the conditions are"):
        use(conditions[:2])
    with pytest.raises(ValueError, match="which a `SparseCholesky` has not"):
        use(conditions, 2, 0.2, eb.GaussNewton(linear_solver=eb.SparseCholesky()))
