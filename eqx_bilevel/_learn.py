"""The outer problem: learning hyperparameters."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from ._adjoint import FixedPointAdjoint, FrozenAdjoint
from ._condition import Condition, GaussianProcess, is_concrete
from ._gauss_newton import GaussNewton
from ._krylov import FixedPointGMRES
from ._objectives import AbstractLeastSquaresObjective, AbstractObjective
from ._outer import (
    cold_start,
    evaluate,
    merit,
    optax_step,
    optax_update,
    optimistix_init,
    optimistix_step,
    Outcome,
    partition,
    Start,
    Task,
)
from ._quasi_newton import BoundedBFGS
from ._results import RESULTS
from ._scale import rescaled, search_scale, Tried
from ._solution import Solution
from ._solve import check_num_steps, checked, functions_as_pytrees, solve


_Optimiser = (
    optax.GradientTransformation
    | optx.AbstractLeastSquaresSolver
    | optx.AbstractMinimiser
)


class Learned(eqx.Module):
    """Learned hyperparameters.

    **Attributes:**

    - `prior`, `conditions`: As given to [`eqx_bilevel.learn`][], with the best
        hyperparameters that were found: those with the smallest objective.
    - `solution`: The [`eqx_bilevel.Solution`][] for them.
    - `objective`: Its objective.
    - `converged`: Whether the optimiser stopped by itself, before `steps` was reached.
    - `history`: A dictionary of NumPy arrays with one entry for each step, that can be
        given to `pandas.DataFrame`: `seconds` since the start, `objective`, `best` (so
        far), `batch` (the objective of the batch that the step used), `accepted`,
        `inner_steps` and `jitter`.
    - `scale_search`: What was tried before the first step: tuples of `lengths`, a
        typical lengthscale for each dimension, and `objective`.
    """

    # Not `GaussianProcess | dict`, nor `Condition`: what is in them is the user's, and
    # type checkers should let `learned.prior.kernel.lengthscale` pass.
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
    optimiser: _Optimiser | None = None,
    *,
    gradient: str = "implicit",
    steps: int = 1000,
    scale_search: int | bool = True,
    solver: GaussNewton = GaussNewton(),
    max_inner_steps: int = 20,
    rtol: float = 1e-3,
    patience: int | None = None,
    pool: bool = False,
    key: PRNGKeyArray | None = None,
    verbose: bool | Callable[[dict[str, Any]], None] = False,
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

    **Arguments:**

    - `prior`: A [`eqx_bilevel.GaussianProcess`][], or a dictionary of them.
    - `conditions`: A list of [`eqx_bilevel.Condition`][]s.
    - `objective`: An [`eqx_bilevel.AbstractObjective`][], or a sum of them.
    - `optimiser`: An Optax optimiser; or an Optimistix minimiser (of the logarithm of
        the objective, if that is a sum of squares); or a least-squares solver, if it
        is. Each of its steps must evaluate the objective at one point, as all but
        `optimistix.NelderMead` and Optax's line searches do. Default:
        [`eqx_bilevel.BoundedBFGS`][] for up to 3000 hyperparameters, and otherwise
        `optax.adam(1e-3)`.

    The remaining arguments are keyword-only.

    - `gradient`: `"implicit"` (exact) or `"frozen"` (of the paper).
    - `steps`: The largest number of steps.
    - `scale_search`: Whether to first try a few common factors of all lengthscales; or
        how many. They are spread between the distance of the points and the size of the
        domain, and four more are tried around the best of them. If dimensions have
        lengthscales of their own, then these are doubled or halved while that helps,
        alone and against each other.
    - `solver`: The inner solver.
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
    - `key`: A JAX random key, for objectives with batches.
    - `verbose`: Whether to print one line for each step; or a function that is called
        with a dictionary, whose entries are those of `history`, and `step`. That is
        zero during the scale search, which has `lengths` in addition.
    - `throw`: Whether to raise an error if nothing could be learned.

    **Returns:**

    A [`eqx_bilevel.Learned`][].

    **Raises:**

    A `ValueError` for wrong arguments, as in [`eqx_bilevel.solve`][]. A
    `LearningError`, which has what was found up to then as `learned`, if `throw` is
    true and there is no useful solution.
    """
    adjoint = _adjoint(gradient)
    if not all(map(is_concrete, jax.tree.leaves((prior, conditions, objective)))):
        raise ValueError(
            "`learn` is a loop in Python around compiled steps: it cannot be called "
            "inside `jax.jit`, `jax.grad` or `jax.vmap`. `solve` can."
        )
    check_num_steps(max_inner_steps, "max_inner_steps")
    prior, conditions = checked(prior, conditions)
    if not isinstance(objective, AbstractObjective):
        raise ValueError(
            "`objective` must be an `eqx_bilevel.AbstractObjective`, got a "
            f"{type(objective).__name__}."
        )
    if objective.batched and key is None:
        raise ValueError("`key` is needed, since the objective uses random batches.")
    objective.check(conditions)
    objective = functions_as_pytrees(objective)
    task = Task(None, objective, solver, adjoint, jnp.asarray(max_inner_steps))
    # The search may give a kernel a scale that it had not.
    one = jnp.ones_like(conditions[0].points[0])
    scaled = rescaled(prior, one) if scale_search else prior
    learned_at_all, _ = partition(scaled, conditions, task)
    optimiser = _optimiser(optimiser, learned_at_all, objective, bool(scale_search))
    record = _Record(verbose, objective)
    start = cold_start(prior, conditions)
    tried: list[Tried] = []
    if scale_search:
        num = 8 if scale_search is True else scale_search
        record.note("Compiling the scale search.")
        prior, tried = _search(prior, conditions, task, start, num, record)
    theta, task = partition(prior, conditions, task)
    if patience is None:
        stochastic = isinstance(optimiser, optax.GradientTransformation)
        patience = 200 if stochastic else 3 if _size(theta) <= _FEW else 10
    record.note("Compiling the step.")
    converged = _minimise(
        optimiser, theta, task, start, steps, key, record, rtol, patience, bool(tried)
    )
    learned = _finish(theta, task, start, record, converged, tried)
    if pool:
        learned = _pool(learned, objective, solver)
    failed = learned.solution.result != RESULTS.successful
    if throw and (failed or not np.isfinite(learned.objective)):
        message = RESULTS[learned.solution.result] or "The objective is not finite."
        raise LearningError(f"Nothing useful was learned. {message}", learned)
    return learned


