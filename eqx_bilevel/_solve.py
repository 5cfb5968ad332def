"""The inner problem's entry point."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._adjoint import FixedPointAdjoint, FrozenAdjoint, without_gradient
from ._checks import check_num_steps, check_solver, checked, checked_initial, sanitised
from ._condition import Condition, GaussianProcess
from ._gauss_newton import GaussNewton, Root
from ._jit import jit
from ._linear_solver import with_system
from ._linearised import linearise, noise, noise_variances, prior_z
from ._parameters import unwrap
from ._problem import by_name, jets_of, Problem
from ._results import RESULTS
from ._solution import Solution
from ._system import AbstractSystem
from ._threads import free_cores


def root_residual(root, problem):
    # What the solve is about, as Optimistix sees it. `GaussNewton` gets all it needs
    # from the problem, so that this is only ever called for its output's shape.
    del problem
    return root


def solve(
    prior: GaussianProcess | Mapping[str, GaussianProcess],
    conditions: Sequence[Condition],
    solver: GaussNewton = GaussNewton(),
    *,
    adjoint: optx.AbstractAdjoint = FixedPointAdjoint(),
    initial: Callable | Mapping[str, Callable] | Solution | None = None,
    max_steps: int = 100,
    throw: bool = True,
) -> Solution:
    """Solves the inner problem: finds the most probable functions under a prior that
    satisfy conditions. See [the method](../method.md).

    It is differentiable, in forward and reverse mode, with respect to every array in
    `prior` and `conditions`; and it can be used under `jax.jit`, `jax.vmap` and so on.

    ??? cite "Reference"

        Y. Chen, B. Hosseini, H. Owhadi and A. M. Stuart, *Solving and learning
        nonlinear PDEs with Gaussian processes*,
        [arXiv:2103.12959](https://arxiv.org/abs/2103.12959).

    **Arguments:**

    - `prior`: A [`eqx_bilevel.GaussianProcess`][]; or for several unknown functions a
        dictionary of them.
    - `conditions`: A list of [`eqx_bilevel.Condition`][]s.
    - `solver`: An [`eqx_bilevel.GaussNewton`][].

    The remaining arguments are keyword-only.

    - `adjoint`: How to differentiate through the solve:
        [`eqx_bilevel.FixedPointAdjoint`][] (exact) or [`eqx_bilevel.FrozenAdjoint`][].
    - `initial`: Where to start: a function of one point that stands for the unknown, a
        dictionary of them, or a previous [`eqx_bilevel.Solution`][], also one of other
        conditions. Default: the prior's mean. Derivatives with respect to it are zero.
    - `max_steps`: The largest number of Gauss-Newton steps, that is of factorisations.
    - `throw`: If the solve fails, whether to raise an error, or to return a solution
        whose `result` says what happened.

    **Returns:**

    An [`eqx_bilevel.Solution`][].

    **Raises:**

    A `ValueError` if the arguments do not make a well-posed problem: wrong shapes, no
    conditions, an operator that is not a function of the unknown, a kernel that is too
    rough for an operator, an unknown that is in no condition; and, where values are
    known, if points or targets are not finite or if a condition without noise has the
    same point twice. A runtime error if the solve fails numerically and `throw` is
    true.
    """
    check_solver(solver, adjoint)
    check_num_steps(max_steps, "max_steps")
    prior, conditions = checked(prior, conditions)
    initial = checked_initial(initial, prior)
    solver = with_system(solver, prior, conditions)
    with free_cores(conditions, compiling=False):
        return _solve(prior, conditions, solver, adjoint, initial, max_steps, throw)


@jit
def _solve(prior, conditions, solver, adjoint, initial, max_steps, throw):
    problem, fault = sanitised(*unwrap((prior, conditions)))
    z = prior_z(problem) if initial is None else initial_z(problem, initial)
    start = without_gradient(z)
    known = jnp.array(initial is None)
    sol = solve_problem(
        prior,
        conditions,
        problem,
        fault,
        solver,
        adjoint,
        start,
        known,
        initial_jitter(problem, solver.system),
        jnp.asarray(max_steps),
    )
    if not throw:
        return sol
    # Not all of it, since what is large may be shared between devices.
    small = lambda s: (s.weights, s.result, s.stats, s._z)
    fault = sol.result != RESULTS.successful
    return eqx.tree_at(small, sol, sol.result.error_if(small(sol), fault))


def initial_z(problem: Problem, initial: Any) -> Float[Array, " N"]:
    parts = []
    for r in problem.rows:
        jets = [r.trace.jets[i] for i in r.trace.nonlinear]
        if len(jets) == 0:
            continue
        if isinstance(initial, Solution):
            values = initial._jets(jets, r.points)
        else:
            functions = by_name(initial, jets, r.unknowns, "initial")
            values = jets_of(functions, jets, r.points)
        parts.append(values.reshape(-1))
    return jnp.concatenate(parts) if parts else prior_z(problem)


def solve_problem(
    prior: Any,
    conditions: list[Condition],
    problem: Problem,
    fault: RESULTS,
    solver: GaussNewton,
    adjoint: optx.AbstractAdjoint,
    start: Float[Array, " N"],
    known: Bool[Array, ""],
    jitter: Float[Array, ""],
    max_steps: Int[Array, ""],
) -> Solution:
    # `known`: whether the start is the prior's mean. `jitter`: the least that is tried.
    # Never raises.
    if problem.z_size == 0:
        adjoint = FrozenAdjoint()  # Exact: there is nothing to linearise.
    sol = optx.least_squares(
        root_residual,
        solver,
        Root(start, jnp.zeros(problem.size, problem.dtype)),
        problem,
        options=dict(start=known, jitter=jitter, max_steps=max_steps),
        adjoint=adjoint,
        max_steps=None,
        throw=False,
    )
    state = without_gradient(sol.stats["state"])
    result = RESULTS.promote(sol.result)
    result = RESULTS.where(result == RESULTS.singular, RESULTS.singular_gram, result)
    result = RESULTS.where(fault != RESULTS.successful, fault, result)
    stats = {
        "num_steps": sol.stats["num_steps"],
        "max_steps": max_steps,
        "change": state.change,
        "rounding": state.rounding,
        "num_products": state.num_products,
    }
    return solution_at(
        prior,
        conditions,
        problem,
        sol.value,
        state.proposal.z,
        state.factor,
        state.jitter,
        solver.system,
        result,
        stats,
    )


def of_use(result: RESULTS, change: Float[Array, ""]) -> Bool[Array, ""]:
    ran_out = result == RESULTS.nonlinear_max_steps_reached
    # Steps may run out before any linearisation could be solved.
    return ((result == RESULTS.successful) | ran_out) & jnp.invert(jnp.isinf(change))


def solution_at(
    prior: Any,
    conditions: list[Condition],
    problem: Problem,
    root: Root,
    next_z: Float[Array, " N"],
    factor: PyTree,
    jitter: Float[Array, ""],
    system: AbstractSystem,
    result: RESULTS,
    stats: dict[str, Any],
) -> Solution:
    useful = of_use(result, stats["change"])
    # After a failure everything is nan. None of it must reach a linear solve in reverse
    # mode, where it would raise.
    z = jnp.where(useful, root.z, jax.lax.stop_gradient(root.z))
    linearised = linearise(problem, z)
    weights = jnp.where(useful, root.weights, jnp.nan)
    stats = stats | _statistics(problem, linearised, weights, jitter)
    return Solution(
        prior=prior,
        conditions=conditions,
        weights=weights,
        result=result,
        stats=without_gradient(stats),
        _problem=problem,
        _linearised=linearised,
        _z=z,
        _next_z=next_z,
        _factor=factor,
        _system=system,
    )


def initial_jitter(problem: Problem, system: AbstractSystem) -> Float[Array, ""]:
    # Zero if all conditions come with a noise or nugget, and otherwise the smallest
    # nugget that has a chance: the automatic one.
    smallest = system.smallest_nugget(problem)
    variances = noise_variances(problem, jnp.zeros((), problem.dtype))
    automatic = (variances == 0).any()
    return jnp.where(automatic, smallest, 0.0).astype(problem.dtype)


def _statistics(problem, linearised, weights, jitter) -> dict[str, Array]:
    # At the minimum, residuals are -Gamma w and |u - m|^2 = w^T (G - Gamma) w.
    misfit = noise(problem, jitter).mv(weights)
    square = weights @ (linearised.rhs - misfit)
    return dict(
        jitter=jitter,
        objective=0.5 * weights @ linearised.rhs,
        rkhs_norm=jnp.sqrt(jnp.maximum(square, 0)),
        residual_norm=jnp.sqrt(jnp.mean(misfit**2)),
    )
