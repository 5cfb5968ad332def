"""Predictions of some targets from all others, without solving anything again."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def rows_of(problem: Problem, name: str) -> Int[Array, "n q"]:
    # Where the targets of a condition stand among all of them.
    sizes = [r.target.size for r in problem.rows]
    i = [r.name for r in problem.rows].index(name)
    shape = problem.rows[i].target.shape
    return sum(sizes[:i]) + jnp.arange(sizes[i]).reshape(shape)


def folds_of(rows: Int[Array, "n q"], num: int) -> list[Array]:
    # One array for all folds of the same size.
    larger = len(rows) % num  # So many have one point more.
    folds = [rows[i::num].reshape(-1) for i in range(num)]
    return [jnp.stack(f) for f in (folds[:larger], folds[larger:]) if f]


def left_out(
    matrix: Float[Array, "M M"],
    weights: Float[Array, " M"],
    folds: Sequence[Array],
) -> Iterator[tuple[Array, Array]]:
    # Of (k, s) arrays of folds: the errors of predicting each from all the rest, and
    # the (k, s, s) inverses of their covariances. They are blocks of the inverse Gram
    # matrix: Rasmussen and Williams (2006), equations 5.10 to 5.12.
    precision = inverse(matrix)
    for chosen in folds:
        precisions = precision[chosen[:, :, None], chosen[:, None, :]]
        errors = jnp.linalg.solve(precisions, weights[chosen][..., None])[..., 0]
        yield errors, precisions