def _adjoint(gradient: str) -> optx.AbstractAdjoint:
    # A step with a poor gradient is better than an error.
    exact = FixedPointAdjoint(FixedPointGMRES(accept=np.inf))
    adjoints = {"implicit": exact, "frozen": FrozenAdjoint()}
    if gradient not in adjoints:
        raise ValueError(
            f"`gradient` must be 'implicit' or 'frozen', got {gradient!r}."
        )
    return adjoints[gradient]


# Beyond the first number hyperparameters are probably weights of a network. At the
# second, the matrix of BFGS has 70 MB, and its update takes as long as a step.
_FEW = 20
_MOST_FOR_BFGS = 3000


def _size(theta: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(theta))


def _optimiser(optimiser, theta, objective, searched: bool) -> _Optimiser:
    size = _size(theta)
    if size == 0:
        raise ValueError(
            "There is nothing to learn: `prior` has no arrays outside of "
            "`eqx_bilevel.Frozen`, and `conditions` no parameters."
        )
    squares = isinstance(objective, AbstractLeastSquaresObjective)
    if optimiser is None:
        if size > _MOST_FOR_BFGS:
            return optax.adam(1e-3)
        if size > _FEW:
            return BoundedBFGS(1e-5, 1e-5, max_length=0.3)
        # Logarithms of probabilities are large numbers of which small differences tell.
        tolerance = 1e-3 if squares else 1e-5
        # After a search the first step, whose length is not known, should be short.
        length = 0.1 if searched else 0.7
        return BoundedBFGS(tolerance, tolerance, max_length=length)
    if isinstance(optimiser, optx.AbstractLeastSquaresSolver) and not squares:
        raise ValueError(
            "`optimiser` is for least squares, but the objective is no sum of squares. "
            "Use a minimiser, such as `eqx_bilevel.BoundedBFGS`."
        )
    if isinstance(optimiser, optx.NelderMead):
        raise ValueError(
            "`optimiser` must evaluate the objective at one point in each step, which "
            "`optimistix.NelderMead` does not."
        )
    if isinstance(optimiser, optax.GradientTransformation):
        _check_optax(optimiser, theta)
    if not isinstance(optimiser, _Optimiser):
        raise ValueError(
            "`optimiser` must be an Optax optimiser, or an Optimistix least-squares "
            f"solver or minimiser, got a {type(optimiser).__name__}."
        )
    return optimiser


def _check_optax(optimiser: optax.GradientTransformation, theta: PyTree) -> None:
    def step(theta):
        value = jnp.zeros(())
        return optax_update(optimiser, optimiser.init(theta), theta, value, theta)

    try:
        eqx.filter_eval_shape(step, theta)
    except TypeError as error:
        raise ValueError(
            "`optimiser` must make a step from the gradient and the objective at one "
            "point. A line search, as in `optax.lbfgs`, does not. Use an Optimistix "
            f"minimiser, such as `eqx_bilevel.BoundedBFGS`. Optax says: {error}"
        ) from error


