"""Extreme eigenvalues, from products only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def power_iteration(
    product: Callable, start: Array, num_products: int
) -> Float[Array, ""]:
    def step(v, _):
        new = product(v)
        size = jnp.linalg.norm(new)
        return new / size, size

    unit = start / jnp.linalg.norm(start)
    return jax.lax.scan(step, unit, length=num_products)[1][-1]


def extreme_eigenvalues(
    posterior: Callable, curvature: Callable, like: Array, num_products: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    # Of C H, with C = `posterior` positive semidefinite and H = `curvature` symmetric.
    # It is self-adjoint in the inner product of C^-1, which is not needed if each
    # vector x = C q is kept together with its q: <x, y> = q_x . y.
    steps = min(num_products, like.shape[0])
    start = jnp.cos(jnp.arange(like.shape[0], dtype=like.dtype))

    def normalised(q, x):
        square = jnp.maximum(q @ x, 0)
        size = jnp.sqrt(square)
        scale = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        return q * scale, x * scale, size

    def body(carry, i):
        qs, xs = carry
        q = curvature(xs[i])
        x = posterior(q)
        # Full orthogonalisation, twice: the Krylov space is small.
        for _ in range(2):
            overlap = qs @ x
            q, x = q - overlap @ qs, x - overlap @ xs
        product = curvature(xs[i])
        column = xs @ product
        q, x, size = normalised(q, x)
        # Below this there is only rounding: the Krylov space is exhausted.
        small = size <= 1e-12 * jnp.max(jnp.abs(column))
        q, x = jnp.where(small, 0, q), jnp.where(small, 0, x)
        return (qs.at[i + 1].set(q), xs.at[i + 1].set(x)), column

    q, x, _ = normalised(start, posterior(start))
    empty = jnp.zeros((steps + 1, like.shape[0]), like.dtype)
    carry = (empty.at[0].set(q), empty.at[0].set(x))
    _, columns = jax.lax.scan(body, carry, jnp.arange(steps))
    # Each row knows its overlaps with the vectors before it.
    lower = jnp.tril(columns[:, :steps])
    values = jnp.linalg.eigvalsh(lower + jnp.tril(lower, -1).T)
    return values[0], values[-1]
