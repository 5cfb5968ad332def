"""One step of the outer problem, by an Optax or an Optimistix method.

Compiled once for each set of shapes: whatever changes from step to step is an array.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from ._condition import learned_in
from ._gauss_newton import GaussNewton
from ._hypergradient import differentiable
from ._linearised import prior_z
from ._objectives import AbstractLeastSquaresObjective, AbstractObjective
from ._parameters import unwrap
from ._results import RESULTS
from ._solution import Solution
from ._solve import initial_jitter, sanitised, solve_problem


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


class Outcome(eqx.Module):
    # Of one inner solve, for the record and for the next one.
    theta: PyTree
    objective: Float[Array, ""]  # the whole of it, not of a batch
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
        start.jitter,
        task.max_inner_steps,
    )


def _differentiable(
    theta: PyTree, task: Task, objective: AbstractObjective, found: Solution
) -> Solution:
    prior, conditions = eqx.combine(theta, task.rest)
    problem, _ = sanitised(*unwrap((prior, conditions)))
    readings = objective.readings(conditions)
    return differentiable(prior, conditions, problem, found, task.adjoint, readings)


def _outcome(theta: PyTree, solution: Solution, objective: Array) -> Outcome:
    return Outcome(
        theta=theta,
        objective=objective,
        next_z=solution._next_z,
        result=solution.result,
        inner_steps=jnp.asarray(solution.stats["num_steps"]),
        jitter=solution.stats["jitter"],
    )


@eqx.filter_jit
def evaluate(theta: PyTree, task: Task, start: Start) -> tuple[Solution, Outcome]:
    solution = solve_at(theta, task, start)
    return solution, _outcome(theta, solution, task.objective(solution))


@eqx.filter_jit
def cold_start(theta: PyTree, task: Task) -> Start:
    problem, _ = sanitised(*unwrap(eqx.combine(theta, task.rest)))
    return Start(prior_z(problem), jnp.array(True), initial_jitter(problem))


#
# Optax
#


class OptaxStep(eqx.Module):
    # A proposed change of the hyperparameters, and whether everything was finite.
    updates: PyTree
    opt_state: PyTree
    value: Float[Array, ""]
    ok: Bool[Array, ""]


@eqx.filter_jit
def optax_step(
    optimiser: optax.GradientTransformation,
    opt_state: PyTree,
    theta: PyTree,
    task: Task,
    found: Solution,
    key: PRNGKeyArray,
) -> OptaxStep:
    batch = task.objective.batch(key)
    loss = lambda theta: batch(_differentiable(theta, task, batch, found))
    value, gradient = eqx.filter_value_and_grad(loss)(theta)
    leaves = jax.tree.leaves(gradient)
    finite = [jnp.isfinite(value), *[jnp.all(jnp.isfinite(g)) for g in leaves]]
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        updates, opt_state = optimiser.update(gradient, opt_state, theta)
    return OptaxStep(updates, opt_state, value, jnp.stack(finite).all())


#
# Optimistix
#


def merit(objective: AbstractObjective, value: ArrayLike) -> Array:
    # What is minimised. Sums of squares span many orders of magnitude: in logarithms,
    # the valley around the minimum looks the same from near and far.
    squares = isinstance(objective, AbstractLeastSquaresObjective)
    return jnp.log(value) if squares else jnp.asarray(value)


class _Flat(eqx.Module):
    # The objective as a function of the vector of all hyperparameters, as Optimistix
    # solvers like it. Its derivatives are computed here, where it is known which way is
    # cheaper, and what is handed on is a function that has them.
    least_squares: bool = eqx.field(static=True)

    def __call__(self, vector, args):
        theta, task, start = args
        _, unravel = ravel_pytree(theta)
        here = jax.lax.stop_gradient(vector)
        found = solve_at(unravel(here), task, start)

        def solution_at(v):
            theta = unravel(v)
            return theta, _differentiable(theta, task, task.objective, found)

        def residuals(v):
            theta, solution = solution_at(v)
            r = task.objective.residuals(solution)
            return r, _outcome(theta, solution, 0.5 * jnp.sum(r**2))

        def value(v):
            theta, solution = solution_at(v)
            outcome = _outcome(theta, solution, task.objective(solution))
            return merit(task.objective, outcome.objective), outcome

        if self.least_squares:
            jacobian, _ = jax.jacfwd(residuals, has_aux=True)(here)
            r, outcome = residuals(here)
            return r + jacobian @ (vector - here), outcome
        else:
            (f, outcome), gradient = jax.value_and_grad(value, has_aux=True)(here)
            return f + gradient @ (vector - here), outcome


class OptimistixStep(eqx.Module):
    vector: Float[Array, " P"]
    state: Any
    outcome: Outcome  # of the last vector but one, as Optimistix has it
    done: Bool[Array, ""]


def _method(solver, theta, task, start):
    fn = _Flat(isinstance(solver, optx.AbstractLeastSquaresSolver))
    vector, _ = ravel_pytree(theta)
    return fn, vector, (theta, task, start)


@eqx.filter_jit
def optimistix_init(solver, theta: PyTree, task: Task, start: Start):
    fn, vector, args = _method(solver, theta, task, start)
    f_struct, aux_struct = eqx.filter_eval_shape(fn, vector, args)
    return solver.init(fn, vector, args, {}, f_struct, aux_struct, frozenset())


@eqx.filter_jit
def optimistix_step(
    solver, state: Any, vector: Array, theta: PyTree, task: Task, start: Start
) -> OptimistixStep:
    fn, _, args = _method(solver, theta, task, start)
    vector, state, outcome = solver.step(fn, vector, args, {}, state, frozenset())
    done, result = solver.terminate(fn, vector, args, {}, state, frozenset())
    done = done | (result != optx.RESULTS.successful)
    return OptimistixStep(vector, state, outcome, done)
