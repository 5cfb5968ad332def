"""The search for factors of all lengthscales, before any local method."""

import functools as ft
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.spatial import KDTree

from ._condition import Condition, GaussianProcess
from ._gram import Block, variances
from ._kernels import AbstractKernel, rescale
from ._parameters import AbstractParameter, unwrap
from ._problem import priors_of


def correlation_length(kernel: AbstractKernel, points: Array) -> Float[Array, ""]:
    # From how fast the process varies: the square root of d E[f^2] / E[|grad f|^2], on
    # average over the points. It is the lengthscale of a Gaussian kernel.
    n, dim = points.shape

    def mean_square(index):
        coefficients = jnp.ones((n, 1, 1), points.dtype)
        return jnp.mean(variances({"f": kernel}, [Block(points, coefficients, index)]))

    value = mean_square((("f", (0,) * dim),))
    unit = lambda i: tuple(int(i == j) for j in range(dim))
    slopes = [mean_square((("f", unit(i)),)) for i in range(dim)]
    return jnp.sqrt(dim * value / sum(slopes[1:], slopes[0]))


def rescaled(prior: Any, factor: Float[Array, " d"]) -> Any:
    # The prior with all lengthscales multiplied by one factor for each dimension. What
    # is learned has the structure of what was given, so that either can be saved and
    # read into the other: kernels that would get another one stay as they are.
    def scale(p):
        kernel = rescale(p.kernel, factor)
        alike = _structure(kernel) == _structure(p.kernel)
        return eqx.tree_at(lambda p: p.kernel, p, kernel) if alike else p

    is_prior = lambda x: isinstance(x, GaussianProcess)
    return jax.tree.map(scale, prior, is_leaf=is_prior)


def _structure(kernel: Any) -> tuple:
    # With where arrays are: a number that became one would be learned.
    leaves, structure = jax.tree.flatten(eqx.filter(kernel, eqx.is_array))
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def has_scale(prior: Any, dim: int) -> bool:
    # Whether there are lengthscales to search for. Warns of kernels that it must leave.
    for unknown, p in priors_of(prior).items():
        left = _not_rescalable(p.kernel, jnp.ones(dim))
        names = sorted({type(k).__name__ for k in left})
        if names:
            classes = " and ".join(f"`{name}`" for name in names)
            warnings.warn(
                f"The scale search leaves the kernel of {unknown!r} as it is, because "
                f"rescaling {classes} would change its structure. Use "
                "`eqx_bilevel.rescale(kernel, 1.0)`, which adds a factor that can be "
                "learned (a kernel of your own becomes "
                "`eqx_bilevel.Stretched(kernel, 1.0)`); or register "
                "`eqx_bilevel.rescale` for the class; or pass `scale_search=False`.",
                stacklevel=3,
            )
    twice = rescaled(prior, jnp.full(dim, 2.0))
    return not _equal(prior, twice)


def _not_rescalable(kernel: AbstractKernel, factor: Any) -> list[AbstractKernel]:
    # The innermost kernels in it whose structure changes if they are rescaled.
    if _structure(rescale(kernel, factor)) == _structure(kernel):
        return []
    if rescale.dispatch(type(kernel)) is rescale.dispatch(object):
        return [kernel]
    kinds = AbstractKernel, AbstractParameter
    is_leaf = lambda x: x is not kernel and isinstance(x, kinds)
    leaves = jax.tree.leaves(kernel, is_leaf=is_leaf)
    inner = [k for k in leaves if isinstance(k, AbstractKernel)]
    return [found for k in inner for found in _not_rescalable(k, 1.0)] or [kernel]


def scales(conditions: Sequence[Condition], num: int) -> np.ndarray:
    # Lengths between the distance of the points and the size of the domain.
    points = np.concatenate([np.asarray(c.points) for c in conditions])
    edges = np.maximum(np.ptp(points, axis=0), 1e-30)
    spacing = (np.prod(edges) / len(points)) ** (1 / points.shape[1])
    return np.geomspace(spacing, edges.max(), num)


def are_apart(
    prior: Any, conditions: Sequence[Condition], points: Float[Array, "n d"]
) -> bool:
    # Whether most points are correlated with none of the conditions', as far as the
    # nearest ones tell.
    there = np.concatenate([np.asarray(c.points) for c in conditions])
    _, nearest = KDTree(there).query(np.asarray(points))
    found = _correlation(prior, jnp.asarray(there[nearest]), points)
    return float(np.median(found)) < 0.1


