"""Plots show the numbers that they should, and leave everything else alone."""

import subprocess
import sys

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from eqx_bilevel import plot
from eqx_bilevel._scale import Tried
from matplotlib.colors import LogNorm, Normalize


box = eb.Box([0.0, -1.0], [2.0, 1.0])
line = eb.Box(0.0, 1.0)


def _disk():
    return eb.Ball([1.0, 0.0], 2.0)


def wave(x):
    return jnp.sin(x[0]) * x[1]


def curve(u, x):
    return -u.d(0, 0) + u.value**3


def value(u, x):
    return u.value


def _both(u, x):
    return u["u"].value, u["a"].value


@pytest.fixture(scope="module")
def one():
    # One unknown in one dimension, nonlinear.
    conditions = [
        eb.Condition(curve, line.interior(8, method="grid"), 20.0, name="curve"),
        eb.Condition(value, line.boundary(2), name="ends"),
    ]
    prior = eb.GaussianProcess(eb.Gaussian(0.4))
    return eb.solve(prior, conditions, eb.GaussNewton(1e-6, 1e-6))


@pytest.fixture(scope="module")
def two():
    # Two unknowns in two dimensions.
    points = box.interior(12, key=jax.random.key(0))
    data = jax.vmap(wave)(points), points[:, 0]
    conditions = [eb.Condition(_both, points, data, noise=0.1, name="data")]
    prior = {
        "u": eb.GaussianProcess(eb.Gaussian([1.0, 0.7])),
        "a": eb.GaussianProcess(2.0 * eb.Gaussian(1.0)),
    }
    return eb.solve(prior, conditions)


@pytest.fixture(scope="module")
def learned():
    points = line.interior(9, method="grid")
    noise = 0.1 * jax.random.normal(jax.random.key(1), (9,))
    data = jnp.sin(6 * points[:, 0]) + noise
    conditions = [eb.Condition(value, points, data, noise=eb.Positive(0.2))]
    prior = eb.GaussianProcess(eb.Gaussian(0.3))
    objective = eb.NegativeLogEvidence()
    objective += eb.NegativeLogHyperprior(prior, conditions)
    found = eb.learn(prior, conditions, objective, scale_search=3)
    return found, eb.laplace(found, objective)


@pytest.fixture(autouse=True)
def nothing_changes():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


def image_of(ax):
    (image,) = ax.images
    return image


def bar_label(ax):
    return image_of(ax).colorbar.ax.get_ylabel()


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def lattice(first, second):
    x, y = np.meshgrid(first, second, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


#
# Functions
#


def test_line(one):
    ax = plot.solution(one, line, names=["r"], resolution=31)
    (drawn,) = ax.lines
    x = np.linspace(0, 1, 31)
    np.testing.assert_array_equal(drawn.get_xdata(), x)
    np.testing.assert_array_equal(drawn.get_ydata(), one(x[:, None]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$r$", "$u$")
    assert ax.get_xlim() == (0, 1) and ax.get_legend() is None


def test_colours_of_each_unknown(two):
    axes = plot.solution(two, box, names=("t", "depth"), resolution=20)
    assert axes.shape == (2,)
    t, x = np.linspace(0, 2, 20), np.linspace(-1, 1, 20)
    for ax, name in zip(axes, ("a", "u")):
        # The first coordinate is horizontal.
        expected = two(lattice(t, x))[name].reshape(20, 20).T
        np.testing.assert_allclose(image_of(ax).get_array(), expected, rtol=1e-12)
        # Centres of the pixels at the corners are corners of the box.
        left, right, bottom, top = image_of(ax).get_extent()
        width, height = (right - left) / 20, (top - bottom) / 20
        assert np.isclose(left + width / 2, 0) and np.isclose(right - width / 2, 2)
        assert np.isclose(bottom + height / 2, -1) and np.isclose(top - height / 2, 1)
        assert image_of(ax).origin == "lower"
        assert ax.get_xlim() == (0, 2) and ax.get_ylim() == (-1, 1)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("$t$", "depth")
        assert bar_label(ax) == f"${name}$"


def test_one_unknown_along_a_line_with_its_band(two):
    held = dict(unknown="a", fix={0: 0.5}, names=("t", "x"), resolution=11)
    ax = plot.solution(two, box, bars=0.9, exact=lambda x: x[0] * x[1], **held)
    x = np.linspace(-1, 1, 11)
    points = np.stack([np.full(11, 0.5), x], axis=1)
    centre, half = two(points)["a"], 1.6448536269514722 * two.std(points)["a"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), centre, rtol=1e-12)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for end, i in ((-1.0, 0), (0.2, 6), (1.0, 10)):
        heights = corners[np.isclose(corners[:, 0], end), 1]
        np.testing.assert_allclose(np.min(heights), (centre - half)[i], rtol=1e-10)
        np.testing.assert_allclose(np.max(heights), (centre + half)[i], rtol=1e-10)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x$", "$a$")
    assert texts(ax) == ["90 %", "exact"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 0.5 * x)
    assert ax.lines[1].is_dashed()


@pytest.mark.parametrize(
    "fn",
    [
        wave,
        jax.jit(wave),
        lambda x: np.sin(x[0]) * x[1],  # Not for tracers.
        lambda x: wave(x)[None],
        {"w": wave},
        lambda x: {"w": wave(x)},
    ],
)
def test_functions_of_a_point(fn):
    ax = plot.solution(fn, box, resolution=60)  # More than one chunk.
    t, x = np.linspace(0, 2, 60), np.linspace(-1, 1, 60)
    expected = np.sin(t)[None, :] * x[:, None]
    np.testing.assert_allclose(image_of(ax).get_array(), expected, atol=1e-14)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_0$", "$x_1$")


def test_derivatives_and_single_precision(one):
    ax = plot.solution(one.d(0), line, resolution=9)
    expected = one.d(0)(np.linspace(0, 1, 9)[:, None])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected, rtol=1e-9)
    dtypes = []

    def recorded(x):
        dtypes.append(x.dtype)
        return x[0]

    single = eb.Box(jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32))
    ax = plot.solution(recorded, single, resolution=9)
    assert set(dtypes) == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.linspace(0, 1, 9), 1e-6)


