"""Mistakes: what can be said before compiling, and the same again for traced values."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from ._closure import function_as_pytree
from ._condition import Condition, is_concrete
from ._gauss_newton import GaussNewton
from ._linearised import noise_variances
from ._parameters import unwrap
from ._problem import build, condition_name, names_of, Problem, trace_conditions
from ._results import RESULTS


def functions_as_pytrees(tree: PyTree) -> PyTree:
    return jax.tree.map(function_as_pytree, tree)


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


def check_num_steps(num: int, name: str, least: int = 1) -> None:
    if not isinstance(num, int) or num < least:
        kind = "positive" if least == 1 else "non-negative"
        raise ValueError(f"`{name}` must be a {kind} integer, got {num}.")


def checked_initial(initial: Any, prior: Any) -> Any:
    if isinstance(initial, Mapping):
        unknown = sorted(initial.keys() - set(names_of(prior).names))
        if unknown:
            raise ValueError(f"`initial` is for unknown function(s) {unknown}.")
    return functions_as_pytrees(initial)


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
