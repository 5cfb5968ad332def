"""Plots of lines through functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from ._draw import label_line
from ._functions import band, dashed, EACH, half_widths, truths
from ._grid import bounding_box, Grid, make_grid
from ._style import legend, mathematical, one_or_all, panels, pyplot, VALUES
from ._values import check_unknown, choose, Values, values_of


def slices(
    solution: Any,
    domain: Any,
    at: Sequence[ArrayLike],
    *,
    axis: int = 0,
    exact: Callable | Mapping[str, Callable] | None = None,
    unknown: str | None = None,
    fix: Mapping[int, ArrayLike] | None = None,
    bars: float | None = None,
    names: Sequence[str] | None = None,
    resolution: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws lines through a solution, such as $u(t_i, x)$ at several times.

    **Arguments:**

    - `solution`, `domain`: As for [`eqx_bilevel.plot.solution`][].
    - `at`: The values of one coordinate, one for each line.

    The remaining arguments are keyword-only.

    - `axis`: Which coordinate that is. Default: the first.
    - `exact`: As for [`eqx_bilevel.plot.error`][]. Drawn as dashed lines.
    - `unknown`, `fix`, `bars`, `names`, `resolution`, `ax`: As for
        [`eqx_bilevel.plot.solution`][].

    **Returns:**

    The `Axes`, or a NumPy array of them if there are several panels.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    check_unknown(solution, unknown)
    fix = {} if fix is None else fix
    lower, _ = bounding_box(domain)
    if axis not in range(len(lower)) or axis in fix:
        raise ValueError(
            f"`axis` must be one of the {len(lower)} coordinates, from 0, that `fix` "
            f"does not hold, got {axis}."
        )
    held = [{**fix, axis: place} for place in np.ravel(np.asarray(at))]
    if len(held) == 0:
        raise ValueError("`at` must be one value or more, one for each line.")
    grids = [make_grid(domain, f, names, resolution, most_axes=1) for f in held]
    lines = [_line(solution, exact, grid, unknown, bars) for grid in grids]
    found = list(lines[0].values)
    axes = panels(len(found), ax, EACH)
    variable = mathematical(grids[0].names[axis])
    labels = [f"{variable} = {f[axis]:g}" for f in held]
    for panel, name in zip(axes, found):
        _draw_slices(panel, name, grids, lines, labels)
        legend(panel)
    return one_or_all(axes)


class _Line(NamedTuple):
    values: Values
    half: Values
    exact: Values


def _line(solution, exact, grid: Grid, unknown, bars) -> _Line:
    values = choose(values_of(solution, grid.points, "solution"), unknown)
    half = half_widths(solution, bars, grid.points)
    return _Line(values, half, truths(values, exact, grid, unknown))


def _draw_slices(ax, name: str, grids, lines, labels) -> None:
    colours = pyplot().get_cmap(VALUES)(np.linspace(0.38, 0.78, len(lines)))
    for grid, line, label, colour in zip(grids, lines, labels, colours):
        value = line.values[name]
        ax.plot(grid.ticks[0], grid.masked(value), color=colour, label=label)
        if name in line.half:
            band(ax, grid, value, line.half[name])
    for grid, line in zip(grids, lines):
        if name in line.exact:
            dashed(ax, grid, line.exact[name], "exact" if line is lines[-1] else None)
    label_line(ax, grids[0], mathematical(name))
