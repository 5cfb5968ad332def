"""Conditions at fewer of their points."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp

from ._condition import Condition, take_target
from ._geometry import farthest


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
        out.append(eqx.tree_at(lambda c: (c.points, c.target), condition, new))
    return out


def restored(
    learned: Sequence[Condition], conditions: Sequence[Condition]
) -> list[Condition]:
    # What was learned, at the points and with the targets that there were.
    out = []
    for new, old in zip(learned, conditions):
        target = new.target if callable(new.target) else old.target
        where = lambda c: (c.points, c.target)
        out.append(eqx.tree_at(where, new, (old.points, target)))
    return out
