"""Conditions at fewer of their points."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ._condition import Condition, take_target
from ._geometry import farthest
from ._parameters import AbstractParameter, value_of


def thinned(conditions: Sequence[Condition], num: int) -> list[Condition]:
    # With about so many points in all, far from each other. Averages keep all theirs.
    pointwise = [c for c in conditions if c.quadrature is None]
    share = num / sum(len(c.points) for c in pointwise)
    out = []
    for condition in conditions:
        n = len(condition.points)
        kept = math.ceil(share * n)
        if condition.quadrature is not None or kept >= n:
            out.append(condition)
            continue
        chosen = jnp.sort(farthest(condition.points, kept))
        new = condition.points[chosen], take_target(condition.target, chosen)
        condition = eqx.tree_at(lambda c: (c.points, c.target), condition, new)
        if np.ndim(value_of(condition.noise)) > 0:
            noise = _take_noise(condition.noise, n, chosen)
            condition = eqx.tree_at(lambda c: c.noise, condition, noise)
        out.append(condition)
    return out


def _take_noise(noise: Any, n: int, chosen: Int[Array, " k"]) -> Array:
    # Of each point, or the covariance of all their targets.
    if isinstance(noise, AbstractParameter):
        raise ValueError(
            "With `subset`, a `noise` that is learned must be one number: there is "
            "nothing to learn it from at points that are not used."
        )
    if noise.ndim == 1:
        return noise[chosen]
    q = len(noise) // n
    rows = (q * chosen[:, None] + jnp.arange(q)[None, :]).reshape(-1)
    return noise[rows][:, rows]


def restored(
    learned: Sequence[Condition], conditions: Sequence[Condition]
) -> list[Condition]:
    # What was learned, at the points and with the targets that there were.
    out = []
    for new, old in zip(learned, conditions):
        target = new.target if callable(new.target) else old.target
        where = lambda c: (c.points, c.target)
        new = eqx.tree_at(where, new, (old.points, target))
        if not isinstance(old.noise, AbstractParameter | None) and old.noise.ndim > 0:
            new = eqx.tree_at(lambda c: c.noise, new, old.noise)
        out.append(new)
    return out
