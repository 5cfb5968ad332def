"""Objectives that judge a solution where its conditions were not imposed."""

import warnings
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ._condition import as_points, as_target, Condition, is_concrete, take_target
from ._geometry import as_key
from ._objectives import (
    AbstractDataObjective,
    AbstractLeastSquaresObjective,
    AbstractObjective,
)
from ._parameters import unwrap
from ._problem import find_condition, target_array
from ._solution import Solution


class ValidationResidual(AbstractLeastSquaresObjective, AbstractDataObjective):
    """How well a condition holds at points where it was not imposed; and how well those
    without noise hold where they were.

    The first is half the sum of the squares of operator minus target, as in the paper
    ([arXiv:2510.05568](https://arxiv.org/abs/2510.05568)). The second is likewise, of
    the conditions without noise at their own points, times `misfit_weight`. It is
    negligible unless the prior is so stiff that the nugget outweighs the conditions:
    then the first can be small for a function that ignores its boundary values. See
    [the method](../method.md#the-outer-problem).

    !!! warning

        Both vanish for lengthscales far below the distance of the points, if zero (the
        prior's mean) satisfies the equation: the solution is zero then between them.
        The scale search starts away from there; without it, from too short
        lengthscales, any optimiser may end there, and one whose steps have no bound
        from others too. [`eqx_bilevel.learn`][] warns if it did.
    """

    points: Float[Array, "n d"]
    target: PyTree | None
    misfit_weight: float = eqx.field(static=True)
    condition: str | None = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        points: ArrayLike,
        condition: str | None = None,
        *,
        target: PyTree | None = None,
        batch_size: int | None = None,
        misfit_weight: float | int = 1e4,
    ):
        if not 0 <= misfit_weight < np.inf:
            raise ValueError(
                "`misfit_weight` must be a finite non-negative number, got "
                f"{misfit_weight}."
            )
        self.points = as_points(points)
        self.target = as_target(target)
        self.misfit_weight = float(misfit_weight)
        self.condition = condition
        n = len(self.points)
        if batch_size is not None and not 1 <= batch_size <= n:
            raise ValueError(
                "`batch_size` must be between 1 and the number of points, which is "
                f"{n}, got {batch_size}."
            )
        self.batch_size = None if batch_size == n else batch_size

    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        condition = self._find(solution.conditions)
        target = condition.target if self.target is None else self.target
        if self.condition is None and self.target is None:
            _warn_of_first(solution)
        found = solution._trace(unwrap(condition.operator), self.points)
        values = solution.apply(condition.operator, self.points)
        leaves = [
            leaf.reshape(len(self.points), -1) for leaf in jax.tree.leaves(values)
        ]
        n, whose = len(self.points), "`ValidationResidual`"
        wanted = target_array(unwrap(target), found, self.points, n, whose)
        out = (jnp.concatenate(leaves, axis=1) - wanted).reshape(-1)
        if self.misfit_weight == 0:
            return out
        return jnp.concatenate([out, self.misfit_weight**0.5 * solution._misfits()])

    def readings(self, conditions: Sequence[Condition]):
        return [(self._find(conditions).operator, self.points)]

    def batch(self, key: PRNGKeyArray) -> AbstractObjective:
        if self.batch_size is None:
            return self
        n = len(self.points)
        chosen = jax.random.choice(key, n, (self.batch_size,), replace=False)
        target = take_target(self.target, chosen)
        share = self.batch_size / n
        weight = self.misfit_weight * share
        points = self.points[chosen]
        part = ValidationResidual(
            points, self.condition, target=target, misfit_weight=weight
        )
        return part * (1 / share)

    @property
    def batched(self) -> bool:
        return self.batch_size is not None

    def check(self, conditions: Sequence[Condition]) -> None:
        condition = self._find(conditions)
        if self.points.shape[1] != condition.points.shape[1]:
            raise ValueError(
                f"The points of `ValidationResidual` have {self.points.shape[1]} "
                "dimension(s), but those of the conditions have "
                f"{condition.points.shape[1]}."
            )
        if is_concrete(self.points) and is_concrete(condition.points):
            fitted = set(map(tuple, np.asarray(condition.points).tolist()))
            if fitted.issuperset(map(tuple, np.asarray(self.points).tolist())):
                raise ValueError(
                    "All points of `ValidationResidual` are points of the condition "
                    "itself, where it holds for any hyperparameters. Use other points, "
                    "for instance with another `key`."
                )

    def pooled(self, conditions: Sequence[Condition]) -> list[Condition]:
        condition = self._find(conditions)
        target = condition.target if self.target is None else self.target
        at = lambda t, x: jax.vmap(t)(x) if callable(t) else t
        n, m = len(condition.points), len(self.points)
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([_each_point(a, n), _each_point(b, m)]),
            at(condition.target, condition.points),
            at(target, self.points),
        )
        points = jnp.concatenate([condition.points, self.points])
        where = lambda c: (c.points, c.target)
        more = eqx.tree_at(where, condition, (points, both))
        return [more if c is condition else c for c in conditions]

    def _find(self, conditions: Sequence[Condition]) -> Condition:
        whose = "`ValidationResidual`"
        condition, name = find_condition(conditions, self.condition, whose)
        if condition.quadrature is not None:
            raise ValueError(
                f"Condition {name!r} is about averages, which `ValidationResidual` "
                "does not know at points. See `eqx_bilevel.CrossValidation`."
            )
        target = condition.target
        known_at = () if callable(target) else jax.tree.leaves(target)
        if self.target is None and any(jnp.ndim(t) > 0 for t in known_at):
            raise ValueError(
                f"The target of condition {name!r} is known at its own points only. "
                "Make it a function of a point, or give `ValidationResidual` its own "
                "`target`."
            )
        return condition