def _with_inner_steps(task: Task, num: ArrayLike) -> Task:
    return dataclasses.replace(task, max_inner_steps=jnp.asarray(num))


# Enough for the scale search, where a solve that needs more is at a bad scale, and most
# often for the last solve, which starts where another ended.
_FEW_INNER_STEPS = 10
_MANY_INNER_STEPS = 100


#
# The loop
#


# After as many steps in a row that were not accepted, a further one will not help.
_MOST_REJECTED = 10


class _Record:
    # What happened, and the best hyperparameters so far.

    def __init__(self, verbose, objective: AbstractObjective):
        self.verbose = verbose
        self.objective = objective
        self.start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.best = self.searched = np.inf
        self.outcome: Outcome | None = None

    def note(self, text: str) -> None:
        if self.verbose is True:
            print(text, flush=True)

    def add_search(self, lengths: tuple[float, ...], outcome: Outcome) -> None:
        row = self._row(outcome, np.nan, False)
        self.searched = np.fmin(self.searched, row["objective"])
        row["best"] = self.searched
        shown = ", ".join(f"{length:.3e}" for length in lengths)
        self._report(
            f"scale search  lengths {shown}   "
            "objective {objective:.6e}   {seconds:.1f} s",
            dict(step=0, lengths=lengths, **row),
        )

    def add(self, outcome: Outcome | None, batch: float, accepted: bool) -> None:
        row = self._row(outcome, batch, accepted)
        if accepted and row["objective"] < self.best:
            self.best, self.outcome = row["objective"], outcome
        row["best"] = self.best
        self.rows.append(row)
        self._report(
            "step {step:5d}   objective {objective:.6e}   best {best:.6e}   "
            "inner steps {inner_steps:3d}   {seconds:.1f} s"
            + ("" if accepted else "   not accepted"),
            dict(step=len(self.rows), **row),
        )

    def _row(self, outcome: Outcome | None, batch: float, accepted: bool) -> dict:
        return dict(
            seconds=time.perf_counter() - self.start,
            objective=np.nan if outcome is None else float(outcome.objective),
            best=np.nan,  # Not known yet.
            batch=batch,
            accepted=accepted,
            inner_steps=0 if outcome is None else int(outcome.inner_steps),
            jitter=np.nan if outcome is None else float(outcome.jitter),
        )

    def _report(self, line: str, report: dict[str, Any]) -> None:
        if callable(self.verbose):
            self.verbose(report)
        elif self.verbose:
            print(line.format(**report), flush=True)

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
        change = merit(self.objective, np.array([before, after]))
        return bool(change[0] - change[1] > rtol)

    def history(self) -> dict[str, np.ndarray]:
        names = self.rows[0] if self.rows else ()
        return {name: np.array([row[name] for row in self.rows]) for name in names}


def _minimise(
    optimiser, theta, task, start, steps, key, record: _Record, rtol, patience, searched
) -> bool:
    # In stages, each with its own automatic nugget: if that changed from step to step,
    # its jumps would make local minima. Returns whether the last stage converged.
    few = _with_inner_steps(task, _FEW_INNER_STEPS)
    patient = False
    if isinstance(optimiser, BoundedBFGS) and not searched:
        theta = _better_start(optimiser, theta, task, few, start)
    while True:
        before, since = record.best, len(record.rows)
        left = steps - since
        if isinstance(optimiser, optax.GradientTransformation):
            key = jax.random.key(0) if key is None else key
            stage = jax.random.fold_in(key, since)
            run = _run_optax(optimiser, theta, task, start, left, stage)
        else:
            run = _run_optimistix(optimiser, theta, task, start, left)
        converged = _follow(run, record, rtol, patience, since)
        best, more = record.outcome, len(record.rows) < steps
        improved = record.decreased(before, record.best, rtol)
        if best is None or not more:
            return converged
        unsolved = not patient and _ran_out(best)
        if unsolved:
            patient, task = True, _with_inner_steps(task, 5 * task.max_inner_steps)
        # If it gave up, what it had learned of the curvature was wrong.
        if unsolved or (improved and record.gave_up(since)):
            theta, start = best.theta, _warm(best, best.jitter)
            continue
        if not (converged and improved):
            return converged
        _, outcome = evaluate(best.theta, few, _warm(best, jnp.zeros_like(best.jitter)))
        if outcome.jitter >= best.jitter:
            return converged
        theta, start = best.theta, _warm(outcome, outcome.jitter)
        if isinstance(optimiser, BoundedBFGS):  # It is close by now.
            optimiser = optimiser.with_max_length(0.1)


def _ran_out(outcome: Outcome) -> bool:
    # A gradient where the inner solve has not converged may point anywhere, and then no
    # step is accepted.
    return bool(outcome.result == RESULTS.nonlinear_max_steps_reached)


