"""Determinants of Gram matrices that are known by products only."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Whitening(NamedTuple):
    # W with W W^T about G^-1, and log det (W W^T)^-1.
    multiply: Callable[[Float[Array, " M"]], Float[Array, " M"]]
    multiply_transposed: Callable[[Float[Array, " M"]], Float[Array, " M"]]
    log_determinant: Float[Array, ""]


def log_determinant(
    product: Callable[[Array], Array],
    without_gradient: Callable[[Array], Array],
    whitening: Whitening,
    probes: Float[Array, "p M"],
) -> Float[Array, ""]:
    # Of G, by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017) of W^T G W,
    # whose eigenvalues are about one. `product` with G is differentiated: where the
    # mean of v v^T over the probes is the identity,
    #
    #     tr(G^-1 dG) = mean of (W (W^T G W)^-1 v)^T dG (W v).
    try:
        from matfree.decomp import tridiag_sym
    except ImportError as e:
        raise ImportError(
            "Determinants without a matrix are estimated with matfree. Install it by "
            '`pip install "eqx_bilevel[scale]"`.'
        ) from e
    num_steps = min(_NUM_STEPS, probes.shape[1])
    lanczos = tridiag_sym(num_steps, reortho="full", materialize=True, custom_vjp=False)

    def whitened(v):
        return whitening.multiply_transposed(without_gradient(whitening.multiply(v)))

    def quadrature(probe):
        size = jnp.linalg.norm(probe)
        found = lanczos(whitened, probe / size)
        values, vectors = jnp.linalg.eigh(found.J_small)
        first = vectors[0]
        solved = (vectors @ (first / values)) @ found.Q_tall
        logarithm = size**2 * jnp.sum(first**2 * jnp.log(values))
        return logarithm, whitening.multiply(size * solved), whitening.multiply(probe)

    logarithms, left, right = jax.lax.map(quadrature, probes)
    value = whitening.log_determinant + jnp.mean(logarithms)
    slope = jax.checkpoint(lambda at: at[0] @ product(at[1]))
    slope = jnp.mean(jax.lax.map(slope, (left, right)))
    return value + (slope - jax.lax.stop_gradient(slope))


# More than conjugate gradients take with the same preconditioner.
_NUM_STEPS = 40