def test_outside_is_blank():
    ax = plot.solution(lambda x: jnp.sqrt(4 - (x[0] - 1) ** 2 - x[1] ** 2), _disk())
    x, y = np.linspace(-1, 3, 200), np.linspace(-2, 2, 200)
    squares = 4 - (x[None, :] - 1) ** 2 - y[:, None] ** 2
    shown = image_of(ax).get_array()
    np.testing.assert_array_equal(shown.mask, squares < 0)
    np.testing.assert_allclose(
        shown.compressed(), np.sqrt(squares[squares >= 0]), atol=1e-7
    )
    assert ax.get_aspect() == 1  # A disk is round.
    # A chord.
    ax = plot.solution(wave, _disk(), fix={1: 1.0}, resolution=41)
    x = np.linspace(-1, 3, 41)
    drawn = ax.lines[0].get_ydata()
    np.testing.assert_array_equal(drawn.mask, np.abs(x - 1) > np.sqrt(3))


def test_three_dimensions():
    cube = eb.Box([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    fn = lambda x: x[0] + 10 * x[1] + 100 * x[2]
    ax = plot.solution(fn, cube, fix={1: 0.5}, resolution=3)
    expected = 5 + np.array([0, 0.5, 1]) + 100 * np.array([0, 1.5, 3])[:, None]
    np.testing.assert_allclose(image_of(ax).get_array(), expected)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_0$", "$x_2$")
    ax = plot.solution(fn, cube, fix={0: 0.0, 2: 1}, resolution=3)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [100, 110, 120])


def test_error(two):
    exact = {"u": wave}  # Of one unknown only.
    ax = plot.error(two, exact, box, resolution=15)
    points = lattice(np.linspace(0, 2, 15), np.linspace(-1, 1, 15))
    truth = np.sin(points[:, 0]) * points[:, 1]
    expected = np.abs(two(points)["u"] - truth)
    drawn = image_of(ax)
    np.testing.assert_allclose(drawn.get_array().T.ravel(), expected, atol=1e-14)
    assert bar_label(ax) == "absolute error of $u$"
    ax = plot.error(two, lambda x: x[0], box, unknown="a", resolution=15)
    expected = np.abs(two(points)["a"] - points[:, 0])
    np.testing.assert_allclose(image_of(ax).get_array().T.ravel(), expected, atol=1e-14)
    zero = plot.error(two, two, box, resolution=5)
    assert all(np.all(image_of(ax).get_array() == 0) for ax in zero)


def test_error_is_logarithmic_if_it_has_many_sizes():
    zero, small = (lambda x: 0.0 * x[0]), (lambda x: 1e-3 + x[0])
    many = lambda x: 10.0 ** (-6 * x[0])
    square = eb.Box([0.0, 0.0], [1.0, 1.0])
    ax = plot.error(many, zero, square)
    norm = image_of(ax).norm
    assert isinstance(norm, LogNorm) and 1e-6 <= norm.vmin < 2e-6 and norm.vmax == 1
    norm = image_of(plot.error(small, lambda x: -1.0 + 0 * x[0], square)).norm
    assert type(norm) is Normalize and norm.vmin == 0
    ax = plot.error(many, zero, line)
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] > 1e-7
    assert plot.error(small, lambda x: -1.0 + 0 * x[0], line).get_yscale() == "linear"


