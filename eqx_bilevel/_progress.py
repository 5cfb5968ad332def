"""What happens while hyperparameters are learned, and who is told of it."""

import functools as ft
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._condition import Condition, learned_in
from ._objectives import AbstractObjective
from ._outer import merit, Outcome
from ._parameters import AbstractParameter
from ._solution import Solution


class Progress(eqx.Module):
    """One step of [`eqx_bilevel.learn`][], as its callbacks get it.

    **Attributes:**

    - `step`: Counted from one. During the scale search it is zero.
    - `steps`: The largest number of steps.
    - `seconds`: Since the start, with those before the run was resumed.
    - `seconds_left`: How long the remaining steps would take, at most: learning usually
        converges before. Not known (nan) before the second step.
    - `objective`, `best`: The objective at this step, and the smallest so far.
    - `accepted`: Whether the step was, or was taken back.
    - `inner_steps`, `jitter`: Of the inner solve.
    - `lengths`: During the scale search, the lengthscale tried for each dimension.
    - `prior`, `conditions`: With the hyperparameters of this step.
    - `solution`: The [`eqx_bilevel.Solution`][] for them.
    """

    step: int
    steps: int
    seconds: float
    seconds_left: float
    objective: float
    best: float
    accepted: bool
    inner_steps: int
    jitter: float
    lengths: tuple[float, ...] | None
    prior: Any  # See `Learned`.
    conditions: list[Any]
    solution: Solution
    # Only made if it is asked for: it grows with each step.
    _history: Callable[[], dict[str, np.ndarray]] = eqx.field(static=True, repr=False)

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Of all steps so far: see [`eqx_bilevel.Learned`][]."""
        return self._history()

    @property
    def hyperparameters(self) -> dict[str, np.ndarray]:
        """The values of those hyperparameters that have at most three numbers, by the
        place where they are: `kernel.lengthscale`, for instance.
        """
        return hyperparameters(self.prior, self.conditions)


_MOST_NUMBERS = 3

# Of what a row has.
_KINDS = dict(
    seconds=float,
    objective=float,
    best=float,
    batch=float,
    accepted=bool,
    inner_steps=int,
    jitter=float,
)


def hyperparameters(prior: PyTree, conditions: Sequence[Condition]) -> dict:
    where = {c.name or f"conditions[{i}]": c for i, c in enumerate(conditions)}
    spec_of_prior, specs = learned_in(prior, list(conditions))
    pairs = [("", prior, spec_of_prior)]
    pairs += [(name, c, s) for (name, c), s in zip(where.items(), specs)]
    is_parameter = lambda x: isinstance(x, AbstractParameter)
    found = {}
    for name, tree, spec in pairs:
        leaves, structure = jtu.tree_flatten_with_path(tree, is_leaf=is_parameter)
        for (path, leaf), learned in zip(leaves, structure.flatten_up_to(spec)):
            if not any(jax.tree.leaves(learned)):
                continue
            value = leaf.value if is_parameter(leaf) else leaf
            if np.size(value) <= _MOST_NUMBERS:
                place = jtu.keystr(path, simple=True, separator=".")
                found[f"{name}.{place}".strip(".")] = np.asarray(value)
    return found


#
# The record
#


# After as many steps in a row that were not accepted, a further one will not help.
_MOST_REJECTED = 10

Callback = Callable[[Progress], bool | None]


class Record:
    """What has happened so far, the best outcome among it, and who wants to know."""

    def __init__(
        self,
        objective: AbstractObjective,
        steps: int,
        verbose: bool | str,
        callbacks: Sequence[Callback],
    ):
        self.objective = objective
        self.steps = steps
        self.verbose = verbose
        self.callbacks = callbacks
        self.rows: list[dict[str, Any]] = []
        self.best = self.searched = np.inf
        self.outcome: Outcome | None = None
        self.stopped = False  # by a callback
        self._start = time.perf_counter()
        self._bar = _bar(steps) if verbose == "bar" else None
        self._first: tuple[int, float] | None = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def note(self, text: str) -> None:
        if self.verbose is True:
            print(text, flush=True)
        elif self._bar is not None:
            self._bar.set_description(text.rstrip("."))

    def restore(self, rows: list, seconds: float, outcome: Outcome | None) -> None:
        self.rows, self.outcome = rows, outcome
        self.best = rows[-1]["best"] if rows else np.inf
        self._start -= seconds
        if self._bar is not None:
            self._bar.update(len(rows))

    def add_search(self, lengths, outcome: Outcome, prior, conditions, solution):
        row = self._row(outcome, np.nan, False)
        self.searched = row["best"] = float(np.fmin(self.searched, row["objective"]))
        self._tell(row, lengths, prior, conditions, solution)

    def add(self, outcome, batch: float, accepted: bool, prior, conditions, solution):
        row = self._row(outcome, batch, accepted)
        if accepted and row["objective"] < self.best:
            self.best, self.outcome = row["objective"], outcome
        row["best"] = self.best
        self.rows.append(row)
        self._first = self._first or (len(self.rows), row["seconds"])
        self._tell(row, None, prior, conditions, solution)

    def _row(self, outcome: Outcome, batch: float, accepted: bool) -> dict[str, Any]:
        return dict(
            seconds=self.seconds,
            objective=float(outcome.objective),
            best=np.nan,  # Not known yet.
            batch=batch,
            accepted=accepted,
            inner_steps=int(outcome.inner_steps),
            jitter=float(outcome.jitter),
        )

    def _tell(self, row, lengths, prior, conditions, solution) -> None:
        if not (self.verbose or self.callbacks):
            return
        progress = Progress(
            step=0 if lengths else len(self.rows),
            steps=self.steps,
            seconds_left=np.nan if lengths else self._seconds_left(row["seconds"]),
            lengths=lengths,
            prior=prior,
            conditions=conditions,
            solution=solution,
            _history=ft.partial(self.history, len(self.rows)),
            **{name: value for name, value in row.items() if name != "batch"},
        )
        if self.verbose is True:
            print(_line(progress), flush=True)
        elif self._bar is not None:
            self._bar.set_description("Scale search" if lengths else "Learning")
            self._bar.set_postfix_str(_values(progress))
            self._bar.update(0 if lengths else 1)
        for callback in self.callbacks:
            self.stopped |= bool(callback(progress))

    def _seconds_left(self, seconds: float) -> float:
        # The first step of a process also compiles.
        assert self._first is not None
        step, since = self._first
        done = len(self.rows) - step
        left = self.steps - len(self.rows)
        return left * (seconds - since) / done if done else np.nan

    def history(self, num: int | None = None) -> dict[str, np.ndarray]:
        column = lambda name: [row[name] for row in self.rows[:num]]
        return {name: np.array(column(name), kind) for name, kind in _KINDS.items()}

    #
    # Whether to go on
    #

    def stalled(self, rtol: float, patience: int, since: int) -> bool:
        # Steps that were not accepted are shortened, and say little.
        rows = self.rows[since:]
        if self.gave_up(since):
            return True
        best = [row["best"] for row in rows if row["accepted"]]
        if len(best) <= patience:
            return False
        return not self.decreased(best[-1 - patience], best[-1], rtol)

    def gave_up(self, since: int) -> bool:
        rejected = [row["accepted"] for row in self.rows[since:][-_MOST_REJECTED:]]
        return len(rejected) == _MOST_REJECTED and not any(rejected)

    def decreased(self, before: float, after: float, rtol: float) -> bool:
        if np.isinf(before):
            return after < before
        before, after = merit(self.objective, np.array([before, after])).tolist()
        return before - after > rtol


def _values(progress: Progress) -> str:
    # For a bar, which has the time left itself.
    shown = f"objective {progress.objective:.1e}, best {progress.best:.1e}"
    for place, value in progress.hyperparameters.items():
        numbers = ", ".join(f"{number:.3g}" for number in np.ravel(value))
        shown += f", {place.split('.')[-1]} {numbers}"
    return shown


def _line(progress: Progress) -> str:
    values = f"objective {progress.objective:.6e}"
    if progress.lengths:
        shown = ", ".join(f"{length:.3e}" for length in progress.lengths)
        return f"scale search  lengths {shown}   {values}   {progress.seconds:.1f} s"
    line = (
        f"step {progress.step:5d}   {values}   best {progress.best:.6e}   "
        f"inner steps {progress.inner_steps:3d}   {progress.seconds:.1f} s"
    )
    if np.isfinite(progress.seconds_left):
        line += f", at most {progress.seconds_left:.0f} s left"
    for place, value in progress.hyperparameters.items():
        shown = ", ".join(f"{number:.4g}" for number in np.ravel(value))
        line += f"   {place} {shown}"
    return line if progress.accepted else line + "   not accepted"


def _bar(steps: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "`verbose='bar'` needs tqdm: install `eqx_bilevel[progress]`, or use "
            "`verbose=True`."
        ) from error
    return tqdm(total=steps, unit="step")
