"""Predictions of some targets from all others, without solving anything again."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._problem import Problem


# Neither is differentiated through the factorisation.
@jax.custom_jvp
def inverse(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    factor = jnp.linalg.cholesky(matrix)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.cho_solve((factor, True), eye)


@inverse.defjvp
def _(primals, tangents):
    found = inverse(*primals)
    return found, -found @ tangents[0] @ found


@jax.custom_jvp
def log_determinant(matrix: Float[Array, "m m"]) -> Float[Array, ""]:
    factor = jnp.linalg.cholesky(matrix)
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


@log_determinant.defjvp
def _(primals, tangents):
    change = jnp.vdot(inverse(*primals), tangents[0])
    return log_determinant(*primals), change


def left_out(
    problem: Problem,
    matrix: Float[Array, "M M"],
    weights: Float[Array, " M"],
    name: str,
    num_folds: int,
) -> Iterator[tuple[Float[Array, "k s"], Float[Array, "k s s"]]]:
    # Of all folds of a size at once: the errors of predictions from all the rest, and
    # the inverses of their covariances. They are blocks of the inverse Gram matrix:
    # Rasmussen and Williams (2006), equations 5.10 to 5.12.
    sizes = [r.target.size for r in problem.rows]
    i = [r.name for r in problem.rows].index(name)
    n, q = problem.rows[i].target.shape
    rows = sum(sizes[:i]) + jnp.arange(n * q).reshape(n, q)
    precision = inverse(matrix)
    larger = n % num_folds  # So many folds have one point more.
    for start, stop in ((0, larger), (larger, num_folds)):
        if start == stop:
            continue
        folds = [rows[j::num_folds].reshape(-1) for j in range(start, stop)]
        chosen = jnp.stack(folds)
        precisions = precision[chosen[:, :, None], chosen[:, None, :]]
        errors = jnp.linalg.solve(precisions, weights[chosen][..., None])[..., 0]
        yield errors, precisions