def test_std(two):
    axes = plot.std(two, box, resolution=8)
    points = lattice(np.linspace(0, 2, 8), np.linspace(-1, 1, 8))
    for ax, name in zip(axes, ("a", "u")):
        drawn = image_of(ax).get_array().T.ravel()
        np.testing.assert_allclose(drawn, two.std(points)[name], rtol=1e-10)
        assert bar_label(ax) == f"standard deviation of ${name}$"


def test_slices(two):
    exact = {"a": lambda x: x[0] + x[1]}
    axes = plot.slices(
        two, box, [0.5, 1.5], exact=exact, bars=0.5, names=("t", "x"), resolution=6
    )
    x = np.linspace(-1, 1, 6)
    for ax, name in zip(axes, ("a", "u")):
        for drawn, t in zip(ax.lines, (0.5, 1.5)):
            expected = two(np.stack([np.full(6, t), x], axis=1))[name]
            np.testing.assert_allclose(drawn.get_ydata(), expected, rtol=1e-12)
        assert len(ax.collections) == 2
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x$", f"${name}$")
    assert texts(axes[1]) == ["$t$ = 0.5", "$t$ = 1.5"] and len(axes[1].lines) == 2
    assert texts(axes[0]) == ["$t$ = 0.5", "$t$ = 1.5", "exact"]
    for drawn, t in zip(axes[0].lines[2:], (0.5, 1.5)):
        np.testing.assert_allclose(drawn.get_ydata(), x + t)
        assert drawn.is_dashed()
    ax = plot.slices(wave, box, [1.0], axis=1, resolution=6)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.sin(np.linspace(0, 2, 6)))


#
# Problems
#


def test_points(one, two):
    ax = plot.points(one)
    heights = [tick.get_text() for tick in ax.get_yticklabels()]
    assert heights == ["curve", "ends"]
    for i, (drawn, condition) in enumerate(zip(ax.lines, one.conditions, strict=True)):
        np.testing.assert_array_equal(drawn.get_xdata(), condition.points[:, 0])
        assert set(drawn.get_ydata()) == {i}
    unnamed = eb.Condition(value, box.boundary(8, key=jax.random.key(0)))
    ax = plot.points([*two.conditions, unnamed], axes=(1, 0), names=("t", "x"))
    assert texts(ax) == ["data", "conditions[1]"]
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), unnamed.points[:, 1])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), unnamed.points[:, 0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x$", "$t$")
    assert ax.lines[0].get_color() != ax.lines[1].get_color()


def test_lengthscales_inside_other_kernels():
    each = lambda x: jnp.stack([1 + x[0] ** 2, 2 + x[1]])
    common = lambda x: 1 + x[0] ** 2
    nested = 3.0 * eb.Gibbs(each) + eb.Gaussian(1.0) * eb.Stretched(
        eb.Subspace(eb.Gibbs(common), 1), jnp.array([5.0, 2.0])
    )
    warped = eb.Warped(eb.Gibbs(lambda z: z[0]), lambda x: x[:1] * x[1:] + 3)
    prior = {
        "u": eb.GaussianProcess(nested),
        "v": eb.GaussianProcess(eb.Gaussian(1.0)),
        "w": eb.GaussianProcess(1.0 * eb.Scaled(eb.Frozen(warped), 2.0)),
    }
    axes = plot.lengthscales(prior, box, names=("t", "x"), resolution=7)
    t, x = np.linspace(0, 2, 7)[None, :], np.linspace(-1, 1, 7)[:, None]
    expected = {
        "lengthscale 1 of $u$, $t$": 1 + t**2,
        "lengthscale 1 of $u$, $x$": 2 + x,
        # At half the coordinate, and twice the length.
        "lengthscale 2 of $u$, $x$": 2 * (1 + (x / 2) ** 2),
        "lengthscale of $w$": t * x + 3,
    }
    assert [bar_label(ax) for ax in axes] == list(expected)
    for ax, field in zip(axes, expected.values()):
        field = np.broadcast_to(field, (7, 7))
        np.testing.assert_allclose(image_of(ax).get_array(), field)
    # After a search there is a factor as well.
    kernel = eb.rescale(eb.Gibbs(common), 0.5)
    ax = plot.lengthscales(kernel, line, resolution=5)
    expected = 0.5 * (1 + np.linspace(0, 1, 5) ** 2)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
    assert ax.get_ylabel() == "lengthscale"


#
# Progress
#


def test_learning(learned):
    found, posterior = learned
    axes = plot.learning(found)
    best, taken = axes[0].lines[:2]
    np.testing.assert_array_equal(best.get_ydata(), found.history["best"])
    accepted = found.history["accepted"]
    expected = np.where(accepted, found.history["objective"], np.nan)
    np.testing.assert_array_equal(taken.get_ydata(), expected)
    tried = sorted(found.scale_search)
    np.testing.assert_array_equal(
        axes[1].lines[0].get_xydata(), [(*t.lengths, t.objective) for t in tried]
    )
    ring = axes[1].lines[1].get_xydata()
    least = min(tried, key=lambda t: t.objective)
    np.testing.assert_array_equal(ring, [(*least.lengths, least.objective)])
    # Into one Axes go the steps only.
    _, ax = plt.subplots()
    assert plot.learning(found, ax=ax) is ax and len(ax.lines) >= 2

    # What has a solution can be drawn like one.
    x = np.linspace(0, 1, 7)
    ax = plot.solution(found, line, resolution=7)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), found.solution(x[:, None]))
    ax = plot.std(posterior, line, resolution=7)
    drawn = ax.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, posterior.std(x[:, None]), rtol=1e-10)
    assert np.all(drawn > found.solution.std(x[:, None]))


