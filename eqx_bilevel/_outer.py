"""One step of the outer problem, by an Optax or an Optimistix method.

Compiled once for each set of shapes: whatever changes from step to step is an array.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from ._ahead import placed_alike
from ._checks import all_finite, problem_with, sanitised
from ._condition import Condition, learned_in
from ._gauss_newton import GaussNewton
from ._hypergradient import differentiable
from ._jit import jit
from ._linearised import prior_z
from ._objectives import (
    AbstractLeastSquaresObjective,
    AbstractObjective,
    as_data_objective,
)
from ._parameters import unwrap
from ._problem import trace_conditions
from ._results import RESULTS
from ._solution import Reading, Solution
from ._solve import initial_jitter, initial_z, of_use, solve_problem


class Task(eqx.Module):
    # What stays as it is while hyperparameters are learned.
    rest: PyTree  # the prior and the conditions, less what is learned
    objective: AbstractObjective
    solver: GaussNewton
    adjoint: optx.AbstractAdjoint
    max_inner_steps: Int[Array, ""]


class Start(eqx.Module):
    # Where an inner solve starts.
    z: Float[Array, " N"]
    cold: Bool[Array, ""]  # at the prior's mean instead
    jitter: Float[Array, ""]  # at least


class Found(eqx.Module):
    # By one inner solve. What the objective reads off it is needed for derivatives too;
    # it has nothing of that if it uses batches.
    solution: Solution
    readings: tuple[Reading, ...]

    @property
    def useful(self) -> Bool[Array, ""]:
        return of_use(self.solution.result, self.solution.stats["change"])


class Outcome(eqx.Module):
    # Of one inner solve, for the record and for the next one.
    theta: PyTree
    objective: Float[Array, ""]  # the whole of it, not of a batch
    start: Start  # from which it comes out again
    next_z: Float[Array, " N"]
    result: RESULTS
    inner_steps: Int[Array, ""]
    jitter: Float[Array, ""]


def partition(prior, conditions, task: Task) -> tuple[PyTree, Task]:
    # What is learned and what is not.
    spec = learned_in(prior, conditions)
    theta, rest = eqx.partition((prior, conditions), spec)
    return theta, eqx.tree_at(lambda t: t.rest, task, rest, is_leaf=lambda x: x is None)


def solve_at(theta: PyTree, task: Task, start: Start) -> Solution:
    prior, conditions = eqx.combine(theta, task.rest)
    problem, fault = sanitised(*unwrap((prior, conditions)))
    return solve_problem(
        prior,
        conditions,
        problem,
        fault,
        task.solver,
        task.adjoint,
        jnp.where(start.cold, prior_z(problem), start.z),
        start.cold,
        jnp.maximum(start.jitter, initial_jitter(problem, task.solver.system)),
        task.max_inner_steps,
    )


def _differentiable(
    theta: PyTree, task: Task, objective: AbstractObjective, found: Found
) -> Solution:
    prior, conditions = eqx.combine(theta, task.rest)
    readings = as_data_objective(objective).readings(conditions)
    solution = found.solution
    problem = problem_with(found.useful, *unwrap((prior, conditions, readings)))
    return differentiable(
        prior,
        conditions,
        problem,
        solution,
        task.adjoint,
        [points for _, points in readings],
        found.readings,
    )


def _outcome(
    theta: PyTree, solution: Solution, objective: Array, start: Start
) -> Outcome:
    return Outcome(
        theta=theta,
        objective=objective,
        start=start,
        next_z=solution._next_z,
        result=solution.result,
        inner_steps=jnp.asarray(solution.stats["num_steps"]),
        jitter=solution.stats["jitter"],
    )


@placed_alike
@jit
def evaluate(theta: PyTree, task: Task, start: Start) -> tuple[Found, Outcome]:
    solution = solve_at(theta, task, start)
    objective, readings = as_data_objective(task.objective), ()
    if not objective.batched:
        asked = objective.readings(solution.conditions)
        readings = tuple(solution._reading(operator, x) for operator, x in asked)
    value = task.objective(dataclasses.replace(solution, _readings=readings))
    outcome = _outcome(theta, solution, value, start)
    return Found(solution, readings), outcome


def first_start(prior: Any, conditions: Sequence[Condition], initial: Any) -> Start:
    if initial is None:
        return _cold_start(prior, conditions)
    z = _initial_z(prior, conditions, initial)
    # A solve that failed is no place to start from.
    return Start(z, jnp.invert(all_finite(z)), jnp.zeros((), z.dtype))


@eqx.filter_jit
def _initial_z(prior: Any, conditions: Sequence[Condition], initial: Any) -> Array:
    problem, _ = sanitised(*unwrap((prior, conditions)))
    return initial_z(problem, initial).astype(problem.dtype)


def _cold_start(prior: Any, conditions: Sequence[Condition]) -> Start:
    traces = trace_conditions(*unwrap((prior, conditions)))
    each = zip(conditions, traces)
    size = sum(len(c.points) * len(t.nonlinear) for c, t in each)
    zeros = jnp.zeros(size, conditions[0].points.dtype)
    return Start(zeros, jnp.array(True), jnp.zeros((), zeros.dtype))


#
# Optax
#


class OptaxStep(eqx.Module):
    # A proposed change of the hyperparameters, and whether everything was finite.
    updates: PyTree
    opt_state: PyTree
    value: Float[Array, ""]
    ok: Bool[Array, ""]


def optax_update(
    optimiser: optax.GradientTransformation,
    opt_state: PyTree,
    theta: PyTree,
    value: Array,
    gradient: PyTree,
) -> tuple[PyTree, PyTree]:
    # Some ask for the value: `optax.contrib.reduce_on_plateau`.
    update = optax.with_extra_args_support(optimiser).update
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        return update(gradient, opt_state, theta, value=value, grad=gradient)


@placed_alike
@jit
def optax_step(
    optimiser: optax.GradientTransformation,
    opt_state: PyTree,
    theta: PyTree,
    task: Task,
    found: Found,
    key: PRNGKeyArray,
) -> OptaxStep:
    batch = as_data_objective(task.objective).batch(key)
    loss = lambda theta: batch(_differentiable(theta, task, batch, found))
    value, gradient = eqx.filter_value_and_grad(loss)(theta)
    updates, opt_state = optax_update(optimiser, opt_state, theta, value, gradient)
    ok = found.useful & all_finite((value, gradient))
    return OptaxStep(updates, opt_state, value, ok)


#
# Optimistix
#


def merit(objective: AbstractObjective, value: ArrayLike) -> Array:
    # What is minimised. Sums of squares span many orders of magnitude: in logarithms,
    # the valley around the minimum looks the same from near and far.
    squares = isinstance(objective, AbstractLeastSquaresObjective)
    return jnp.log(value) if squares else jnp.asarray(value)


class _Model(eqx.Module):
    # The objective as a function of the vector of all hyperparameters, as Optimistix
    # solvers like it: to first order around those of which a solution was found. Its
    # derivatives are computed here, where it is known which way is cheaper.
    least_squares: bool = eqx.field(static=True)

    def __call__(self, vector, args):
        theta, task, found, outcome = args
        here, unravel = ravel_pytree(theta)
        solution_at = lambda v: _differentiable(unravel(v), task, task.objective, found)
        if self.least_squares:
            residuals = lambda v: (task.objective.residuals(solution_at(v)),) * 2
            slope, value = jax.jacfwd(residuals, has_aux=True)(here)
        else:
            value_at = lambda v: merit(task.objective, task.objective(solution_at(v)))
            value, slope = jax.value_and_grad(value_at)(here)
        # It is not known anywhere else, nor if nothing was found.
        known = found.useful & jnp.all(vector == here)
        value = jnp.where(known, value, jnp.nan)
        return value + slope @ (vector - here), outcome


class OptimistixStep(eqx.Module):
    vector: Float[Array, " P"]
    state: Any
    outcome: (
        Outcome  # of what was evaluated, or what it was before if that was rejected
    )
    next_theta: PyTree  # what will be evaluated next
    done: Bool[Array, ""]


@eqx.filter_jit
def optimistix_init(solver, theta: PyTree, task: Task, start: Start):
    found, outcome = eqx.filter_eval_shape(evaluate, theta, task, start)
    least_squares = isinstance(solver, optx.AbstractLeastSquaresSolver)
    value = outcome.objective
    if least_squares and isinstance(task.objective, AbstractLeastSquaresObjective):
        value = eqx.filter_eval_shape(task.objective.residuals, found.solution)
    model, args = _Model(least_squares), (theta, task, found, outcome)
    vector, _ = ravel_pytree(theta)
    return solver.init(model, vector, args, {}, value, outcome, frozenset())


@placed_alike
@jit
def optimistix_step(
    solver,
    state: Any,
    vector: Array,
    theta: PyTree,
    task: Task,
    found: Found,
    outcome: Outcome,
) -> OptimistixStep:
    model = _Model(isinstance(solver, optx.AbstractLeastSquaresSolver))
    args = theta, task, found, outcome
    vector, state, outcome = solver.step(model, vector, args, {}, state, frozenset())
    done, result = solver.terminate(model, vector, args, {}, state, frozenset())
    done = done | (result != optx.RESULTS.successful)
    _, unravel = ravel_pytree(theta)
    next_theta = unravel(_evaluated_next(state, vector))
    return OptimistixStep(vector, state, outcome, next_theta, done)


def _evaluated_next(state: Any, vector: Array) -> Array:
    # As Optimistix's solvers have it. Some are around another one.
    while hasattr(state, "state"):
        state = state.state
    return getattr(state, "y_eval", vector)
