"""The solve with the best hyperparameters, at the end of learning."""

import warnings

import numpy as np
from jaxtyping import PyTree

from ._outer import evaluate, Outcome, Start, Task
from ._progress import Record
from ._results import RESULTS
from ._runs import FEW_INNER_STEPS, MANY_INNER_STEPS, warm, with_inner_steps
from ._solution import Solution


# A tenth of a sum of squares, or as much of a logarithm.
_WORTH_A_WARNING = 0.1


def last_solve(
    theta: PyTree, task: Task, start: Start, record: Record, rtol: float
) -> tuple[Solution, Outcome]:
    # `start` is for if nothing was found that it could start from.
    best = record.outcome
    if best is not None:
        start = warm(best, best.jitter)
    few = with_inner_steps(task, FEW_INNER_STEPS)
    many = with_inner_steps(task, MANY_INNER_STEPS)
    found = _solved(theta, few, start)
    if found[0].result != RESULTS.successful:
        found = _solved(theta, many, start)
    if best is not None and _is_worse(record, found[1], rtol):
        # There may be several solutions, and going on from where the best solve ended
        # led to another one. From where that solve began it takes the same way.
        again = _solved(theta, many, best.start)
        found = solution, outcome = min(found, again, key=_rank)
        worse = _is_worse(record, outcome, _WORTH_A_WARNING)
        # Who asks for one inner step at a time knows that they do not converge.
        known = int(task.max_inner_steps) == 1
        if solution.result == RESULTS.successful and worse and not known:
            _warn(record, outcome)
    return found


def _solved(theta: PyTree, task: Task, start: Start) -> tuple[Solution, Outcome]:
    found, outcome = evaluate(theta, task, start)
    return found.solution, outcome


def _is_worse(record: Record, outcome: Outcome, rtol: float) -> bool:
    value = float(outcome.objective)
    return not np.isfinite(value) or record.decreased(value, record.best, rtol)


def _rank(found: tuple[Solution, Outcome]) -> tuple[bool, float]:
    solution, outcome = found
    value = float(outcome.objective)
    failed = bool(solution.result != RESULTS.successful)
    return failed, value if np.isfinite(value) else np.inf


def _warn(record: Record, outcome: Outcome) -> None:
    warnings.warn(
        f"The smallest objective while learning was {record.best:.3g}, but that of the "
        f"solution which is returned is {float(outcome.objective):.3g}: with these "
        "hyperparameters the inner solve ends elsewhere if it takes more steps. Allow "
        "more of them from the start (`max_inner_steps`), or use more points.",
        stacklevel=5,
    )