def test_refused_steps_and_lengths_of_each_dimension(one):
    history = dict(
        objective=np.array([100.0, np.nan, 300.0, 1.0]),
        best=np.array([100.0, 100.0, 100.0, 1.0]),
        accepted=np.array([True, False, False, True]),
    )
    searched = [
        Tried((1.0, 1.0), 5.0),
        Tried((2.0, 1.0), 3.0),
        Tried((4.0, 1.0), np.inf),
    ]
    found = eb.Learned(
        one.prior, one.conditions, one, jnp.array(1.0), True, history, searched
    )
    axes = plot.learning(found, names=("t", "x"))
    assert texts(axes[0]) == ["best", "accepted", "not accepted"]
    refused, lost = axes[0].lines[2:]
    np.testing.assert_array_equal(refused.get_ydata(), [np.nan, np.nan, 300, np.nan])
    np.testing.assert_array_equal(lost.get_xdata(), [2])  # At the top.
    assert lost.get_transform() == axes[0].get_xaxis_transform()
    assert axes[0].get_yscale() == "log"
    assert texts(axes[1]) == ["$t$", "$x$", "best"]
    np.testing.assert_array_equal(
        axes[1].lines[0].get_xydata(), [(1, 5), (2, 3), (4, np.nan)]
    )
    np.testing.assert_array_equal(axes[1].lines[2].get_xydata(), [(2, 3), (1, 3)])
    negative = dict(history, objective=-history["objective"], best=-history["best"])
    found = eb.Learned(
        one.prior, one.conditions, one, jnp.array(1.0), True, negative, []
    )
    assert plot.learning(found).get_yscale() == "linear"


def test_convergence(one):
    ax = plot.convergence(one, eb.GaussNewton(1e-6, 1e-6))
    change = ax.lines[0].get_ydata()
    assert len(change) == one.stats["num_steps"] > 2
    np.testing.assert_allclose(change[-1], one.stats["change"], rtol=1e-6)
    # By solving up to each step.
    for num in range(1, len(change)):
        solver = eb.GaussNewton(1e-6, 1e-6)
        part = eb.solve(one.prior, one.conditions, solver, max_steps=num, throw=False)
        np.testing.assert_allclose(change[num - 1], part.stats["change"], rtol=1e-6)
    assert ax.get_yscale() == "log"
    again = plot.convergence(one, eb.GaussNewton(1e-6, 1e-6), initial=one)
    assert len(again.lines[0].get_ydata()) < len(change)


