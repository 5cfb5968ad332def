"""What the experiments share.

An experiment is a module with a `title`; the `published` errors, RMS and largest, and
seconds; a function `run(key, n)` that learns at n collocation points; and `compare`,
which puts a solution beside the truth on a test grid. Nothing is chosen by looking at
the truth.
"""

import sys
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


def value_of(name):
    return lambda u, x: u[name].value


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


class Stage(NamedTuple):
    """One value of a parameter, a number of points and of steps."""

    value: float
    n: int
    steps: int


def by_continuation(
    prior: Any,
    stated: Callable[..., tuple[list[eb.Condition], eb.AbstractObjective]],
    stages: Sequence[Stage],
) -> Run:
    """Learns for one value of a parameter after the other, each time starting from the
    kernel that was learned last. `stated(value, n, place)` is told how to choose points
    from candidates: those that suit that kernel.
    """
    first = lambda candidates, n: candidates[:n]
    conditions, _ = stated(stages[-1].value, stages[-1].n, first)
    untrained = lambda: eb.solve(prior, conditions, throw=False)
    stage, place = prior, first
    for i, (value, n, steps) in enumerate(stages):
        options = dict(steps=steps, scale_search=i == 0, throw=False)
        learned = eb.learn(stage, *stated(value, n, place), **options)
        stage, kernel = learned.prior, learned.prior.kernel
        place = lambda candidates, n, kernel=kernel: eb.farthest_points(
            candidates, kernel, n
        )
        print(f"{value:.3e}: {float(learned.objective):.1e}", file=sys.stderr)
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
