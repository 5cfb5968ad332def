"""The outer problem: learning hyperparameters."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray

from ._adjoint import FixedPointAdjoint, FrozenAdjoint
from ._ahead import movable, not_collecting
from ._checkpoint import Checkpoint
from ._checks import check_num_steps, checked, checked_initial, functions_as_pytrees
from ._condition import Condition, GaussianProcess, is_concrete
from ._fingerprint import fingerprint
from ._gauss_newton import GaussNewton
from ._geometry import as_key
from ._kernels import fixed_numbers
from ._krylov import FixedPointGMRES
from ._last_solve import last_solve
from ._linear_solver import with_system
from ._objectives import (
    AbstractLeastSquaresObjective,
    AbstractObjective,
    as_data_objective,
)
from ._optimiser import as_optimiser, default_patience, Optimiser
from ._outer import evaluate, first_start, partition, Start, Task
from ._progress import Callback, Record
from ._quasi_newton import BoundedBFGS
from ._results import RESULTS
from ._runs import (
    better_start,
    compile_ahead,
    FEW_INNER_STEPS,
    first_stage,
    Limits,
    MANY_INNER_STEPS,
    minimise,
    Stage,
    warm,
    with_inner_steps,
)
from ._scale import are_apart, has_scale, search_scale, Tried
from ._solution import Solution
from ._solve import solve
from ._subset import restored, thinned
from ._threads import free_cores


class Learned(eqx.Module):
    """Learned hyperparameters.

    **Attributes:**

    - `prior`, `conditions`: As given to [`eqx_bilevel.learn`][], with the best
        hyperparameters that were found: those with the smallest objective.
    - `solution`: The [`eqx_bilevel.Solution`][] for them.
    - `objective`: Its objective. It is about the smallest in `history`, or there is a
        warning. With `subset` or `pool`, that of the solution before it was solved for
        with all points.
    - `converged`: Whether learning stopped before `steps` was reached: since the
        optimiser had converged, or since ten steps in a row were not accepted.
    - `history`: A dictionary of NumPy arrays with one entry for each step, that can be
        given to `pandas.DataFrame`: `seconds` since the start, `objective`, `best` (so
        far), `batch` (the objective of the batch that the step used), `accepted`,
        `inner_steps` and `jitter`.
    - `scale_search`: What was tried before the first step: tuples of `lengths`, a
        typical lengthscale for each dimension, and `objective`.
    """

    # Not `GaussianProcess | dict`, nor `Condition`: what is in them is the user's, and
    # a type checker should let `learned.prior.kernel.lengthscale` pass.
    prior: Any
    conditions: list[Any]
    solution: Solution
    objective: Array
    converged: bool
    history: dict[str, np.ndarray]
    scale_search: list[Tried]


class LearningError(RuntimeError):
    """Raised by [`eqx_bilevel.learn`][] if no hyperparameters with a finite objective
    were found, or if the last inner solve failed. `learned` is what there is.
    """

    def __init__(self, message: str, learned: Learned):
        super().__init__(message)
        self.learned = learned


def learn(
    prior: GaussianProcess | Mapping[str, GaussianProcess],
    conditions: Sequence[Condition],
    objective: AbstractObjective,
    optimiser: Optimiser | None = None,
    *,
    gradient: str = "implicit",
    steps: int = 1000,
    scale_search: int | bool = True,
    solver: GaussNewton = GaussNewton(),
    initial: Callable | Mapping[str, Callable] | Solution | None = None,
    max_inner_steps: int = 20,
    rtol: float = 1e-3,
    patience: int | None = None,
    pool: bool = False,
    subset: int | None = None,
    key: PRNGKeyArray | None = None,
    verbose: bool | str = False,
    callback: Callback | Sequence[Callback] = (),
    checkpoint: str | os.PathLike | None = None,
    throw: bool = True,
) -> Learned:
    """Learns hyperparameters: minimises an objective of the solution of the inner
    problem. See [the method](../method.md#the-outer-problem).

    Learned are all floating-point arrays in the prior, and the parameters in the
    conditions ([`eqx_bilevel.Positive`][], [`eqx_bilevel.Unconstrained`][], ...),
    except for what is inside an [`eqx_bilevel.Frozen`][].

    This is a Python loop around compiled steps, and cannot itself be compiled. Steps at
    which the objective is not finite, or whose inner solve fails, are taken back and
    shortened; each inner solve starts from where the last one ended. An automatic
    nugget is held while the optimiser runs, so that it sees one smooth function, and
    is only raised where it must be. Once the optimiser has converged, a smaller one is
    tried.

    ??? cite "Reference"

        N. H. Nelsen, H. Owhadi, A. M. Stuart, X. Yang and Z. Zou, *Bilevel optimization
        for learning hyperparameters*,
        [arXiv:2510.05568](https://arxiv.org/abs/2510.05568).

    **Arguments:**

    - `prior`: A [`eqx_bilevel.GaussianProcess`][], or a dictionary of them.
    - `conditions`: A list of [`eqx_bilevel.Condition`][]s.
    - `objective`: An [`eqx_bilevel.AbstractObjective`][], or a sum of them.
    - `optimiser`: An Optax optimiser; or an Optimistix minimiser (of the logarithm of
        the objective, if that is a sum of squares); or a least-squares solver, if it
        is. Each of its steps must evaluate the objective at one point, which
        `optimistix.NelderMead`, `optimistix.GoldenSearch` and line searches of Optax,
        as in `optax.lbfgs`, do not. Default: [`eqx_bilevel.BoundedBFGS`][] for up to
        6000 hyperparameters, and otherwise `optax.adam(1e-3)`. Its `max_length` is 0.3
        with more than 20 of them, and else 0.1 after a scale search and 0.7 without;
        its `rtol` and `atol` are 1e-5, and 1e-3 for a sum of squares of up to 20.

    The remaining arguments are keyword-only.

    - `gradient`: `"implicit"` (exact) or `"frozen"` (of the paper).
    - `steps`: The largest number of steps. With none, the scale search is all.
    - `scale_search`: Whether to first try a few common factors of all lengthscales,
        beside what is given; or how many. They are spread between the distance of the
        points and the size of the domain, and four more are tried around the best of
        them, and around the next best if there is another valley. If dimensions have
        lengthscales of their own, then these are doubled or halved while that helps,
        alone and against each other. A kernel that [`eqx_bilevel.rescale`][] would
        wrap, such as one of your own, is left as it is, with a warning: wrap it
        yourself, into [`eqx_bilevel.Stretched`][].
    - `solver`: The inner solver.
    - `initial`: Where the first inner solves start, as in [`eqx_bilevel.solve`][]: for
        instance the solution at a value of a parameter that makes the equation easier.
        Default: the prior's mean.
    - `max_inner_steps`: The largest number of Gauss-Newton steps for each outer step.
        Five times as many are allowed once the optimiser stops where they ran out.
        With `gradient="frozen"` and `max_inner_steps=1`, each outer step costs one
        linearised solve.
    - `rtol`, `patience`: Stop if the objective has not decreased by this much in that
        many accepted steps: relatively if it is a sum of squares, and else absolutely.
        Default: 200 steps for Optax; for Optimistix 3, or 10 with more than 20
        hyperparameters.
    - `pool`: Whether the validation points join the conditions for the solution that is
        returned. It is solved for once more, with the same hyperparameters.
    - `subset`: With how many of the conditions' points to learn, spread evenly. For the
        solution that is returned all are used, with the same hyperparameters. With many
        points this saves most of the time.
    - `key`: A JAX random key, for objectives with batches.
    - `verbose`: Whether to print one line for each step. With `"bar"`, show a progress
        bar instead (which needs tqdm).
    - `callback`: A function, or several, called after each step, and each solve of the
        scale search, with an [`eqx_bilevel.Progress`][]. If one returns true then
        learning stops there (or when the search has ended), with what is best up to
        then.
    - `checkpoint`: The path of a file that is written before the first step (after the
        scale search), then after each step, as long as writing takes no more than a
        twentieth of the time, and when learning ends, also by Ctrl-C or an error. If it
        exists then learning goes on from there, with the same numbers to the last bit
        as if it had never stopped, and possibly more `steps`; `prior` and all else must
        be as they were, with what is written in functions.
    - `throw`: Whether to raise an error if nothing could be learned.

    **Returns:**

    A [`eqx_bilevel.Learned`][]. Its prior and conditions have the structure of those
    that were given, with other numbers in them, so that they can be saved and read into
    those. (Plain functions become modules, with the arrays that they use as leaves.)

    **Raises:**

    A `ValueError` for wrong arguments, as in [`eqx_bilevel.solve`][]. A
    `LearningError`, which has what was found up to then as `learned`, if `throw` is
    true and there is no useful solution. An `ImportError` if a progress bar is asked
    for and tqdm is missing.
    """
    adjoint = _adjoint(gradient)
    if not all(map(is_concrete, jax.tree.leaves((prior, conditions, objective)))):
        raise ValueError(
            "`learn` is a loop in Python around compiled steps: it cannot be called "
            "inside `jax.jit`, `jax.grad` or `jax.vmap`. `solve` can."
        )
    if verbose not in (True, False, "bar"):
        raise ValueError(f"`verbose` must be a boolean or 'bar', got {verbose!r}.")
    check_num_steps(max_inner_steps, "max_inner_steps")
    check_num_steps(steps, "steps", least=0)
    check_num_steps(scale_search, "scale_search", least=0)
    if patience is not None:
        check_num_steps(patience, "patience")
    if not 0 <= rtol < np.inf:
        raise ValueError(f"`rtol` must be a finite non-negative number, got {rtol}.")
    prior, conditions = checked(prior, conditions)
    if not isinstance(objective, AbstractObjective):
        hint = " A function of the solution makes one: `eqx_bilevel.Objective(fn)`."
        raise ValueError(
            "`objective` must be an `eqx_bilevel.AbstractObjective`, got a "
            f"{type(objective).__name__}.{hint if callable(objective) else ''}"
        )
    if as_data_objective(objective).batched and key is None:
        raise ValueError("`key` is needed, since the objective uses random batches.")
    key = jax.random.key(0) if key is None else movable(as_key(key))
    # Numbers that were given in Python have weak types, and results of steps have not:
    # everything would be compiled twice.
    dtype = conditions[0].points.dtype
    is_weak = lambda x: eqx.is_inexact_array(x) and jax.typeof(x).weak_type
    strong = lambda x: x.astype(dtype) if is_weak(x) else x
    prior, conditions = jax.tree.map(strong, (prior, conditions))
    as_data_objective(objective).check(conditions)
    objective = functions_as_pytrees(objective)
    everything = conditions
    if subset is not None:
        check_num_steps(subset, "subset")
        conditions = thinned(conditions, subset)
    ready = with_system(solver, prior, conditions)
    task = Task(None, objective, ready, adjoint, jnp.asarray(max_inner_steps))
    learned_at_all, _ = partition(prior, conditions, task)
    _warn_of_fixed(prior)
    if scale_search and not has_scale(prior, conditions[0].points.shape[1]):
        scale_search = False
    optimiser = as_optimiser(optimiser, learned_at_all, objective, bool(scale_search))
    if patience is None:
        patience = default_patience(optimiser, learned_at_all)
    start = first_start(prior, conditions, checked_initial(initial, prior))
    callbacks = tuple(callback) if isinstance(callback, Sequence) else (callback,)
    file = None
    if checkpoint is not None:
        names = type(optimiser).__name__, gradient
        problem = prior, conditions, objective, solver, max_inner_steps, start
        run_of = fingerprint((*problem, optimiser, key, names))
        file = Checkpoint(pathlib.Path(checkpoint), run_of)
        if file.exists():
            file.header()  # Raises if it is of another run.
    record = Record(objective, steps, verbose, callbacks)
    try:
        with free_cores(conditions, compiling=False):
            learned = _learn(
                prior,
                conditions,
                task,
                start,
                optimiser,
                8 if scale_search is True else int(scale_search),
                key,
                Limits(steps, rtol, patience),
                record,
                file,
            )
    except (KeyboardInterrupt, jax.errors.JaxRuntimeError) as error:
        # The latter above all if another process has died.
        if file is not None:
            error.add_note(_what_is_saved(file))
        raise
    finally:
        record.close()
        if file is not None:
            file.flush()
    if subset is not None:
        whole = restored(learned.conditions, everything)
        learned = _with_conditions(learned, whole, solver)
    if pool:
        whole = as_data_objective(objective).pooled(learned.conditions)
        learned = _with_conditions(learned, whole, solver)
    _warn_of_gaps(learned, conditions, objective)
    failed = learned.solution.result != RESULTS.successful
    if throw and (failed or not np.isfinite(learned.objective)):
        message = RESULTS[learned.solution.result] or "The objective is not finite."
        raise LearningError(f"Nothing useful was learned. {message}", learned)
    return learned


def _what_is_saved(file: Checkpoint) -> str:
    file.flush()
    if not file.exists():
        return f"Nothing was saved in `checkpoint` {str(file.path)!r} yet."
    steps = len(file.header()["rows"])
    return (
        f"{steps} step(s) of `eqx_bilevel.learn` are saved in `checkpoint` "
        f"{str(file.path)!r}. The same call goes on from there."
    )


def _adjoint(gradient: str) -> optx.AbstractAdjoint:
    # A step with a poor gradient is better than an error.
    exact = FixedPointAdjoint(FixedPointGMRES(accept=np.inf))
    adjoints = {"implicit": exact, "frozen": FrozenAdjoint()}
    if gradient not in adjoints:
        raise ValueError(
            f"`gradient` must be 'implicit' or 'frozen', got {gradient!r}."
        )
    return adjoints[gradient]


# Not of those in conditions: there a number is data, whatever its type, unless it is a
# parameter.
def _warn_of_fixed(prior: Any) -> None:
    numbers = fixed_numbers(prior)
    if numbers:
        shown = " and ".join(f"`{name}`" for name in numbers)
        warnings.warn(
            f"{shown} will not be learned: a Python float is a constant, and nothing "
            "else in that module is learned either. Make it an array, or an "
            "`eqx_bilevel.Positive`; or an `eqx_bilevel.Frozen`, if it is to stay.",
            stacklevel=3,
        )


# A sum of squares that is smaller is met exactly, or not at all.
_SUSPICIOUS = 1e-6


def _warn_of_gaps(learned: Learned, conditions, objective: AbstractObjective) -> None:
    squares = isinstance(objective, AbstractLeastSquaresObjective)
    if not (squares and learned.objective < _SUSPICIOUS):
        return
    for _, points in as_data_objective(objective).readings(conditions):
        if are_apart(learned.prior, conditions, points):
            warnings.warn(
                "The objective is small, but lengthscales are so short that most of "
                "the points at which it looks are correlated with none of the "
                "conditions': there the solution is the prior's mean, which happens to "
                "satisfy the equation. Start from longer lengthscales, with a scale "
                "search and the default optimiser.",
                stacklevel=3,
            )
            return


def _learn(
    prior,
    conditions,
    task: Task,
    start: Start,
    optimiser,
    num_scales,
    key,
    limits,
    record,
    file,
) -> Learned:
    saved = file if file is not None and file.exists() else None
    record.note("Compiling the solve." if saved is None else "Resuming.")
    theta, given = partition(prior, conditions, task)

    def keep(stage: Stage) -> None:
        if file is not None:
            header: dict[str, Any] = dict(rows=list(record.rows), tried=tried)
            header |= dict(seconds=record.seconds, found=record.outcome is not None)
            file.offer(header, (task.rest, stage, record.outcome))

    with free_cores(conditions, compiling=True):
        with not_collecting():
            stage = first_stage(optimiser, theta, given, start)
            ahead = compile_ahead(optimiser, stage, given, key, limits.steps)
        wait(ahead[:1])
        if saved is not None:
            task, stage, tried = _resume(stage, given, start, record, saved)
        else:
            prior, start, tried = _search(
                prior, conditions, task, start, num_scales, record
            )
            theta, task = partition(prior, conditions, task)
            if limits.steps > 0:
                record.note("Compiling the step.")
                if isinstance(optimiser, BoundedBFGS) and not tried:
                    wait(ahead)
                    theta = better_start(optimiser, theta, task, start)
            stage = first_stage(optimiser, theta, task, start)
        # Before the first step, which may take minutes to compile.
        keep(stage)
        wait(ahead)
    first_theta = stage.run.theta
    converged = minimise(optimiser, stage, task, key, record, limits, keep)
    theta = first_theta if record.outcome is None else record.outcome.theta
    solution, outcome = last_solve(theta, task, start, record, limits.rtol)
    prior, conditions = eqx.combine(theta, task.rest)
    return Learned(
        prior=prior,
        conditions=conditions,
        solution=solution,
        objective=outcome.objective,
        converged=converged,
        history=record.history(),
        scale_search=tried,
    )


def _search(
    prior, conditions, task: Task, start: Start, num: int, record: Record
) -> tuple[Any, Start, list[Tried]]:
    # The best prior, and where its inner solve ended.
    if num == 0:
        return prior, start, []
    starts = []

    def value(lengths, candidate):
        # What was given may be good, and need some steps to show it.
        given = candidate is prior
        steps = MANY_INNER_STEPS if given else FEW_INNER_STEPS
        theta, scaled = partition(candidate, conditions, with_inner_steps(task, steps))
        found, outcome = evaluate(theta, scaled, start)
        record.add_search(lengths, outcome, candidate, conditions, found.solution)
        objective = float(outcome.objective)
        good = np.isfinite(objective)
        starts.append(warm(outcome, start.jitter) if good else start)
        return objective if good else np.inf

    prior, tried = search_scale(prior, conditions, value, num)
    return prior, starts[np.argmin([each.objective for each in tried])], tried


def _resume(
    stage: Stage, task: Task, start: Start, record: Record, file: Checkpoint
) -> tuple[Task, Stage, list[Tried]]:
    # What is in the file has the structure that a new run begins with.
    header, outcome = file.header(), None
    if header["found"]:
        _, outcome = eqx.filter_eval_shape(evaluate, stage.run.theta, task, start)
    rest, stage, outcome = file.read((task.rest, stage, outcome))
    record.restore(header["rows"], header["seconds"], outcome)
    tried = [Tried(tuple(lengths), value) for lengths, value in header["tried"]]
    return dataclasses.replace(task, rest=rest), stage, tried


def _with_conditions(learned: Learned, conditions, solver) -> Learned:
    # Solved once more, from where it was.
    start = learned.solution
    solution = solve(learned.prior, conditions, solver, initial=start, throw=False)
    return dataclasses.replace(learned, conditions=conditions, solution=solution)