#
# Everything else
#


def test_given_axes_keep_their_style(two):
    figure, given = plt.subplots(1, 2)
    axes = plot.solution(two, box, ax=given, resolution=5)
    assert list(axes) == list(given) and plt.get_fignums() == [figure.number]
    assert axes[0].xaxis.label.get_color() == "black"
    assert image_of(axes[0]).colorbar.ax.yaxis.label.get_color() == "black"


def test_figures_are_for_light_and_dark_pages():
    figure, ax = plot.subplots()
    plot.solution(wave, box, fix={0: 1.0}, ax=ax)
    assert figure.get_facecolor()[3] == 0 and ax.get_facecolor()[3] == 0

    def luminance(colour):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    def contrast(*colours):
        dark, light = sorted(map(luminance, colours))
        return (light + 0.05) / (dark + 0.05)

    figure.draw_without_rendering()  # Ticks are made as late as here.
    grey = {text.get_color() for text in ax.get_xticklabels() + ax.get_yticklabels()}
    grey |= {tick.get_color() for tick in ax.get_xticklines() + ax.get_yticklines()}
    grey |= {ax.xaxis.label.get_color(), ax.spines["left"].get_edgecolor()[:3]}
    colours = [plot._style.COLOURS[0], *plot._style.COLOURS[1:4], *grey]
    for colour in colours:
        assert min(contrast(colour, page) for page in ("white", "#1e1e1e")) > 2.9
    assert ax.lines[0].get_color() == plot._style.COLOURS[0]


def test_matplotlib_is_imported_when_a_plot_is():
    program = "import sys, eqx_bilevel.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"eqx_bilevel\[plot\]"):
        plot.solution(wave, box)


def test_wrong_use(two):
    cube = eb.Box([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    gibbs = eb.Gibbs(wave)
    for match, call in [
        ("`unknown` must be one of", lambda: plot.solution(two, box, unknown="b")),
        ("`solution` must be", lambda: plot.solution(3.0, box)),
        ("function of one point", lambda: plot.solution(lambda x: x[:, 0], box)),
        ("`solution` must return one", lambda: plot.solution(lambda x: x, box)),
        ("`domain` must be", lambda: plot.solution(wave, [0.0, 1.0])),
        (r"fix=\{2: 1.5\}", lambda: plot.solution(wave, cube)),
        ("`fix` holds all", lambda: plot.solution(wave, box, fix={0: 0.1, 1: 0.1})),
        ("`fix` must have integers", lambda: plot.solution(wave, box, fix={2: 0.1})),
        ("is in `domain`", lambda: plot.solution(wave, box, fix={0: 3.0})),
        ("is in `domain`", lambda: plot.solution(wave, _disk(), fix={0: 3.5})),
        ("`names` must be 2", lambda: plot.solution(wave, box, names=["t"])),
        ("`resolution` must", lambda: plot.solution(wave, box, resolution=1)),
        ("are for lines", lambda: plot.solution(two, box, bars=0.9)),
        ("are for lines", lambda: plot.solution(two, box, exact=two)),
        ("`bars` must be", lambda: plot.solution(two, box, bars=2.0, fix={0: 1.0})),
        ("deviations are", lambda: plot.solution(wave, box, bars=0.9, fix={0: 1.0})),
        ("`ax` must be 2 axes, one", lambda: plot.solution(two, box, ax=object())),
        ("deviations are", lambda: plot.std(wave, box)),
        ("`exact` must be", lambda: plot.error(two, wave, box)),
        ("`exact` must be", lambda: plot.error(two, {"b": wave, "c": wave}, box)),
        ("`axis` must be", lambda: plot.slices(two, box, [0.0], axis=2)),
        ("`axis` must be", lambda: plot.slices(two, box, [0.0], fix={0: 0.0})),
        ("`at` must be", lambda: plot.slices(two, box, [])),
        (r"Hold the others by `fix`", lambda: plot.slices(wave, cube, [0.0])),
        ("`conditions` must be", lambda: plot.points([wave])),
        ("`axes` must be two", lambda: plot.points(two, axes=(0, 2))),
        ("`eqx_bilevel.Gibbs`", lambda: plot.lengthscales(two, box)),
        ("`prior` must be", lambda: plot.lengthscales(wave, box)),
        ("`ax` must be 1 axes", lambda: plot.lengthscales(gibbs, box, ax=[1, 2])),
        ("`solution` must be", lambda: plot.convergence(wave)),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
