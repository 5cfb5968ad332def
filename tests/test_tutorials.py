"""The tutorials run, say what they found, and find it."""

import pathlib
import re
import runpy

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import scipy.integrate


matplotlib.use("Agg")

root = pathlib.Path(__file__).parents[1]
tutorials, benchmarks = root / "tutorials", root / "benchmarks"


def _run(name):
    # What a script leaves behind. Pages have one picture or more.
    left = runpy.run_path(str(tutorials / name))
    assert len(plt.get_fignums()) > 0
    plt.close("all")
    return left


def _rms(values):
    return np.sqrt(np.mean(np.square(values)))


def _modes(k, x, y):
    return np.sin(k * np.pi * x) * np.sin(k * np.pi * y)


def _finite_difference_error(n):
    # In closed form: sines are eigenvectors of the discrete Laplacian too.
    h = 1 / (n + 1)
    x, y = np.meshgrid(*2 * [h * np.arange(1, n + 1)])
    error = 0.0
    for k, amplitude in ((1, 1.0), (4, 4.0)):
        exact = 2 * (k * np.pi) ** 2
        discrete = 8 * (np.sin(k * np.pi * h / 2) / h) ** 2
        error = error + amplitude * (exact / discrete - 1) * _modes(k, x, y)
    return np.max(np.abs(error))


def test_inverse(capsys):
    left = _run("inverse.py")
    # The temperature, in closed form where the conductivity is constant.
    x = np.linspace(0, 1, 101)
    temperature, truth = left["temperature"], left["log_conductivity"]
    assert np.allclose(temperature(x), _by_quadrature(truth, x), rtol=0, atol=1e-7)

    solution, posterior = left["solution"], left["posterior"]
    std = np.asarray(posterior.std(x[:, None])["a"])
    given = np.asarray(solution.std(x[:, None])["a"])
    error = np.asarray(solution(x[:, None])["a"]) - truth(x)
    assert np.all(std >= given)
    # Where heat flows, it is found; less well at the very end, as its bar says.
    assert np.max(np.abs(error[50:96])) < 0.06
    assert np.all(np.abs(error[50:]) < 3 * std[50:])
    assert np.max(np.abs(error) / std) < 3
    assert np.mean(np.abs(error) < 1.645 * std) > 0.8
    # Where none flows, the prior's standard deviation is hardly reduced.
    a = eb.unwrap(left["learned"].prior["a"]).kernel
    assert 0.4 < std[0] / np.sqrt(a.variance) < 1.0
    assert std[0] > 20 * std[70]
    sigma = left["learned"].conditions[2].noise.value
    assert abs(np.log(sigma / left["noise"])) < 0.5
    # The error bar of the noise: a factor of 1 + 1 / sqrt(2 n), for n data.
    bar = posterior.std_of(lambda prior, conditions: conditions[2].noise)
    assert 0.7 < bar / sigma * np.sqrt(60) < 1.5

    squares = lambda s: np.mean(np.square(s.standardised_errors("data")))
    assert 0.5 < squares(solution) < 1.7 and squares(left["constant"]) > 50
    # The constant by least squares, with the temperature in closed form.
    places, data = np.asarray(left["places"][:, 0]), np.asarray(left["data"])
    shape = 0.5 * (1 - places**2)
    best = -np.log(shape @ data / (shape @ shape))
    assert abs(left["constant"](jnp.array([0.7]))["a"] - best) < 0.01
    assert f"noise: {sigma:.1e}" in capsys.readouterr().out


def _by_quadrature(log_conductivity, x):
    # -exp(a) u' = x, u(1) = 0.
    flow = lambda s: s * np.exp(-log_conductivity(s))
    return [scipy.integrate.quad(flow, start, 1, epsabs=1e-10)[0] for start in x]


