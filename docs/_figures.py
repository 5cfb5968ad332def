"""Draws the figures of `method.md`, into `_static`:

    python docs/_figures.py

What they show is computed by the library, except for the diagram. Their colours read
on white and on dark pages.
"""

import pathlib

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

GREY, BLUE, ORANGE = "#7f848c", "#3f8fd2", "#d9822b"
folder = pathlib.Path(__file__).parent / "_static"

plt.rcParams.update(
    {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "font.size": 13,
        "legend.frameon": False,
        "mathtext.fontset": "cm",
        "svg.hashsalt": "eqx_bilevel",  # The same file each time.
    }
)


def save(figure, name):
    metadata = {"Date": None, "Creator": None}
    figure.savefig(folder / name, bbox_inches="tight", metadata=metadata)


#
# The two problems
#


def box(axes, x, y, width, height, title, lines, colour):
    patch = matplotlib.patches.FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="none",
        edgecolor=colour,
        linewidth=2,
    )
    axes.add_patch(patch)
    top = y + height - 0.35
    axes.text(x + 0.25, top, title, color=colour, fontsize=15, va="center")
    for i, line in enumerate(lines):
        axes.text(x + 0.25, top - 0.5 * (i + 1), line, va="center")


def arrow(axes, x, start, end):
    style = dict(arrowstyle="-|>", color=GREY, linewidth=2, mutation_scale=20)
    axes.annotate("", (x, end), (x, start), arrowprops=style)


def bilevel():
    figure, axes = plt.subplots(figsize=(8.2, 5.2))
    axes.set(xlim=(-0.05, 10.05), ylim=(-0.05, 6.25))
    axes.axis("off")
    outer = [
        r"minimise $\mathcal{J}(\theta, u^\star(\theta))$ over lengthscales, networks,",
        "noise, coefficients: by BFGS, Adam, Levenberg-Marquardt",
    ]
    inner = [
        r"$u^\star(\theta)$: the most probable function of the prior $k_\theta$ that",
        "meets equation, boundary values and data at the points:",
        "by Gauss-Newton steps with one factorisation each",
    ]
    box(axes, 0, 4.35, 10, 1.8, "Outer problem: eb.learn", outer, ORANGE)
    box(axes, 0, 0, 10, 2.3, "Inner problem: eb.solve", inner, BLUE)
    arrow(axes, 0.8, 4.3, 2.35)
    arrow(axes, 9.2, 2.35, 4.3)
    axes.text(1.1, 3.33, r"hyperparameters $\theta$", va="center")
    back = r"$u^\star(\theta)$ and its gradient"
    axes.text(8.9, 3.33, back, va="center", ha="right")
    save(figure, "bilevel.svg")


#
# The solution as a sum of kernel sections
#


def representer():
    lengthscale, load = 0.14, lambda x: 10 * jnp.sin(3 * x)
    inside = jnp.linspace(0.0, 1.0, 7)[1:-1, None]
    conditions = [
        eb.Condition(lambda u, x: -u.d(0, 0), inside, lambda x: load(x[0])),
        eb.Condition(lambda u, x: u.value, jnp.array([[0.0], [1.0]])),
    ]
    prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
    solution = eb.solve(prior, conditions)
    x = jnp.linspace(0.0, 1.0, 301)

    kernel = lambda x, y: jnp.exp(-0.5 * ((x - y) / lengthscale) ** 2)
    curvature = jax.grad(jax.grad(kernel, argnums=1), argnums=1)
    sections = [(0.0, kernel), (1.0, kernel)]
    sections += [(p, lambda x, y: -curvature(x, y)) for p in inside[:, 0]]
    columns = jnp.stack([jax.vmap(lambda x: f(x, p))(x) for p, f in sections], axis=1)
    found = solution(x[:, None])
    weights = jnp.linalg.lstsq(columns, found)[0]
    pieces = columns * weights
    assert jnp.abs(pieces.sum(axis=1) - found).max() < 1e-6 * jnp.abs(found).max()

    figure, axes = plt.subplots(figsize=(8.2, 3.8))
    for i, ((p, _), piece) in enumerate(zip(sections, pieces.T)):
        label = "weighted sections, one per condition" if i == 0 else None
        axes.plot(x, piece, color=BLUE, linewidth=1.2, label=label)
        axes.plot([p], [0], "o", color=BLUE, markersize=5, clip_on=False)
    axes.plot(x, found, color=ORANGE, linewidth=3, label=r"their sum, $u^\star$")
    exact = (10 / 9) * (jnp.sin(3 * x) - x * jnp.sin(3.0))
    axes.plot(x, exact, "--", color=GREY, linewidth=1.5, label="exact solution")
    axes.set(xlabel="x", ylabel="u")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    save(figure, "representer.svg")


#
# What the frozen gradient leaves out
#


def frozen():
    strength, load, point = 50.0, 60.0, jnp.array([[0.5]])
    value = eb.Condition(lambda u, x: u.value, jnp.array([[0.0], [1.0]]), nugget=1e-8)

    def found(operator, target, length):  # The solution at the one point of the PDE.
        equation = eb.Condition(operator, point, target, nugget=1e-8)
        prior = eb.GaussianProcess(eb.Gaussian(length))
        return eb.solve(prior, [equation, value])(point[0])

    def step(z, length):  # T: the equation linearised at u = z, and solved.
        slope, rest = 3 * strength * z**2, 2 * strength * z**3
        linear = lambda u, x: -u.d(0, 0) + slope * u.value
        return found(linear, load + rest, length)

    cubic = lambda u, x: -u.d(0, 0) + strength * u.value**3
    before, after = jnp.array(0.15), jnp.array(0.175)
    z = jnp.linspace(0.4, 0.95, 111)
    curves = jax.jit(jax.vmap(jax.vmap(step, (0, None)), (None, 0)))
    lower, upper = curves(z, jnp.stack([before, after]))
    start, end = found(cubic, load, before), found(cubic, load, after)
    one_step = step(start, after)
    assert jnp.abs(step(start, before) - start) < 1e-6

    figure, axes = plt.subplots(figsize=(6.2, 4.8))
    axes.plot(z, z, color=GREY, linewidth=1)
    axes.plot(z, lower, color=BLUE, linewidth=2)
    axes.plot(z, upper, color=ORANGE, linewidth=2)
    axes.text(0.4, lower[0] - 0.03, r"$T(z, \theta)$", color=BLUE, va="top")
    last = r"$T(z, \theta + \mathrm{d}\theta)$"
    axes.text(0.4, upper[0] + 0.03, last, color=ORANGE, va="bottom")
    axes.text(0.92, 0.94, "$z$", ha="right", va="bottom")
    style = dict(arrowstyle="-|>", color=GREY, linewidth=2, mutation_scale=16)
    axes.annotate("", (start, one_step), (start, start), arrowprops=style)
    axes.annotate("", (end, end), (start, one_step), arrowprops=style)
    axes.text(start - 0.02, (start + one_step) / 2, "frozen", ha="right", va="center")
    middle = ((start + end) / 2 - 0.02, (one_step + end) / 2 + 0.03)
    axes.text(*middle, "left out", ha="right", va="bottom")
    axes.plot([start, end], [start, end], "o", color=GREY, markersize=7)
    axes.text(start + 0.02, start - 0.01, r"$z^\star(\theta)$", va="top")
    name = r"$z^\star(\theta + \mathrm{d}\theta)$"
    axes.text(end + 0.01, end - 0.03, name, va="top")
    axes.set(xlabel="point of linearisation", ylabel="after one step")
    save(figure, "frozen.svg")


if __name__ == "__main__":
    bilevel()
    representer()
    frozen()