# So many steps of a factor of two are three orders of magnitude.
_MOST_AHEAD = 10


def _better_start(optimiser, theta, task: Task, few: Task, start: Start) -> PyTree:
    # Far from a minimum the gradient may point the wrong way, since the objective is a
    # plateau there: for instance if lengthscales are shorter than what is between
    # points, or if rounding decides. Look at both sides of the first step, and go on
    # for as long as it gets better.
    vector, unravel = ravel_pytree(theta)
    state = optimistix_init(optimiser, theta, task, start)
    args = state, vector, theta, task, *evaluate(theta, task, start)
    step = _attempt(optimistix_step, optimiser, *args)
    if step is None:
        return theta

    def value(v):
        objective = float(evaluate(unravel(v), few, start)[1].objective)
        return objective if np.isfinite(objective) else np.inf

    move = step.state.y_eval - vector
    here, there, back = value(vector), value(vector + move), value(vector - move)
    ahead, move = (there, move) if there <= back else (back, -move)
    for _ in range(_MOST_AHEAD):
        if not ahead < here:
            break
        vector, here, ahead = vector + move, ahead, value(vector + 2 * move)
    return unravel(vector)


def _follow(run, record: _Record, rtol: float, patience: int, since: int) -> bool:
    for outcome, batch, accepted, done in run:
        record.add(outcome, batch, accepted)
        if done or record.stalled(rtol, patience, since):
            return True
    return False


def _warm(outcome: Outcome, jitter) -> Start:
    return Start(outcome.next_z, jnp.array(False), jitter)


def _attempt(step: Callable, *args: Any) -> Any:
    # Derivatives raise where a linear solve in them meets nan, which cannot be switched
    # off. That must not end the loop.
    try:
        return step(*args)
    except eqx.EquinoxRuntimeError:
        return None


def _run_optax(optimiser, theta, task, start, steps, key):
    opt_state = optimiser.init(theta)
    last, length = None, 1.0
    for i in range(steps):
        key_i = jax.random.fold_in(key, i)
        found, outcome = evaluate(theta, task, start)
        step = _attempt(optax_step, optimiser, opt_state, theta, task, found, key_i)
        batch = np.nan if step is None else float(step.value)
        yield outcome, batch, step is not None and bool(step.ok), False
        if step is not None and bool(step.ok):
            start = _warm(outcome, outcome.jitter)
            opt_state = step.opt_state
            last, length = (theta, step.updates), min(1.0, 2 * length)
        else:
            # Shorten the step that led here, if there is one.
            length = length / 4
            if last is None or length < 1e-6:
                return
        base, updates = last
        theta = eqx.apply_updates(base, jax.tree.map(lambda u: length * u, updates))


def _run_optimistix(optimiser, theta, task, start, steps):
    vector, _ = ravel_pytree(theta)
    state, done = optimistix_init(optimiser, theta, task, start), False
    last = np.nan
    for _ in range(steps):
        args = state, vector, theta, task, *evaluate(theta, task, start)
        step = _attempt(optimistix_step, optimiser, *args)
        if step is None:
            return
        objective = float(step.outcome.objective)
        # If the step was rejected then this is what it was before.
        ok = bool(np.isfinite(objective)) and objective != last
        # After the last step, one more tells how good its result is.
        yield step.outcome, objective, ok, done
        vector, state, done = step.vector, step.state, bool(step.done)
        theta = step.next_theta
        if ok:
            start, last = _warm(step.outcome, step.outcome.jitter), objective


def _search(prior, conditions, task: Task, start: Start, num: int, record: _Record):
    def value(lengths, candidate):
        few = _with_inner_steps(task, _FEW_INNER_STEPS)
        theta, scaled = partition(candidate, conditions, few)
        _, outcome = evaluate(theta, scaled, start)
        record.add_search(lengths, outcome)
        objective = float(outcome.objective)
        return objective if np.isfinite(objective) else np.inf

    return search_scale(prior, conditions, value, num)


def _finish(theta, task, start, record: _Record, converged: bool, tried) -> Learned:
    if record.outcome is not None:
        best = record.outcome
        theta, start = best.theta, _warm(best, best.jitter)
    few = _with_inner_steps(task, _FEW_INNER_STEPS)
    solution, outcome = evaluate(theta, few, start)
    if solution.result != RESULTS.successful:
        many = _with_inner_steps(task, _MANY_INNER_STEPS)
        solution, outcome = evaluate(theta, many, start)
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


def _pool(learned: Learned, objective: AbstractObjective, solver) -> Learned:
    conditions = objective.pooled(learned.conditions)
    start = learned.solution
    solution = solve(learned.prior, conditions, solver, initial=start, throw=False)
    return dataclasses.replace(learned, conditions=conditions, solution=solution)