def test_darcy(capsys):
    left = _run("darcy.py")
    # The data, by a spectral method.
    references = runpy.run_path(str(benchmarks / "experiments" / "references.py"))
    places = np.asarray(left["places"])
    exact = references["darcy"](places)
    np.testing.assert_allclose(left["true_pressure"](places), exact, atol=2e-6)
    assert np.max(exact) > 0.02
    sigma = left["learned"].conditions[2].noise.value
    assert abs(np.log(sigma / left["noise"])) < 0.4
    # Half of what a constant would be off by, which is the best without any data.
    axis = np.linspace(0.05, 0.95, 13)
    where = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    truth = references["darcy_log_permeability"](where)
    found, std = left["solution"](where)["a"], left["solution"].std(where)["a"]
    assert _rms(found - truth) < 0.5 * np.std(truth)
    assert 0.8 < np.mean(np.abs(found - truth) < 1.645 * std) <= 1.0
    assert f"noise: {sigma:.1e}" in capsys.readouterr().out


def test_reuse(capsys):
    left = _run("reuse.py")
    # The exact solution obeys the equation, by differences, and starts as it should.
    a, h = left["family"][3], 1e-4
    exact = lambda t, x: float(left["exact"](a, jnp.array([t, x])))
    for t, x in ((0.3, 0.2), (0.8, -0.6)):
        u_t = (exact(t + h, x) - exact(t - h, x)) / (2 * h)
        u_x = (exact(t, x + h) - exact(t, x - h)) / (2 * h)
        u_xx = (exact(t, x + h) - 2 * exact(t, x) + exact(t, x - h)) / h**2
        assert abs(u_t + exact(t, x) * u_x - left["viscosity"] * u_xx) < 1e-5
    start = -0.8 * np.sin(0.3 * np.pi) + 0.4 * np.sin(0.6 * np.pi)
    assert abs(exact(0.0, 0.3) - start) < 1e-12

    guess, reused = np.asarray(left["error_guess"]), np.asarray(left["error_reused"])
    anew = np.array(left["error_anew"])
    assert np.all(left["ok"]) and np.max(reused) < 6e-3
    assert np.all(reused < 3 * anew)
    # Where a guess is poor.
    assert np.all(reused[guess > 1e-2] < 0.4 * guess[guess > 1e-2])
    assert np.sum(guess > 1e-2) == 3
    # The picture shows these solutions, mapped over: the same as one by one.
    prior, conditions = left["learned"].prior, left["conditions"](a)
    one = eb.solve(prior, conditions)(left["test_points"][:50])
    np.testing.assert_allclose(left["found"][3][:50], one, atol=1e-6)
    assert left["seconds_reused"] < left["seconds_anew"]
    assert "all solved: True" in capsys.readouterr().out


def test_layer():
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        left = _run("layer.py")
    # For small strengths, the middle is 5/4 - strength * integral of G u^3.
    s = np.linspace(0, 1, 2001)
    change = np.trapezoid(0.5 * np.minimum(s, 1 - s) * (5 * s * (1 - s)) ** 3, s)
    layer, reference = left["layer"], left["reference"]
    for strength in (0.0, 1e-3):
        expected = 1.25 - strength * change
        assert abs(layer(jnp.array(strength)) - expected) < 1e-4
        assert abs(reference(strength) - expected) < 1e-5
    np.testing.assert_allclose(jax.grad(layer)(jnp.array(0.0)), -change, rtol=1e-3)
    np.testing.assert_allclose(left["slope"], left["difference"], rtol=1e-3)

    before, after = left["errors"].values()
    assert after < 0.1 and before > 0.5
    unseen = np.asarray(left["unseen"])
    truth = 1 + np.sin(3 * unseen[:, 0]) * unseen[:, 1]
    found = np.asarray(jax.vmap(left["network"])(left["unseen"]))
    assert np.corrcoef(found, truth)[0, 1] > 0.99
    assert left["losses"][-1] < 0.05 * left["losses"][0]