# Almost always a slip: boundary values that are stated before the equation.
def _warn_of_first(solution: Solution) -> None:
    rows = sorted(solution._problem.conditions.rows, key=lambda r: r.position)
    orders = [max((sum(i) for _, i in r.trace.jets), default=0) for r in rows]
    highest = int(np.argmax(orders))
    if highest > 0:
        warnings.warn(
            f"`ValidationResidual` is about the first condition, {rows[0].name!r}, but "
            f"{rows[highest].name!r} has derivatives of higher order. If that is the "
            "equation, say `ValidationResidual(points, "
            f"{rows[highest].name!r})`; otherwise name the first one.",
            stacklevel=3,
        )


def _each_point(target: Array, num_points: int) -> Array:
    one = jnp.ndim(target) == 0
    return jnp.full(num_points, target) if one else target


def hold_out(
    condition: Condition, share: float = 0.2, *, key: PRNGKeyArray
) -> tuple[Condition, ValidationResidual]:
    """Splits measured data at random: into a condition with most of the points, and an
    objective that tells how well the others are predicted.

    !!! example

        ```python
        data, held_out = eb.hold_out(data, key=key)
        learned = eb.learn(prior, [equation, data], held_out)
        ```

    **Arguments:**

    - `condition`: An [`eqx_bilevel.Condition`][], with a name.
    - `share`: The share of points that are held out, between 0 and 1.
    - `key`: A JAX random key.

    **Returns:**

    The condition with the other points, and a [`eqx_bilevel.ValidationResidual`][].

    **Raises:**

    A `ValueError` if the condition has no name, or if the share leaves one of the two
    without points.
    """
    if condition.name is None:
        raise ValueError("Give the condition a `name`, for the objective to find it.")
    if condition.quadrature is not None:
        raise ValueError("Averages cannot be held out. See `CrossValidation`.")
    n = len(condition.points)
    num = round(share * n)
    if not 0 < num < n:
        raise ValueError(
            f"`share` must leave points on both sides: {share} of {n} points are {num}."
        )
    order = jax.random.permutation(as_key(key), n)
    held, kept = order[:num], order[num:]

    points, target = condition.points, condition.target
    where = lambda c: (c.points, c.target)
    rest = eqx.tree_at(where, condition, (points[kept], take_target(target, kept)))
    held_target = take_target(target, held)
    return rest, ValidationResidual(points[held], condition.name, target=held_target)


ValidationResidual.__init__.__doc__ = """**Arguments:**

- `points`: Validation points, of shape `(n, d)`.
- `condition`: The name of the condition; one without a name is `"conditions[0]"` or
    the like. Default: the first one, with a warning if another has higher derivatives.

The remaining arguments are keyword-only.

- `target`: What the operator equals at these points, as in an
    [`eqx_bilevel.Condition`][]. Default: the condition's target, which must then be a
    number or a function.
- `batch_size`: How many of the points, drawn anew for each step, a stochastic optimiser
    sees at a time. Default: all of them.
- `misfit_weight`: The weight of what is left of the conditions at their own points.
    Zero for the paper's objective.

**Raises:**

A `ValueError` if the batch size or the weight is not possible; and when it is
evaluated, if there is no such condition or if its target is not known at these points.
"""
