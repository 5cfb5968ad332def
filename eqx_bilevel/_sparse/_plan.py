"""What can be prepared for a problem before compiling: orderings and patterns."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._condition import Condition, is_concrete
from .._gram import Block, one_by_one
from .._jets import dependences, Trace
from .._linearised import Linearised
from .._parameters import unwrap, value_of
from .._problem import condition_name, names_of, Problem, row_order, trace_conditions
from ._factor import Functionals, Pattern, Prior
from ._layout import Layout, layout, Row, value_places
from ._pattern import following, Group, ordered, supernodes


class Plan(eqx.Module):
    # Of the points, and of which derivatives are used: the same for all kernels,
    # targets and coefficients.
    layout: Layout
    patterns: dict[str, Pattern]  # of the functionals of each unknown
    conditions: "ConditionsPlan"

    def priors(self, problem: Problem, jacobians, nugget) -> dict[str, Prior]:
        # The same for all steps: they do not depend on where conditions are linearised.
        functionals = self.layout.functionals(problem, jacobians)
        return {n: Prior(problem.kernels, f, nugget) for n, f in functionals.items()}


class ConditionsPlan(eqx.Module):
    # For a factor of the conditions' own covariance: those that read values only come
    # first, then those with derivatives.
    pattern: Pattern
    order: Int[Array, " M"]
    inverse: Int[Array, " M"]

    def prior(
        self, problem: Problem, linearised: Linearised, gamma: Float[Array, " M"]
    ) -> Prior:
        functionals = _functionals(problem, linearised)
        return Prior(problem.kernels, functionals, 0.0, gamma[self.order])


def plan(
    prior: Any,
    conditions: Sequence[Condition],
    rho: tuple[float, float],
    rho_conditions: float,
) -> Plan:
    # Functionals are conditioned on others that are at most `rho` lengthscales away:
    # values, which need more, and all others. `rho_conditions` is that of the
    # preconditioner.
    rows = _rows(prior, conditions)
    places = value_places(rows)
    whole = layout(rows, places)
    patterns = {}
    for name, (points, _) in places.items():
        values = ordered(points)
        others = [rows[u.row].points for u in whole.uses if u.unknown == name]
        others = np.concatenate([points[:0], *others])
        patterns[name] = _pattern(values, following(others, values), rho)
    return Plan(whole, patterns, _of_conditions(rows, rho_conditions))


def _rows(prior: Any, conditions: Sequence[Condition]) -> list[Row]:
    # In the order of a problem's rows.
    for i, condition in enumerate(conditions):
        name = condition_name(condition, i)
        if condition.quadrature is not None:
            raise ValueError(
                f"Condition {name!r} has a `quadrature`: `SparseCholesky` is for "
                "conditions at points. Use `lineax.Cholesky()`."
            )
        if np.ndim(value_of(condition.noise)) == 2:
            raise ValueError(
                f"The `noise` of condition {name!r} is a matrix: `SparseCholesky` is "
                "for errors that are independent. Use `lineax.Cholesky()`."
            )
        if not is_concrete(condition.points):
            raise ValueError(
                f"The points of condition {name!r} are traced, by `jax.jit` for "
                "instance: `SparseCholesky` has to know them. Make them a constant, or "
                "use `lineax.Cholesky()`."
            )
    prior, conditions = unwrap((prior, list(conditions)))
    traces, unknowns = trace_conditions(prior, conditions), names_of(prior)
    rows = []
    for condition, trace in zip(conditions, traces):
        points = np.asarray(condition.points)
        entries = dependences(condition.operator, unknowns, trace, condition.points[0])
        rows.append(Row(points, trace, entries))
    return [rows[i] for i in row_order(traces)]


def _pattern(values: Group, others: Group, rho: tuple[float, float]) -> Pattern:
    size = len(values.points) + len(others.points)
    return Pattern.of(supernodes(values, others, rho), size)


def _groups(traces: Sequence[Trace]) -> tuple[list[int], list[int]]:
    # Which conditions read values only, and which do not.
    of_values = [not any(any(index) for _, index in t.jets) for t in traces]
    first = [i for i, only in enumerate(of_values) if only]
    return first, [i for i, only in enumerate(of_values) if not only]


def _of_conditions(rows: Sequence[Row], rho: float) -> ConditionsPlan:
    first, second = _groups([row.trace for row in rows])

    def points(chosen):
        parts = [np.repeat(rows[i].points, rows[i].trace.size, 0) for i in chosen]
        return np.concatenate([rows[0].points[:0], *parts])

    values = ordered(points(first))
    others = ordered(points(second), values.points)
    ends = np.cumsum([len(row.points) * row.trace.size for row in rows])
    index = np.split(np.arange(ends[-1]), ends[:-1])
    order = np.concatenate([index[i] for i in first + second])
    pattern = _pattern(values, others, (rho, rho))
    forth_and_back = jax.device_put((order, np.argsort(order)))
    return ConditionsPlan(pattern, *forth_and_back)


def _functionals(problem: Problem, linearised: Linearised) -> Functionals:
    first, second = _groups([row.trace for row in problem.rows])
    blocks = [r.block(j) for r, j in zip(problem.rows, linearised.jacobians)]
    dim = problem.rows[0].points.shape[1]
    name = next(iter(problem.kernels))
    nothing = jnp.zeros((0, 1, 1), problem.dtype)
    empty = Block(nothing[:, 0].repeat(dim, 1), nothing, ((name, (0,) * dim),))
    of = lambda chosen: one_by_one([blocks[i] for i in chosen] or [empty])
    return Functionals(of(first), of(second))
