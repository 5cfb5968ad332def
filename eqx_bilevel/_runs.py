"""Runs of an optimiser, and their stages.

All that changes in a run is a PyTree, which a checkpoint can keep.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ._ahead import compiling, is_placed, stand_ins
from ._optimiser import Optimiser
from ._outer import (
    evaluate,
    Found,
    optax_step,
    optimistix_init,
    optimistix_step,
    Outcome,
    Start,
    Task,
)
from ._progress import Record
from ._quasi_newton import BoundedBFGS
from ._results import RESULTS
from ._solution import Solution


# Enough for the scale search, where a solve that needs more is at a bad scale, and most
# often for the last solve, which starts where another ended.
FEW_INNER_STEPS = 10
# If few are not enough.
MANY_INNER_STEPS = 100


def with_inner_steps(task: Task, num: ArrayLike) -> Task:
    return dataclasses.replace(task, max_inner_steps=jnp.asarray(num))


def warm(outcome: Outcome, jitter: Array) -> Start:
    return Start(outcome.next_z, jnp.array(False), jitter)


#
# One run of an optimiser
#


class _Taken(NamedTuple):
    # What one step of a run found.
    theta: PyTree
    solution: Solution
    outcome: Outcome
    batch: float
    accepted: bool
    last: bool
    converged: bool


class _Call(NamedTuple):
    # Of the program that computes derivatives, and makes a step.
    program: Callable
    args: tuple


def _attempt(call: _Call) -> Any:
    # Derivatives raise where a linear solve in them meets nan, which cannot be switched
    # off. That must not end the loop.
    try:
        return call.program(*call.args)
    except eqx.EquinoxRuntimeError:
        return None


class _OptaxRun(eqx.Module):
    theta: PyTree
    start: Start
    opt_state: Any
    # The step that led here, if there is one: from where, which way, and how far.
    base: PyTree
    updates: PyTree
    length: float
    moved: bool

    def call(self, optimiser, task: Task, found: Found, outcome: Outcome, key) -> _Call:
        del outcome
        args = optimiser, self.opt_state, self.theta, task, found, key
        return _Call(optax_step, args)

    def step(self, optimiser, task: Task, key: PRNGKeyArray) -> "tuple[_Run, _Taken]":
        found, outcome = evaluate(self.theta, task, self.start)
        step = _attempt(self.call(optimiser, task, found, outcome, key))
        batch = np.nan if step is None else float(step.value)
        accepted = step is not None and bool(step.ok)
        if step is not None and accepted:
            run = dataclasses.replace(
                self,
                start=warm(outcome, outcome.jitter),
                opt_state=step.opt_state,
                base=self.theta,
                updates=step.updates,
                length=min(1.0, 2 * self.length),
                moved=True,
            )
        else:
            # Shorten the step that led here, if there is one.
            run = dataclasses.replace(self, length=self.length / 4)
        last = not accepted and (not run.moved or run.length < 1e-6)
        scaled = jax.tree.map(lambda u: run.length * u, run.updates)
        run = dataclasses.replace(run, theta=eqx.apply_updates(run.base, scaled))
        taken = _Taken(
            self.theta, found.solution, outcome, batch, accepted, last, False
        )
        return run, taken


class _OptimistixRun(eqx.Module):
    theta: PyTree
    start: Start
    vector: Float[Array, " P"]
    state: Any
    done: bool
    before: float  # the objective of the last step that was accepted

    def call(self, optimiser, task: Task, found: Found, outcome: Outcome, key) -> _Call:
        del key
        args = optimiser, self.state, self.vector, self.theta, task, found, outcome
        return _Call(optimistix_step, args)

    def step(self, optimiser, task: Task, key) -> "tuple[_Run, _Taken | None]":
        found, outcome = evaluate(self.theta, task, self.start)
        step = _attempt(self.call(optimiser, task, found, outcome, key))
        if step is None:
            return self, None
        objective = float(step.outcome.objective)
        # If the step was rejected then this is what it was before.
        accepted = bool(np.isfinite(objective)) and objective != self.before
        # After the last step, one more tells how good its result is.
        end = self.done
        taken = _Taken(
            self.theta, found.solution, step.outcome, objective, accepted, end, end
        )
        run = dataclasses.replace(
            self,
            theta=step.next_theta,
            vector=step.vector,
            state=step.state,
            done=bool(step.done),
        )
        if accepted:
            start = warm(step.outcome, step.outcome.jitter)
            run = dataclasses.replace(run, start=start, before=objective)
        return run, taken


_Run: TypeAlias = _OptaxRun | _OptimistixRun


def _begin(optimiser: Optimiser, theta: PyTree, task: Task, start: Start) -> _Run:
    if isinstance(optimiser, optax.GradientTransformation):
        still = jax.tree.map(jnp.zeros_like, theta)
        state = optimiser.init(theta)
        return _OptaxRun(theta, start, state, theta, still, 1.0, False)
    vector, _ = ravel_pytree(theta)
    state = optimistix_init(optimiser, theta, task, start)
    return _OptimistixRun(theta, start, vector, state, False, np.nan)


# So many steps of a factor of two are three orders of magnitude.
_MOST_AHEAD = 10


def better_start(optimiser, theta: PyTree, task: Task, start: Start) -> PyTree:
    # Far from a minimum the gradient may point the wrong way, since the objective is a
    # plateau there: for instance if lengthscales are shorter than what is between
    # points, or if rounding decides. Look at both sides of the first step, and go on
    # for as long as it gets better.
    vector, unravel = ravel_pytree(theta)
    few = with_inner_steps(task, FEW_INNER_STEPS)
    run = _begin(optimiser, theta, task, start)
    found, outcome = evaluate(theta, task, start)
    step = _attempt(run.call(optimiser, task, found, outcome, key=None))
    del found  # The next solve needs its memory.
    if step is None:
        return theta

    def known(outcome):
        objective = float(outcome.objective)
        return objective if np.isfinite(objective) else np.inf

    value = lambda v: known(evaluate(unravel(v), few, start)[1])
    move = step.state.y_eval - vector
    here, there, back = known(outcome), value(vector + move), value(vector - move)
    ahead, move = (there, move) if there <= back else (back, -move)
    for _ in range(_MOST_AHEAD):
        if not ahead < here:
            break
        vector, here, ahead = vector + move, ahead, value(vector + 2 * move)
    return unravel(vector)


#
# Stages
#


class Limits(NamedTuple):
    steps: int
    rtol: float
    patience: int


class Stage(eqx.Module):
    # Each stage has its own automatic nugget: if that changed from step to step, its
    # jumps would make local minima.
    run: _Run
    since: int = 0  # The number of its first step, less one.
    before: float = np.inf  # The best objective before it.
    patient: bool = False  # Inner solves may take more steps.
    near: bool = False  # It starts close to the minimum.
    over: bool = False
    converged: bool = False


def first_stage(optimiser: Optimiser, theta, task: Task, start: Start) -> Stage:
    return Stage(_begin(optimiser, theta, task, start))


def compile_ahead(
    optimiser: Optimiser, stage: Stage, task: Task, key: PRNGKeyArray, steps: int
) -> list[Future]:
    # To wait for before the first solve, and before the first step, or either would be
    # compiled once more. One after the other: two at a time would need more memory.
    run = stage.run
    if is_placed((run, task)):
        return []
    args = run.theta, task, run.start
    thread = ThreadPoolExecutor(1)
    futures = [compiling(thread, evaluate, *args)]
    if steps > 0:
        found, outcome = stand_ins(eqx.filter_eval_shape(evaluate, *args))
        program, args = run.call(optimiser, task, found, outcome, key)
        futures.append(compiling(thread, program, *args))
    thread.shutdown(wait=False)  # It ends when all is compiled.
    return futures


def minimise(
    optimiser: Optimiser,
    stage: Stage,
    task: Task,
    key: PRNGKeyArray,
    record: Record,
    limits: Limits,
    keep: Callable[[Stage], None],
) -> bool:
    """Goes on from a stage, and returns whether the last one converged. `keep` is
    called after each step with all that is needed to go on from there.
    """
    while True:
        as_is, given = optimiser, task
        if stage.near and isinstance(optimiser, BoundedBFGS):
            as_is = optimiser.with_max_length(0.1)
        if stage.patient:
            given = with_inner_steps(task, 5 * task.max_inner_steps)
        stage = _follow(as_is, stage, given, key, record, limits, keep)
        following = _next_stage(as_is, stage, given, record, limits)
        if following is None:
            return stage.converged
        stage = following


def _follow(optimiser, stage: Stage, task, key, record: Record, limits: Limits, keep):
    key = jax.random.fold_in(key, stage.since)
    while not (stage.over or record.stopped or len(record.rows) >= limits.steps):
        key_i = jax.random.fold_in(key, len(record.rows) - stage.since)
        run, taken = stage.run.step(optimiser, task, key_i)
        if taken is None:
            return dataclasses.replace(stage, over=True)
        prior, conditions = eqx.combine(taken.theta, task.rest)
        outcome, batch, accepted = taken.outcome, taken.batch, taken.accepted
        record.add(outcome, batch, accepted, prior, conditions, taken.solution)
        stalled = record.stalled(limits.rtol, limits.patience, stage.since)
        converged = taken.converged or stalled
        over = taken.last or stalled
        stage = dataclasses.replace(stage, run=run, over=over, converged=converged)
        keep(stage)
        del taken  # The next solve needs the memory of its solution.
    return stage


def _next_stage(optimiser, stage: Stage, task, record: Record, limits) -> Stage | None:
    best = record.outcome
    if best is None or record.stopped or len(record.rows) >= limits.steps:
        return None
    improved = record.decreased(stage.before, record.best, limits.rtol)
    begin = lambda start: dataclasses.replace(
        stage,
        run=_begin(optimiser, best.theta, task, start),
        since=len(record.rows),
        before=record.best,
        over=False,
        converged=False,
    )
    # A gradient where the inner solve has not converged may point anywhere, and then no
    # step is accepted.
    if not stage.patient and best.result == RESULTS.nonlinear_max_steps_reached:
        return dataclasses.replace(begin(warm(best, best.jitter)), patient=True)
    # If it gave up, what it had learned of the curvature was wrong.
    if improved and record.gave_up(stage.since):
        return begin(warm(best, best.jitter))
    if not (stage.converged and improved):
        return None
    few = with_inner_steps(task, FEW_INNER_STEPS)
    cold = warm(best, jnp.zeros_like(best.jitter))
    _, outcome = evaluate(best.theta, few, cold)
    if outcome.jitter >= best.jitter:
        return None
    return dataclasses.replace(begin(warm(outcome, outcome.jitter)), near=True)