@eqx.filter_jit
def _correlation(prior, x, y):
    # The largest of all unknowns'.
    def one(kernel, x, y):
        return jnp.abs(kernel(x, y)) / jnp.sqrt(kernel(x, x) * kernel(y, y))

    each = lambda kernel: jax.vmap(ft.partial(one, kernel))(x, y)
    kernels = [p.kernel for p in priors_of(unwrap(prior)).values()]
    return jnp.max(jnp.stack(list(map(each, kernels))), axis=0)


@eqx.filter_jit
def _typical_length(prior, points):
    kernels = [p.kernel for p in priors_of(unwrap(prior)).values()]
    lengths = jnp.stack([correlation_length(k, points) for k in kernels])
    return jnp.exp(jnp.mean(jnp.log(lengths)))


class Tried(NamedTuple):
    lengths: tuple[float, ...]
    objective: float


def search_scale(
    prior: Any,
    conditions: Sequence[Condition],
    value: Callable[[tuple[float, ...], Any], float],
    num: int,
) -> tuple[Any, list[Tried]]:
    # Returns the rescaled prior with the smallest value, and all that was tried: first
    # the prior itself.
    points = jnp.concatenate([c.points for c in conditions])
    dim = points.shape[1]
    typical = float(_typical_length(prior, points))
    typical = typical if np.isfinite(typical) else 1.0
    tried: list[Tried] = []

    def at(lengths):
        factor = np.asarray(lengths, points.dtype) / typical
        return rescaled(prior, jnp.asarray(factor))

    def attempt(lengths, candidate=None):
        for each in tried:
            if np.allclose(each.lengths, lengths):
                return each.objective
        lengths = tuple(map(float, lengths))
        candidate = at(lengths) if candidate is None else candidate
        tried.append(Tried(lengths, value(lengths, candidate)))
        return tried[-1].objective

    def best():
        return min(tried, key=lambda each: each.objective)

    attempt(dim * [typical], prior)
    # Then a common length, on a coarse grid, then on a finer one around its two best
    # valleys, since these can be narrower than what is between two points of the first.
    coarse = scales(conditions, num)
    values = [attempt(dim * [length]) for length in coarse]
    for i in _valleys(values)[:2]:
        ratio = coarse[1] / coarse[0]
        for power in (-0.5, -0.25, 0.25, 0.5):
            attempt(dim * [coarse[i] * ratio**power])
    # Last each dimension on its own, and in exchange for the others.
    if np.isfinite(best().objective) and _anisotropic(prior, dim):
        for _ in range(_MOST_ROUNDS):
            before = best()
            for direction in _directions(dim):
                _walk(attempt, best, direction)
            if best() is before:
                break
    # What was given, if nothing is finite.
    return at(best().lengths), tried


def _valleys(values: Sequence[float]) -> list[int]:
    # The positions of local minima, the lowest first. One value alone is none.
    if len(values) < 2:
        return []
    padded = [np.inf, *values, np.inf]
    low = [i for i, value in enumerate(values) if padded[i] > value <= padded[i + 2]]
    return sorted(low, key=lambda i: values[i])


_MOST_ROUNDS = 3
_MOST_DOUBLINGS = 10


def _directions(dim: int) -> list[np.ndarray]:
    # Valleys are often along one dimension, and the best common length beside them.
    single = np.eye(dim)
    exchange = single - 1 / dim
    # In two dimensions both exchanges are the same, in opposite directions.
    return [*single, *(exchange[:1] if dim == 2 else exchange)]


def _walk(attempt, best, direction: np.ndarray) -> None:
    # Doubles or halves lengths for as long as it helps.
    start = best()
    for ratio in (2.0, 0.5):
        for _ in range(_MOST_DOUBLINGS):
            here = best()
            ahead = np.multiply(here.lengths, ratio**direction)
            if not attempt(ahead) < here.objective:
                break
        if best() is not start:
            break


def _anisotropic(prior: Any, dim: int) -> bool:
    # Whether the dimensions have lengthscales of their own.
    if dim == 1:
        return False
    uneven = 2.0 ** (np.arange(dim) - (dim - 1) / 2)
    one, other = (rescaled(prior, jnp.asarray(f)) for f in (np.ones(dim), uneven))
    return not _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    # By NumPy: JAX would compile a comparison for each shape.
    return bool(eqx.tree_equal(*jax.device_get((one, other)), rtol=1e-6))
