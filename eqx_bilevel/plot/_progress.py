"""Plots of how learning went."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._gauss_newton import GaussNewton
from .._learn import Learned
from .._solution import Solution
from .._solve import solve
from ._grid import coordinate_names
from ._style import COLOURS, GREY, legend, mathematical, one_or_all, panels
from ._values import solution_of


def learning(
    learned: Learned, *, names: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Draws how learning went: the objective at each step and the best so far, with
    crosses for steps that were not accepted. If there was a scale search then what it
    tried is drawn beside it.

    The objective's axis is logarithmic if it is positive and spans a factor of ten.

    **Arguments:**

    - `learned`: What [`eqx_bilevel.learn`][] returned.

    The remaining arguments are keyword-only.

    - `names`: The names of all coordinates, for their lengthscales in the search.
    - `ax`: The Matplotlib `Axes` to draw into: one for the steps, or two, for the scale
        search as well. Default: a new figure.

    **Returns:**

    The `Axes`; with a scale search, a NumPy array of two.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    if not isinstance(learned, Learned):
        raise ValueError(
            "`learned` must be what `eqx_bilevel.learn` returned, got a "
            f"{type(learned).__name__}."
        )
    single = ax is not None and np.size(np.asarray(ax, dtype=object)) == 1
    searched = len(learned.scale_search) > 0 and not single
    what = "for the steps and the scale search" if searched else "for the steps"
    axes = panels(1 + searched, ax, what)
    _draw_steps(axes[0], learned.history)
    if searched:
        _draw_search(axes[1], learned, names)
    return one_or_all(axes)


def _draw_steps(ax: Any, history: dict[str, np.ndarray]) -> None:
    ax.set(xlabel="step", ylabel="objective")
    if len(history["best"]) == 0:
        return
    objective, best = (_finite(history[k]) for k in ("objective", "best"))
    accepted = np.asarray(history["accepted"], bool)
    step = np.arange(1, len(best) + 1)
    ax.plot(step, best, color=COLOURS[0], drawstyle="steps-post", label="best")
    style = dict(linestyle="none", markersize=4)
    taken = np.where(accepted, objective, np.nan)
    ax.plot(step, taken, color=COLOURS[0], marker="o", label="accepted", **style)
    if not np.all(accepted):
        # Those without a finite objective are at the top.
        refused, known = np.invert(accepted), np.isfinite(objective)
        style = dict(style, color=COLOURS[1], marker="x", markersize=5)
        shown = np.where(refused & known, objective, np.nan)
        ax.plot(step, shown, label="not accepted", **style)
        lost = step[refused & np.invert(known)]
        height = np.full(len(lost), 0.97)
        ax.plot(lost, height, transform=ax.get_xaxis_transform(), **style)
    _logarithmic(ax, objective, best)
    ax.xaxis.get_major_locator().set_params(integer=True)
    legend(ax)


def _draw_search(ax: Any, learned: Learned, names: Sequence[str] | None) -> None:
    lengths = np.array([tried.lengths for tried in learned.scale_search])
    objective = _finite([tried.objective for tried in learned.scale_search])
    dim = lengths.shape[1]
    labels = [mathematical(name) for name in coordinate_names(names, dim)]
    if np.allclose(lengths, lengths[:, :1]):  # One length, the same for all dimensions.
        lengths, labels = lengths[:, :1], [None]
    # Of those at the same place, the first are seen around the others.
    sizes = 4.0 + 2.5 * np.arange(len(labels))[::-1]
    for column, label, size in zip(lengths.T, labels, sizes):
        order = np.argsort(column, kind="stable")
        style = dict(marker="o", markersize=size, linestyle="none", label=label)
        if label is None:
            style = dict(style, linestyle="-", linewidth=1)
        ax.plot(column[order], objective[order], **style)
    if np.any(np.isfinite(objective)):
        best = np.nanargmin(objective)
        ring = dict(marker="o", markersize=13, markerfacecolor="none", color=GREY)
        height = np.full(lengths.shape[1], objective[best])
        ax.plot(lengths[best], height, linestyle="none", label="best", **ring)
    ax.set_xscale("log")
    _logarithmic(ax, objective)
    ax.set(xlabel="lengthscale in the scale search", ylabel="objective")
    legend(ax)


def convergence(
    solution: Any,
    solver: GaussNewton = GaussNewton(),
    *,
    initial: Callable | Mapping[str, Callable] | Solution | None = None,
    ax: Any = None,
) -> Any:
    """Draws how the inner solver converges: by how much a full step would change the
    unknown at each step, relatively. Steps that were shortened are hollow, and crosses
    are those that were tried again with a larger nugget.

    A solution does not have its history. So the inner problem is solved again, with the
    hyperparameters of the solution, by this solver and from this start, which should be
    those that it was found with.

    **Arguments:**

    - `solution`: An [`eqx_bilevel.Solution`][], or what [`eqx_bilevel.learn`][]
        returned.
    - `solver`: The inner solver, as for [`eqx_bilevel.solve`][].

    The remaining arguments are keyword-only.

    - `initial`: As for [`eqx_bilevel.solve`][].
    - `ax`: The Matplotlib `Axes` to draw into. Default: a new figure.

    **Returns:**

    The `Axes`.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    solution = solution_of(solution)
    if not isinstance(solution, Solution):
        raise ValueError(
            "`solution` must be an `eqx_bilevel.Solution`, got a "
            f"{type(solution).__name__}."
        )
    (ax,) = panels(1, ax, "for all steps")
    _draw_changes(ax, *_history(solution, solver, initial))
    ax.set(xlabel="step", ylabel="relative change of a full step")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def _draw_changes(ax: Any, change, step_size, jitter) -> None:
    # Where the nugget was raised, the step was not taken, and the change is the last.
    raised = np.append(False, np.diff(jitter) > 0)
    full = np.invert(raised) & (step_size == 1)
    shortened = np.invert(raised | full)
    step = np.arange(1, len(change) + 1)
    ax.plot(step[~raised], change[~raised], color=COLOURS[0])
    dot = dict(color=COLOURS[0], marker="o")
    cross = dict(color=COLOURS[1], marker="x")
    kinds = (
        (full, "full step", dot),
        (shortened, "shortened", dict(dot, markerfacecolor="none")),
        (raised, "nugget raised", cross),
    )
    for which, label, style in kinds:
        if np.any(which):
            style = dict(style, linestyle="none", label=label)
            ax.plot(step[which], change[which], **style)
    legend(ax)
    if np.any(change > 0):
        ax.set_yscale("log")


# What the solver reports. Were the function that fills it a new one each time then
# everything would be compiled again.
_reports: list[tuple[float, ...]] = []


def _report(change, step_size, jitter) -> None:
    append = lambda *numbers: _reports.append(tuple(map(float, numbers)))
    jax.debug.callback(append, change[1], step_size[1], jitter[1], ordered=True)


def _history(
    solution: Solution, solver: GaussNewton, initial
) -> tuple[np.ndarray, ...]:
    solver = dataclasses.replace(solver, verbose=_report)
    num = int(solution.stats["max_steps"])
    problem = solution.prior, solution.conditions
    _reports.clear()
    found = solve(*problem, solver, initial=initial, max_steps=num, throw=False)
    jax.block_until_ready(found.weights)
    jax.effects_barrier()
    change, step_size, jitter = np.array(_reports).T
    return _finite(change), step_size, jitter


def _finite(numbers: Any) -> np.ndarray:
    numbers = np.asarray(numbers, float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _logarithmic(ax: Any, *numbers: np.ndarray) -> None:
    found = np.concatenate([x[np.isfinite(x)] for x in numbers])
    if found.size > 0 and found.max() > 10 * found.min() > 0:
        ax.set_yscale("log")
