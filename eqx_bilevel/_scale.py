"""The search for a common factor of all lengthscales, before any local method."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._condition import Condition, GaussianProcess
from ._gram import Block, variances
from ._kernels import AbstractKernel, rescale
from ._parameters import unwrap
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


def rescaled(prior: Any, factor: Float[Array, ""]) -> Any:
    # The prior with all lengthscales multiplied by the same factor.
    scale = lambda p: eqx.tree_at(lambda p: p.kernel, p, rescale(p.kernel, factor))
    is_prior = lambda x: isinstance(x, GaussianProcess)
    return jax.tree.map(scale, prior, is_leaf=is_prior)


def scales(conditions: Sequence[Condition], num: int) -> np.ndarray:
    # Lengths between the distance of the points and the size of the domain.
    points = np.concatenate([np.asarray(c.points) for c in conditions])
    edges = np.maximum(np.ptp(points, axis=0), 1e-30)
    spacing = (np.prod(edges) / len(points)) ** (1 / points.shape[1])
    return np.geomspace(spacing, edges.max(), num)


@eqx.filter_jit
def _typical_length(prior, points):
    kernels = [p.kernel for p in priors_of(unwrap(prior)).values()]
    lengths = jnp.stack([correlation_length(k, points) for k in kernels])
    return jnp.exp(jnp.mean(jnp.log(lengths)))


def search_scale(
    prior: Any,
    conditions: Sequence[Condition],
    value: Callable[[float, Any], float],
    num: int,
) -> tuple[Any, list[tuple[float, float]]]:
    # Returns the rescaled prior with the smallest value, and all (length, value) tried:
    # first on a coarse grid, then on a finer one around its best point, since valleys
    # can be narrower than what is between two points of the first.
    points = jnp.concatenate([c.points for c in conditions])
    typical = _typical_length(prior, points)
    tried: list[tuple[float, float]] = []

    def at(length):
        factor = jnp.asarray(length, points.dtype) / typical
        return rescaled(prior, jnp.where(jnp.isfinite(factor), factor, 1.0))

    def attempt(lengths):
        for length in map(float, lengths):
            tried.append((length, value(length, at(length))))
        return min(tried, key=lambda pair: pair[1])

    coarse = scales(conditions, num)
    best, least = attempt(coarse)
    if num > 1 and np.isfinite(least):
        ratio = coarse[1] / coarse[0]
        best, least = attempt(best * ratio ** np.array([-0.5, -0.25, 0.25, 0.5]))
    return (at(best) if np.isfinite(least) else prior), tried
