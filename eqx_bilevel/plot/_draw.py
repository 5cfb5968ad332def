"""One function, in one panel."""

from typing import Any

import numpy as np

from ._grid import Grid
from ._style import colour_bar, MAGNITUDES, mathematical, VALUES


def draw(ax: Any, grid: Grid, values: np.ndarray, label: str) -> None:
    # A line, or colours.
    shown = grid.masked(values)
    if len(grid.axes) == 1:
        ax.plot(grid.ticks[0], shown)
        label_line(ax, grid, label)
    else:
        _image(ax, grid, shown, label, cmap=VALUES)


def draw_magnitude(ax: Any, grid: Grid, values: np.ndarray, label: str) -> None:
    # The same of something that is positive, if of many sizes then on a logarithmic
    # scale.
    shown = grid.masked(values)
    low, high = _span(shown)
    many = high > _DECADES * low > 0
    if len(grid.axes) == 1:
        ax.plot(grid.ticks[0], shown)
        label_line(ax, grid, label)
        if many:
            ax.set_yscale("log")
            ax.set_ylim(0.5 * low, 2 * high)
        else:
            ax.set_ylim(bottom=0)
    elif many:
        from matplotlib.colors import LogNorm

        norm = LogNorm(low, high, clip=True)
        _image(ax, grid, shown, label, cmap=MAGNITUDES, norm=norm)
    else:
        _image(ax, grid, shown, label, cmap=MAGNITUDES, vmin=0.0)


# A line's zeros alone do not make a logarithmic scale.
_DECADES = 100
_NEGLIGIBLE = 0.01


def _span(shown: np.ma.MaskedArray) -> tuple[float, float]:
    numbers = shown.compressed()
    if numbers.size == 0:
        return 0.0, 0.0
    return float(np.quantile(numbers, _NEGLIGIBLE)), float(numbers.max())


def label_line(ax: Any, grid: Grid, label: str) -> None:
    (axis,), (ticks,) = grid.axes, grid.ticks
    ax.set(xlabel=mathematical(grid.names[axis]), ylabel=label)
    ax.set_xlim(ticks[0], ticks[-1])


def _image(ax: Any, grid: Grid, shown: np.ma.MaskedArray, label: str, **style: Any):
    # Pixels are centred on the points, so those at the rim reach beyond it.
    ends = [(t[0], t[-1]) for t in grid.ticks]
    half = [0.5 * (b - a) / (len(t) - 1) for (a, b), t in zip(ends, grid.ticks)]
    extent = [x for (a, b), h in zip(ends, half) for x in (a - h, b + h)]
    image = ax.imshow(
        shown.T,
        origin="lower",
        extent=extent,
        interpolation="bilinear",
        aspect=_aspect(grid),
        **style,
    )
    ax.grid(False)
    names = [mathematical(grid.names[axis]) for axis in grid.axes]
    ax.set(xlim=ends[0], ylim=ends[1], xlabel=names[0], ylabel=names[1])
    colour_bar(image, ax, label)


def _aspect(grid: Grid) -> str:
    # True to scale in space, unless that makes a strip.
    lengths = [np.ptp(t) for t in grid.ticks]
    strip = max(lengths) >= 2 * min(lengths)
    time = "t" in [grid.names[axis] for axis in grid.axes]
    return "auto" if strip or time else "equal"