def test_second_order():
    left = _run("second_order.py")
    runs = left["runs"]
    best = {name: run.history["best"] for name, run in runs.items()}
    lm, bfgs, adam = best.values()
    # One minimum, which two of them find, the first in fewer steps.
    np.testing.assert_allclose(lm[-1], bfgs[-1], rtol=1e-3)
    assert len(lm) < len(bfgs) < len(adam) == 200 and adam[-1] > lm[-1]
    # It is one, by an objective computed anew with coefficients a little off.
    law = runs["LevenbergMarquardt"].conditions[0].operator
    prior = runs["LevenbergMarquardt"].prior

    def objective(factor):
        moved = eqx.tree_at(
            lambda l: l.stiffness, law, eb.Positive(law.stiffness.value * factor)
        )
        equation = eb.Condition(moved, left["points"], nugget=1e-6, name="equation")
        return float(left["held_out"](eb.solve(prior, [equation, left["measured"]])))

    low, middle, high = map(objective, (0.99, 1.0, 1.01))
    np.testing.assert_allclose(middle, lm[-1], rtol=1e-3)
    assert middle < low and middle < high
    # The noise allows some percent.
    for name, value in left["true"].items():
        assert abs(getattr(law, name).value / value - 1) < 0.08
    points = left["span"].grid(50)
    error = runs["LevenbergMarquardt"].solution(points) - left["exact"](points[:, 0])
    assert np.max(np.abs(error)) < 0.03


def test_trouble(capsys):
    left = _run("trouble.py")
    printed = capsys.readouterr().out
    # Bratu's equation: the exact solution obeys it, and beyond 3.51 there is none.
    theta, x = float(left["theta"]), np.asarray(left["grid"][:, 0])
    u = 2 * np.log(np.cosh(theta) / np.cosh(theta * (1 - 2 * x)))
    second = np.diff(u, 2) / (x[1] - x[0]) ** 2
    assert np.max(np.abs(second + 2 * np.exp(u[1:-1]))) < 1e-3
    assert np.isclose(left["true_slope"], (u[1] - u[0]) / x[1] + x[1], atol=1e-2)
    rows = [line.split() for line in printed.splitlines()]
    ends = {row[0]: row[-1] for row in rows if "steps," in row}
    solved = [strength for strength, end in ends.items() if end == "successful"]
    assert solved == ["0.5", "1.0", "2.0", "3.0", "3.5"]
    assert ends["3.6"] == ends["4.0"] == "solver"

    # Too small, right, too large: errors, and what can be told without them.
    errors, norms = np.asarray(left["errors"]), np.asarray(left["norms"])
    between, at_points = np.asarray(left["left"]), np.asarray(left["at_points"])
    assert np.isclose(errors[0], np.max(u), rtol=1e-3)  # It is the prior's mean.
    assert errors[3] < 1e-6 and errors[-1] > 0.1
    assert between[0] > 2 and at_points[0] < 1e-12 and norms[0] < 0.01
    assert between[3] < 1e-3 and at_points[-1] > 0.05 and norms[-1] > 1e3
    # The claim, less the exact slope, in units of its noise.
    assert np.isclose(left["off"], (5 - left["true_slope"]) / 0.1, rtol=0.02)

    # Without its boundary values it is about zero, where they are one.
    without, with_them = left["best"]
    assert left["candidates"][without] > 10 and left["wrong"][without] > 0.9
    assert left["candidates"][with_them] < 0.1 and left["wrong"][with_them] < 0.1

    flat, curved, bars = (np.asarray(left[k]) for k in ("flat", "curved", "bars"))
    assert np.ptp(flat) < 1e-2 and np.ptp(curved) > 5
    # Error bars go with the root of the variance.
    np.testing.assert_allclose(bars[1:] / bars[:-1], 10, rtol=0.15)
    # The solution is exact: errors in units of what is claimed.
    squares = np.mean(np.square(left["errors_of_data"])) / np.square(left["claims"])
    np.testing.assert_allclose(left["squares"], squares, rtol=1e-2)

    # The slope is claimed twice, and only the wrong one shows in the objective.
    objectives = re.findall(r"^slope .*: objective ([^,]*),", printed, re.MULTILINE)
    assert float(objectives[0]) < 1e-6 and float(objectives[1]) > 1
    # Error bars that the equation has put right: they hold, at any variance.
    bars_of, deviations = left["bars_of"], np.abs(left["deviations"])[1:-1]
    for bar in bars_of.values():
        np.testing.assert_allclose(bar[1:-1], bars_of[1.0][1:-1], rtol=1e-2)
        assert 0.2 < np.max(deviations / bar[1:-1]) < 3


