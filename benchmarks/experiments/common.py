"""What the experiments share.

An experiment is a module with a `title`; the `published` errors, RMS and largest, and
seconds; a function `run(key, n)` that learns at n collocation points; and `compare`,
which puts a solution beside the truth on a test grid. Nothing is chosen by looking at
the truth.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import eqx_bilevel as eb
import jax
import jax.numpy as jnp


jax.config.update("jax_enable_x64", True)


class Published(NamedTuple):
    """Of arXiv:2510.05568: RMS and largest error of each unknown, where known."""

    errors: dict[str, tuple[float | None, float | None]]
    seconds: float | None = None


class Run(NamedTuple):
    """Solutions with the kernel as it was before learning and with the learned one, and
    how that was learned."""

    untrained: Callable[[], Any]
    solution: Any
    learned: eb.Learned


def value(u, x):
    return u.value


def values(u, x):
    return {name: each.value for name, each in u.items()}


def tensor_grid(*axes):
    """The points of a grid, and a function that evaluates something callable there."""
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)

    def on_grid(solution):
        found = solution(points.reshape(-1, len(axes)))
        return jax.tree.map(lambda v: v.reshape(points.shape[:-1]), found)

    return on_grid


def learned_from(prior, conditions, objective) -> Run:
    """Learns, with the defaults."""
    untrained = lambda: eb.solve(prior, conditions, throw=False)
    learned = eb.learn(prior, conditions, objective, throw=False)
    return Run(untrained, learned.solution, learned)


def coarse_to_fine(
    prior: Any,
    stated: Callable[[int], tuple[list[eb.Condition], eb.AbstractObjective]],
    *,
    sizes: Sequence[int],
    steps: Sequence[int],
) -> Run:
    """Learns at more and more points. Steps at few points cost little, and what is
    learned there is where to start with more."""
    conditions, _ = stated(sizes[-1])
    untrained = lambda: eb.solve(prior, conditions, throw=False)
    stage = prior
    for i, (n, most) in enumerate(zip(sizes, steps)):
        options = dict(steps=most, scale_search=i == 0, throw=False)
        learned = eb.learn(stage, *stated(n), **options)
        stage = learned.prior
    return Run(untrained, learned.solution, learned)
