"""Plots of functions: solutions, their errors and standard deviations."""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from ._draw import draw, draw_magnitude
from ._grid import Grid, make_grid
from ._style import GREY, legend, mathematical, one_or_all, panels
from ._values import check_unknown, choose, pairs, stds_of, Values, values_of


EACH = "one for each unknown (or name one with `unknown`)"


def solution(
    solution: Any,
    domain: Any,
    *,
    unknown: str | None = None,
    fix: Mapping[int, ArrayLike] | None = None,
    bars: float | None = None,
    exact: Callable | Mapping[str, Callable] | None = None,
    names: Sequence[str] | None = None,
    resolution: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws a solution: a line in one dimension, colours in two.

    **Arguments:**

    - `solution`: An [`eqx_bilevel.Solution`][], something that has one (what
        [`eqx_bilevel.learn`][] or [`eqx_bilevel.laplace`][] returns), a function of one
        point, or a dictionary of these. A derivative, for instance, is
        `solution.d(0)`.
    - `domain`: An [`eqx_bilevel.Box`][], or another domain with `bounds` and
        `contains`. What is outside of it is left blank.

    The remaining arguments are keyword-only.

    - `unknown`: The name of the unknown to draw. Default: all, in a panel for each.
    - `fix`: Coordinates that are held, as in `fix={0: 0.5}`: one or two must remain.
    - `bars`: A probability, such as 0.9, for a band that contains the function's value
        at each point with it. For lines only; in two dimensions see
        [`eqx_bilevel.plot.std`][].
    - `exact`: The exact solution, as for [`eqx_bilevel.plot.error`][], drawn as a
        dashed line. For lines only.
    - `names`: The names of all coordinates, as in `names=("t", "x")`.
    - `resolution`: How many points, for each coordinate. Default: 400 for a line, 100
        for colours.
    - `ax`: The Matplotlib `Axes` to draw into, one for each panel. Default: a new
        figure.

    **Returns:**

    The `Axes`, or a NumPy array of them if there are several panels.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    check_unknown(solution, unknown)
    grid = make_grid(domain, fix, names, resolution)
    if len(grid.axes) == 2 and not (bars is None and exact is None):
        raise ValueError(
            "`bars` and `exact` are for lines, but two coordinates vary. Hold one with "
            "`fix`, or draw `plot.std` and `plot.error`."
        )
    half = half_widths(solution, bars, grid.points)
    values = choose(values_of(solution, grid.points, "solution"), unknown)
    truth = truths(values, exact, grid, unknown)
    axes = panels(len(values), ax, EACH)
    for ax, (name, value) in zip(axes, values.items()):
        draw(ax, grid, value, mathematical(name))
        if bars is not None:
            band(ax, grid, value, half[name], f"{100 * bars:g} %")
        if name in truth:
            dashed(ax, grid, truth[name])
        if bars is not None or name in truth:
            legend(ax)
    return one_or_all(axes)


def half_widths(found: Any, bars: float | None, points) -> Values:
    if bars is None:
        return {}
    if not 0 < bars < 1:
        raise ValueError(f"`bars` must be between 0 and 1, a probability, got {bars}.")
    factor = NormalDist().inv_cdf(0.5 + 0.5 * bars)
    return {name: factor * std for name, std in stds_of(found, points).items()}


def band(ax, grid: Grid, value, half, label: str | None = None) -> None:
    # Around the line that was drawn last, in its colour.
    low, high = grid.masked(value - half), grid.masked(value + half)
    style = dict(color=ax.lines[-1].get_color(), alpha=0.25, linewidth=0)
    ax.fill_between(grid.ticks[0], low, high, label=label, **style)


def truths(values: Values, exact: Any, grid: Grid, unknown: str | None) -> Values:
    # The exact values of unknowns, where they are known.
    if exact is None:
        return {}
    found = pairs(values, values_of(exact, grid.points, "exact"), unknown)
    return {name: truth for name, _, truth in found}


def dashed(ax, grid: Grid, value, label: str | None = "exact") -> None:
    style = dict(color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    ax.plot(grid.ticks[0], grid.masked(value), label=label, **style)


def error(
    solution: Any,
    exact: Callable | Mapping[str, Callable],
    domain: Any,
    *,
    unknown: str | None = None,
    fix: Mapping[int, ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    resolution: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws the absolute error of a solution, on a logarithmic scale if it is of
    different orders of magnitude.

    **Arguments:**

    - `solution`: As for [`eqx_bilevel.plot.solution`][].
    - `exact`: A function of one point, as targets are. With several unknowns it returns
        a dictionary, or is one of functions, also of some of the unknowns only. Another
        [`eqx_bilevel.Solution`][] does as well.
    - `domain`: As for [`eqx_bilevel.plot.solution`][].

    The remaining arguments are keyword-only: as for [`eqx_bilevel.plot.solution`][].

    **Returns:**

    The `Axes`, or a NumPy array of them if there are several panels.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    check_unknown(solution, unknown)
    grid = make_grid(domain, fix, names, resolution)
    values = values_of(solution, grid.points, "solution")
    found = pairs(values, values_of(exact, grid.points, "exact"), unknown)
    axes = panels(len(found), ax, EACH)
    for ax, (name, value, truth) in zip(axes, found):
        label = _of("absolute error", name)
        draw_magnitude(ax, grid, np.abs(value - truth), label)
    return one_or_all(axes)


def _of(what: str, name: str) -> str:
    return f"{what} of {mathematical(name)}" if name else what


def std(
    solution: Any,
    domain: Any,
    *,
    unknown: str | None = None,
    fix: Mapping[int, ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    resolution: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws posterior standard deviations, on a logarithmic scale if they are of
    different orders of magnitude.

    **Arguments:**

    - `solution`: An [`eqx_bilevel.Solution`][], or what [`eqx_bilevel.learn`][] or
        [`eqx_bilevel.laplace`][] returns. In the last case they include what is not
        known of the hyperparameters.
    - `domain`: As for [`eqx_bilevel.plot.solution`][].

    The remaining arguments are keyword-only: as for [`eqx_bilevel.plot.solution`][],
    but the default of `resolution` is 50 for colours.

    **Returns:**

    The `Axes`, or a NumPy array of them if there are several panels.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    check_unknown(solution, unknown)
    grid = make_grid(domain, fix, names, resolution, defaults=(400, 50))
    values = choose(stds_of(solution, grid.points), unknown)
    axes = panels(len(values), ax, EACH)
    for ax, (name, value) in zip(axes, values.items()):
        draw_magnitude(ax, grid, value, _of("standard deviation", name))
    return one_or_all(axes)