def test_saving(capsys):
    left = _run("saving.py")
    # It stopped when told to.
    assert left["log"][-1][2] < 0.005 <= left["log"][-2][2]
    assert len(left["learned"].history["best"]) == len(left["log"]) < 60
    assert capsys.readouterr().out.count("the same: True") == 2
    assert len(left["rows"]) == 20
    # The exact solution, in other words.
    x = np.linspace(0, 1, 41)
    truth = scipy.integrate.solve_bvp(
        lambda x, y: np.stack([y[1], (y[1] - 1) / 0.01]),
        lambda a, b: np.array([a[0], b[0]]),
        np.linspace(0, 1, 400),
        np.zeros((2, 400)),
        tol=1e-8,
    ).sol(x)[0]
    error = lambda solution: np.max(np.abs(solution(x[:, None]) - truth))
    assert error(left["narrower"].solution) < 0.03
    before = left["objective"](left["as_it_is"])
    assert left["narrower"].objective < before


def test_elliptic(tmp_path, capsys):
    main = runpy.run_path(str(tutorials / "elliptic.py"))["main"]
    picture = tmp_path / "elliptic.png"
    runs = main(quick=True, picture=picture)
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}

    expected = _finite_difference_error(10)
    assert np.isclose(float(rows["finite"][-2]), expected, rtol=0.05)
    assert float(rows["Gaussian"][-2]) < 0.1 * expected

    # At other points than the tutorial's own.
    x, y = (a.reshape(-1) for a in np.meshgrid(*2 * [np.linspace(0, 1, 41)]))
    points = jnp.stack([x, y], axis=1)
    truth = _modes(1, x, y) + 4 * _modes(4, x, y)
    for start in (0.1, 1.0):
        learned, _ = runs[start, True]
        error = np.max(np.abs(learned.solution(points) - truth))
        assert error < 0.02
        # start, then twice: lengthscale, steps, maximum and RMS error, seconds.
        row = rows[f"{start:g}"]
        lengthscale = learned.prior.kernel.lengthscale.value
        assert np.isclose(float(row[6]), lengthscale, rtol=0, atol=1e-4)
        assert np.isclose(float(row[8]), error, rtol=0.3)
    assert matplotlib.image.imread(picture).std() > 0.1
    assert str(picture) in printed


def test_first(capsys):
    left = _run("first.py")
    # At other points than the script's own, and with derivatives by hand.
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 2))
    square = np.sum(x**2, axis=1)
    solution = left["solution"]
    error = np.abs(solution(x) - np.log(8) + 2 * np.log(1 - square))
    assert 5e-4 < error.max() < 4e-3
    slope = 4 * x[:, 0] / (1 - square)
    assert np.max(np.abs(solution.d(0)(x) - slope)) < 0.1
    assert np.mean(error < 2 * np.asarray(solution.std(x))) > 0.85
    assert f"{left['error'].max():.1e}" in capsys.readouterr().out


def test_lengthscale():
    left = _run("lengthscale.py")
    # The source, by hand: products of sines are eigenfunctions of the Laplacian.
    x = np.random.default_rng(0).uniform(0, 1, (100, 2))
    one = np.sin(np.pi * x).prod(axis=1)
    two = 0.5 * np.sin(np.pi * x * np.array([[3, 2]])).prod(axis=1)
    source = np.pi**2 * (2 * one + 13 * two) + (one + two) ** 3
    np.testing.assert_allclose(jax.vmap(left["source"])(jnp.asarray(x)), source)

    learned, errors = left["learned"], left["errors"]
    error = _rms(learned.solution(x) - one - two)
    assert error < 1e-5 and error < 1e-4 * left["error_before"]
    # It ends where the error is about as small as with any other lengthscale.
    assert error < 3 * np.min(errors)
    assert np.min(errors) < 1e-3 * min(errors[0], errors[-1])
    frozen = left["frozen"].prior.kernel.lengthscale.value
    assert np.isclose(frozen, left["found"], rtol=0.1)
    assert left["radius"] < 1e-4 < 1e-2 < left["radii"].max()


