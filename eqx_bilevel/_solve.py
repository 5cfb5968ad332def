"""The inner problem's entry point."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._adjoint import FixedPointAdjoint, FrozenAdjoint, without_gradient
from ._closure import function_as_pytree
from ._condition import Condition, GaussianProcess, is_concrete
from ._gauss_newton import GaussNewton, Root
from ._kernels import smoothness
from ._linearised import linearise, noise, noise_variances, prior_z
from ._matrix_free import MatrixFree
from ._parameters import unwrap
from ._problem import (
    build,
    by_name,
    condition_name,
    jets_of,
    names_of,
    priors_of,
    Problem,
    trace_conditions,
)
from ._results import RESULTS
from ._solution import Solution
from ._sparse import SparseCholesky
from ._system import AbstractSystem


def root_residual(root, problem):
    # What the solve is about, as Optimistix sees it. `GaussNewton` gets all it needs
    # from the problem, so that this is only ever called for its output's shape.
    del problem
    return root


def functions_as_pytrees(tree: PyTree) -> PyTree:
    return jax.tree.map(function_as_pytree, tree)


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
    return _solve(prior, conditions, solver, adjoint, initial, max_steps, throw)


def checked_initial(initial: Any, prior: Any) -> Any:
    if isinstance(initial, Mapping):
        unknown = sorted(initial.keys() - set(names_of(prior).names))
        if unknown:
            raise ValueError(f"`initial` is for unknown function(s) {unknown}.")
    return functions_as_pytrees(initial)


def check_solver(solver: Any, adjoint: Any) -> None:
    if not isinstance(solver, GaussNewton):
        raise ValueError(
            "`solver` must be an `eqx_bilevel.GaussNewton`, got a "
            f"{type(solver).__name__}. For other Optimistix solvers see "
            "`eqx_bilevel.solve_whitened`."
        )
    wrong = isinstance(adjoint, optx.ImplicitAdjoint)  # Its derivative of z is zero.
    if wrong or not isinstance(adjoint, optx.AbstractAdjoint):
        raise ValueError(
            "`adjoint` must be an `eqx_bilevel.FixedPointAdjoint` or an "
            f"`eqx_bilevel.FrozenAdjoint`, got a {type(adjoint).__name__}."
        )


# So many targets are solved for sooner with sparse factors.
_MANY = 8000


def _most_dense() -> int:
    # So many targets' Gram matrix takes an eighth of the device's memory: factors, and
    # what comes before them, take as much some times over.
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        room = stats["bytes_limit"]
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Unknown, as on Windows.
        room = 24 * 2**30
    return math.isqrt(room // 64)


def with_system(
    solver: GaussNewton, prior: Any, conditions: Sequence[Condition]
) -> GaussNewton:
    # With all that can be prepared before compiling.
    system = solver.linear_solver
    if system is None:
        system = _chosen(prior, conditions)
    if isinstance(system, SparseCholesky):
        system = system.prepared(prior, conditions)
    return dataclasses.replace(solver, linear_solver=system)


def _chosen(prior: Any, conditions: Sequence[Condition]) -> AbstractSystem | None:
    num, most = sum(c.num_targets for c in conditions), _most_dense()
    if num > min(_MANY, most) and _has_sparse_factors(prior, conditions):
        return SparseCholesky()
    return MatrixFree() if num > most else None


def _has_sparse_factors(prior: Any, conditions: Sequence[Condition]) -> bool:
    kernels = [p.kernel for p in priors_of(unwrap(prior)).values()]
    return (
        all(np.isfinite(smoothness(kernel)) for kernel in kernels)
        and conditions[0].points.shape[1] <= 3
        and all(is_concrete(c.points) and c.quadrature is None for c in conditions)
    )


def check_num_steps(num: int, name: str, least: int = 1) -> None:
    if not isinstance(num, int) or num < least:
        kind = "positive" if least == 1 else "non-negative"
        raise ValueError(f"`{name}` must be a {kind} integer, got {num}.")


@eqx.filter_jit
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


def checked(prior, conditions):
    # Everything that can be said before compiling. Returns the arguments with plain
    # functions taken apart.
    prior = dict(prior) if isinstance(prior, Mapping) else prior
    prior, conditions = functions_as_pytrees((prior, conditions))
    trace_conditions(*unwrap((prior, conditions)))
    dtype = conditions[0].points.dtype
    if dtype != jnp.dtype("float64"):
        warnings.warn(
            f"The points are {dtype}. Gram matrices of differential operators are "
            "ill-conditioned: in single precision solutions have few correct digits. "
            'Call `jax.config.update("jax_enable_x64", True)` at the top of your '
            "program.",
            stacklevel=3,
        )
    for i, condition in enumerate(conditions):
        _check_values(condition, condition_name(condition, i))
    return prior, list(conditions)


def _check_values(condition: Condition, name: str) -> None:
    arrays = [("points", condition.points)]
    if not callable(condition.target):
        arrays += [("target", leaf) for leaf in jax.tree.leaves(condition.target)]
    for what, array in arrays:
        if is_concrete(array) and not np.all(np.isfinite(np.asarray(array))):
            raise ValueError(
                f"The {what} of condition {name!r} must be finite, but some are nan or "
                "infinite."
            )
    points = condition.points
    if _needs_distinct_points(condition) and is_concrete(points):
        distinct = np.unique(np.asarray(points), axis=0)
        if len(distinct) < len(points):
            raise ValueError(
                f"The points of condition {name!r} have {len(points) - len(distinct)} "
                "duplicate(s). Remove them, or give the condition a `noise`."
            )


def _needs_distinct_points(condition: Condition) -> bool:
    return condition.noise is None and condition.quadrature is None


def sanitised(prior, conditions) -> tuple[Problem, RESULTS]:
    # What `_check_values` finds must be found again here, for values that were traced.
    good = all_finite((prior, conditions))
    repeated = [
        _has_duplicates(c.points) for c in filter(_needs_distinct_points, conditions)
    ]
    problem = build(*_cut((prior, conditions), good))
    known = all_finite([r.target for r in problem.rows])
    problem = _with_finite_targets(problem)
    variances = noise_variances(problem, jnp.ones((), problem.dtype))
    result = RESULTS.successful
    for faults, kind in (
        ([variances.min() <= 0], RESULTS.no_scale),
        ([~all_finite(variances)], RESULTS.nonfinite_operator),
        (repeated, RESULTS.duplicate_points),
        ([~(good & known)], RESULTS.nonfinite_data),
    ):
        if faults:
            result = RESULTS.where(jnp.stack(faults).any(), kind, result)
    return problem, result


def problem_with(
    good: Bool[Array, ""],
    prior,
    conditions: Sequence[Condition],
    readings: Sequence[tuple[Callable, Array]],
) -> Problem:
    # The same with readings, if it is known already that there is no fault.
    stated = _cut((prior, conditions), good)
    return _with_finite_targets(build(*stated, readings=readings))


# A problem that is not finite is replaced by one that is, since linear solves raise
# when they are differentiated at nan, even if the outcome is not used. It has no
# derivatives either, which are nan before their values are.


def _cut(tree: Any, good: Bool[Array, ""]) -> Any:
    cut = lambda x: jnp.where(good, x, jax.lax.stop_gradient(_cure(x)))
    return jax.tree.map(lambda x: cut(x) if eqx.is_inexact_array(x) else x, tree)


def _with_finite_targets(problem: Problem) -> Problem:
    cured = [_cure(r.target) for r in problem.rows]
    return eqx.tree_at(lambda p: [r.target for r in p.rows], problem, cured)


def _cure(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.ones_like(x))


def all_finite(tree) -> Bool[Array, ""]:
    # From the largest number of each type: less to compile than conjunctions over all.
    by_dtype: dict[Any, list[Array]] = {}
    for x in _floats(tree):
        by_dtype.setdefault(x.dtype, [jnp.zeros(1, x.dtype)]).append(x.reshape(-1))
    size = lambda parts: jnp.max(jnp.abs(jnp.concatenate(parts)))
    return jnp.stack([jnp.isfinite(size(xs)) for xs in by_dtype.values()]).all()


def _floats(tree) -> list[Array]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def _has_duplicates(points: Float[Array, "n d"]) -> Bool[Array, ""]:
    order = jnp.lexsort(points.T)
    ordered = points[order]
    return jnp.any(jnp.all(ordered[1:] == ordered[:-1], axis=1))


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
