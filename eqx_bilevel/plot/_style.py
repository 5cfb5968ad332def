"""How plots look: on white pages and on dark ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np


# Readable on both. Anything lighter, and Jupyter puts a dark background behind plots.
GREY = "#7f7f7f"
# Close to those of Okabe and Ito, which can be told apart with any colour vision, and
# neither too light for white nor too dark for black.
COLOURS = ("#2b84c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VALUES, MAGNITUDES = "viridis", "magma"


def pyplot() -> Any:
    # Only when a plot is asked for: Matplotlib is not needed for anything else.
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            "`eqx_bilevel.plot` needs Matplotlib: install `eqx_bilevel[plot]`."
        ) from error
    return matplotlib.pyplot


def _settings() -> dict[str, Any]:
    import cycler

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color")
    grey = dict.fromkeys((*names, "xtick.color", "ytick.color"), GREY)
    clear = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    return {
        **grey,
        **clear,
        "axes.prop_cycle": cycler.cycler(color=COLOURS),
        "axes.titlecolor": "auto",
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
    }


def subplots(rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    """A figure and its axes, as `matplotlib.pyplot.subplots` makes them, that look like
    the other plots of this module: readable on white pages and on dark ones. For
    several plots in one figure.

    !!! example

        ```python
        figure, (left, right) = plot.subplots(1, 2)
        plot.solution(solution, domain, ax=left)
        plot.error(solution, exact, domain, ax=right)
        ```

    **Arguments:**

    - `rows`, `columns`: How many axes.
    - `kwargs`: Of `matplotlib.pyplot.subplots`.

    **Returns:**

    The figure, and one `Axes` or a NumPy array of them.
    """
    plt = pyplot()
    size = (4.8 * columns, 3.6 * rows)
    kwargs = {"figsize": size, "layout": "constrained", **kwargs}
    with plt.rc_context(_settings()):
        figure, axes = plt.subplots(rows, columns, **kwargs)
    for ax in np.ravel(axes):
        _colour_ticks(ax)
    return figure, axes


def _colour_ticks(ax: Any) -> None:
    # Ticks are made when they are drawn, with the settings of that time.
    style = dict(color=GREY, labelcolor=GREY)
    grid = dict(grid_color=GREY, grid_alpha=0.25, grid_linewidth=0.6)
    ax.tick_params(which="both", **style, **grid)


_MOST_COLUMNS = 3


def panels(num: int, ax: Any, what: str, **kwargs: Any) -> list[Any]:
    # `what` says in an error what there should be axes for.
    if ax is not None:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(axes) != num:
            raise ValueError(f"`ax` must be {num} axes, {what}, got {len(axes)}.")
        return axes
    columns = min(num, _MOST_COLUMNS)
    rows = -(-num // columns)
    _, grid = subplots(rows, columns, squeeze=False, **kwargs)
    axes = list(grid.ravel())
    for empty in axes[num:]:
        empty.remove()
    return axes[:num]


def one_or_all(axes: Sequence[Any]) -> Any:
    return axes[0] if len(axes) == 1 else np.array(axes, dtype=object)


def colour_bar(image: Any, ax: Any, label: str) -> None:
    # As high as the axes, if there is a layout that makes room for it; and in their
    # colours, which may be someone else's.
    laid_out = ax.figure.get_layout_engine() is not None
    inset = ax.inset_axes([1.04, 0, 0.05, 1]) if laid_out else None
    bar = ax.figure.colorbar(image, cax=inset, ax=None if laid_out else ax)
    colour = ax.xaxis.label.get_color()
    bar.set_label(label, color=colour)
    bar.ax.tick_params(which="both", color=colour, labelcolor=colour)
    bar.ax.yaxis.get_offset_text().set_color(colour)
    bar.outline.set_visible(False)


def legend(ax: Any, **kwargs: Any) -> None:
    colour = ax.xaxis.label.get_color()
    ax.legend(frameon=False, labelcolor=colour, **kwargs)


def mathematical(name: str) -> str:
    # Letters, perhaps with a digit, in italics; words as they are.
    letter, _, index = name.partition("_")
    single = len(letter) == 1 and letter.isalpha()
    return f"${name}$" if single and (index.isdigit() or name == letter) else name