def test_burgers_network():
    left = _run("burgers_network.py")
    # The exact solution, from the heat equation that Cole and Hopf reduce it to, by
    # quadrature on a line instead of at Gauss-Hermite nodes.
    nu, (t, x) = left["viscosity"], (0.6, np.linspace(-0.9, 0.9, 13))
    y = np.linspace(-6, 6, 20001)[:, None]
    log_heat = -((x - y) ** 2) / (4 * nu * t) - np.cos(np.pi * y) / (2 * np.pi * nu)
    heat = np.exp(log_heat - log_heat.max())
    truth = (heat * (x - y) / t).sum(axis=0) / heat.sum(axis=0)
    points = jnp.stack([jnp.full(13, t), jnp.asarray(x)], axis=1)
    np.testing.assert_allclose(jax.vmap(left["exact"])(points), truth, atol=1e-9)

    neural, gaussian = left["neural"], left["gaussian"]
    assert _rms(neural.solution(points) - truth) < 3e-3
    assert neural.objective < 0.1 * gaussian.objective
    assert left["errors"]["network"] < 0.3 * left["errors"]["Gaussian"]
    # Short at the front, long beside it.
    lengthscale = eb.unwrap(neural.prior).kernel.lengthscale
    front, beside = (lengthscale(jnp.array([0.7, x])) for x in (0.0, 0.7))
    assert 1.2 * front < beside


def test_kernels():
    left = _run("kernels.py")
    errors, learned = left["errors"], left["learned"]
    x = np.linspace(-1, 1, 317)
    truth = np.sin(np.pi * x) + np.tanh(20 * x)
    # Of two scales: the names of the second part have overwritten the first's.
    warped = learned["warped"]
    error = np.max(np.abs(warped.solution(x[:, None]) - truth))
    assert error < 1e-4 and np.isclose(
        np.log10(error), np.log10(errors["warped"]), atol=1
    )
    local = left["local"]
    assert 5 * local[200] < min(local[0], local[-1])

    # Of four coordinates.
    x = np.random.default_rng(0).uniform(0, 1, (300, 4))
    truth = np.sin(np.pi * x[:, 0]) + np.cos(2 * np.pi * x[:, 1])
    truth += np.exp(-x[:, 2]) + x[:, 3] ** 3
    found = {
        k: np.max(np.abs(s.solution(x) - truth))
        for k, s in learned.items()
        if k != "warped"
    }
    assert found["additive"] < 1e-5 < 1e-3 < found["Gaussian"]


def test_systems():
    left = _run("systems.py")
    # Kovasznay's flow, by hand: Reynolds number 20.
    rate = 10 - np.sqrt(100 + 4 * np.pi**2)
    x, y = np.random.default_rng(0).uniform([[-0.5, -0.5]], [[1.0, 0.5]], (200, 2)).T
    decay = np.exp(rate * x)
    truth = {
        "u": 1 - decay * np.cos(2 * np.pi * y),
        "v": rate / (2 * np.pi) * decay * np.sin(2 * np.pi * y),
        "p": (1 - decay**2) / 2,
    }
    found = left["learned"].solution(np.stack([x, y], axis=1))
    for name, values in truth.items():
        error = np.max(np.abs(found[name] - values))
        assert error < 1e-3 and error < 3 * left["errors"][name][1]
        assert left["errors"][name][1] < 0.5 * left["errors"][name][0]


def test_own():
    left = _run("own.py")
    # The soliton, and its momentum over the whole line, by hand.
    t, x = np.random.default_rng(0).uniform([[0], [-5]], [[1], [7]], (2, 200))
    truth = np.cosh((x - 2 * t) / np.sqrt(2)) ** -2.0
    solution = left["learned"].solution
    error = np.max(np.abs(solution(np.stack([t, x], axis=1)) - truth))
    assert error < 1e-4 and error < 1e-3 * left["errors"]["as given"]
    np.testing.assert_allclose(left["known"], 4 / 3 * np.sqrt(2), rtol=1e-4)
    assert abs(left["found"].speed - 2) < 0.02
