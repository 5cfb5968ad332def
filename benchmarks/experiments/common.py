"""What the experiments share.

An experiment is a module with a `title`; the `published` errors, RMS and largest, and
seconds; a function `run(key, n)` that learns at n collocation points; and `compare`,
which puts a solution beside the truth on a test grid. Nothing is chosen by looking at
the truth.
"""

import functools as ft
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


def place_by(kernel, candidates, n):
    """The n of the candidates that are spread evenly in the kernel's metric."""
    return eb.farthest_points(candidates, kernel, n)


def place_most(place, candidates, n, spread=lambda points: points):
    """Three quarters of n points by `place(candidates, n)`, and the others everywhere,
    since nobody else would look where the kernel that places them is wrong. They are
    candidates as they are, or as `spread(points)`."""
    few = n // 4
    others = place(candidates[few:], n - few)
    return jnp.concatenate([spread(candidates[:few]), others])


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
    learned there is where to start with more. The solution with few points is not: it
    may be close to none."""
    all_conditions, _ = stated(sizes[-1])
    untrained = ft.partial(eb.solve, prior, all_conditions, throw=False)
    options = {}
    for n, most in zip(sizes, steps, strict=True):
        learned = eb.learn(prior, *stated(n), steps=most, throw=False, **options)
        prior, options = learned.prior, dict(scale_search=False)
    return Run(untrained, learned.solution, learned)


def by_continuation(
    prior: eb.GaussianProcess,
    stated: Callable[..., tuple[list[eb.Condition], eb.AbstractObjective]],
    values: Sequence[float],
    *,
    n: int,
    steps: tuple[int, int, int],
    enough: float = 0.0,
) -> Run:
    """Learns for one value of a parameter after the other, at `n` points: a third of
    them for the first, and twice as many once more for the last. Each begins with the
    prior and the solution of the one before. All but the first end once the objective
    is small `enough`.

    `stated(value, n, place)` is told how to choose n points from candidates: those that
    suit the kernel that was learned last.
    """
    first, others, last = steps
    stages = [(values[0], n // 3, first)]
    stages += [(value, n, others) for value in values[1:]]
    stages += [(values[-1], 2 * n, last)]

    place = lambda candidates, n: candidates[:n]
    all_conditions, _ = stated(values[-1], 2 * n, place)
    untrained = ft.partial(eb.solve, prior, all_conditions, throw=False)
    options = {}
    for value, size, most in stages:
        problem = stated(value, size, place)
        learned = eb.learn(prior, *problem, steps=most, throw=False, **options)
        prior = learned.prior
        place = ft.partial(place_by, prior.kernel)
        options = dict(
            initial=learned.solution,
            scale_search=False,
            callback=lambda progress: progress.objective < enough,
        )
    return Run(untrained, learned.solution, learned)
