"""What the outer problem minimises."""

import abc
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ._condition import as_points, as_target, Condition, is_concrete
from ._parameters import unwrap
from ._problem import condition_name, target_array
from ._solution import Solution


class AbstractObjective(eqx.Module):
    """An outer objective: half a sum of squares of some residuals of a solution.
    Objectives can be added, and multiplied with positive numbers.
    """

    @abc.abstractmethod
    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        """What is squared and summed."""

    @abc.abstractmethod
    def readings(self, conditions: Sequence[Condition]) -> list[tuple[Callable, Array]]:
        """What `residuals` calls `Solution.apply` with, operators and points, as far as
        it is known in advance. An empty list will do: this only saves compile time.
        """

    @abc.abstractmethod
    def batch(self, key: PRNGKeyArray) -> "AbstractObjective":
        """A random part of the objective, of the same size each time, whose expectation
        is the whole; or the objective itself, if it does not use batches.
        """

    @property
    @abc.abstractmethod
    def batched(self) -> bool:
        """Whether `batch` returns less than the whole."""

    @abc.abstractmethod
    def check(self, conditions: Sequence[Condition]) -> None:
        """Raises a `ValueError` if it cannot be about solutions of these conditions."""

    @abc.abstractmethod
    def pooled(self, conditions: Sequence[Condition]) -> list[Condition]:
        """The conditions, with the objective's data added to them."""

    def __call__(self, solution: Solution) -> Float[Array, ""]:
        """The value of the objective."""
        return 0.5 * jnp.sum(self.residuals(solution) ** 2)

    def __add__(self, other: "AbstractObjective") -> "AbstractObjective":
        if not isinstance(other, AbstractObjective):
            return NotImplemented
        return _WeightedSum((self, other), (1.0, 1.0))

    def __mul__(self, weight: float) -> "AbstractObjective":
        return _WeightedSum((self,), (weight,))

    def __rmul__(self, weight: float) -> "AbstractObjective":
        return self * weight


class _WeightedSum(AbstractObjective):
    objectives: tuple[AbstractObjective, ...]
    weights: tuple[float, ...]

    def residuals(self, solution):
        pairs = zip(self.objectives, self.weights)
        return jnp.concatenate([w**0.5 * o.residuals(solution) for o, w in pairs])

    def readings(self, conditions):
        return [r for o in self.objectives for r in o.readings(conditions)]

    def batch(self, key):
        keys = jax.random.split(key, len(self.objectives))
        batches = tuple(o.batch(k) for o, k in zip(self.objectives, keys))
        return _WeightedSum(batches, self.weights)

    @property
    def batched(self):
        return any(o.batched for o in self.objectives)

    def check(self, conditions):
        for objective in self.objectives:
            objective.check(conditions)

    def pooled(self, conditions):
        for objective in self.objectives:
            conditions = objective.pooled(conditions)
        return list(conditions)


class ValidationResidual(AbstractObjective):
    """How well a condition holds at points where it was not imposed; and how well all
    conditions hold where they were.

    The first is half the sum of the squares of operator minus target, as in the paper
    ([arXiv:2510.05568](https://arxiv.org/abs/2510.05568)). The second is likewise, of
    the conditions without noise at their own points, times `misfit_weight`. It is
    negligible unless the prior is so stiff that the nugget outweighs the conditions:
    then the first can be small for a function that ignores its boundary values. See
    [the method](../method.md#the-outer-problem).
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
        found = solution._trace(unwrap(condition.operator), self.points)
        values = solution.apply(condition.operator, self.points)
        leaves = [
            leaf.reshape(len(self.points), -1) for leaf in jax.tree.leaves(values)
        ]
        wanted = target_array(unwrap(target), found, self.points, "the validation")
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
        target = self.target
        if not callable(target):
            part = lambda t: t[chosen] if jnp.ndim(t) > 0 else t
            target = jax.tree.map(part, target)
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
                f"The validation points have {self.points.shape[1]} dimension(s), but "
                f"those of the conditions have {condition.points.shape[1]}."
            )
        if is_concrete(self.points) and is_concrete(condition.points):
            fitted = set(map(tuple, np.asarray(condition.points).tolist()))
            if fitted.issuperset(map(tuple, np.asarray(self.points).tolist())):
                raise ValueError(
                    "All validation points are points of the condition itself, where "
                    "it holds for any hyperparameters. Use other points, for instance "
                    "with another `key`."
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
        names = [condition_name(c, i) for i, c in enumerate(conditions)]
        name = names[0] if self.condition is None else self.condition
        if name not in names:
            raise ValueError(
                f"The validation objective is about condition {name!r}, but the "
                f"conditions are {names}."
            )
        condition = conditions[names.index(name)]
        target = condition.target
        known_at = () if callable(target) else jax.tree.leaves(target)
        if self.target is None and any(jnp.ndim(t) > 0 for t in known_at):
            raise ValueError(
                f"The target of condition {name!r} is known at its own points only. "
                "Make it a function of a point, or give `ValidationResidual` its own "
                "`target`."
            )
        return condition


def _each_point(target: Array, num_points: int) -> Array:
    one = jnp.ndim(target) == 0
    return jnp.full(num_points, target) if one else target


ValidationResidual.__init__.__doc__ = """**Arguments:**

- `points`: Validation points, of shape `(n, d)`.
- `condition`: The name of the condition. Default: the first one.

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
