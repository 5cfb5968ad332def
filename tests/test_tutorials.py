"""The tutorials run, say what they found, and find it."""

import pathlib
import runpy

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np


matplotlib.use("Agg")

tutorials = pathlib.Path(__file__).parents[1] / "tutorials"


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


def test_diffusion(tmp_path, capsys):
    main = runpy.run_path(str(tutorials / "diffusion.py"))["main"]
    picture = tmp_path / "diffusion.png"
    learned, posterior = main(picture)
    here = jnp.zeros(2)
    centre = learned.solution(here)["log_kappa"]
    std = posterior.std(here)["log_kappa"]
    assert std > learned.solution.std(here)["log_kappa"]
    # A fit through the exact solution, for a known noise, has an error bar of 0.015.
    assert 0.01 < std < 0.03
    assert abs(centre - np.log(0.1)) < 3 * std
    assert 0.015 < learned.conditions[2].noise.value < 0.025
    printed = capsys.readouterr().out
    assert f"kappa: {np.exp(centre):.4f}" in printed and str(picture) in printed
    assert matplotlib.image.imread(picture).std() > 0.1


def test_conductivity(tmp_path, capsys, monkeypatch):
    tutorial = runpy.run_path(str(tutorials / "conductivity.py"))
    # The exact temperature, by another formula where the conductivity is constant.
    x = np.linspace(0, 1, 11)
    exact, truth = tutorial["exact"], tutorial["log_conductivity"]
    with monkeypatch.context() as patch:
        patch.setitem(exact.__globals__, "log_conductivity", np.zeros_like)
        np.testing.assert_allclose(exact(x), x * (1 - x) / 2, atol=1e-8)

    picture = tmp_path / "conductivity.png"
    learned, posterior = tutorial["main"](picture)
    x = np.linspace(0, 1, 101)
    std = np.asarray(posterior.std(x[:, None])["a"])
    error = np.asarray(learned.solution(x[:, None])["a"]) - truth(x)
    assert np.linalg.norm(error) < 0.12 * np.linalg.norm(truth(x))
    assert np.mean(np.abs(error) < 1.645 * std) > 0.8
    # No heat flows where the temperature is largest.
    top = np.argmax(exact(x))
    assert std[top] > 2 * std[10] and std[top] > 2 * std[90]
    assert 5e-4 < learned.conditions[2].noise.value < 2e-3
    assert str(picture) in capsys.readouterr().out
    assert matplotlib.image.imread(picture).std() > 0.1


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
    assert 1.5 * front < beside


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
    # The pressure does not depend on y.
    along_x, along_y = eb.unwrap(left["learned"].prior)["p"].kernel.lengthscale
    assert along_x < 1 and along_y > 3


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
