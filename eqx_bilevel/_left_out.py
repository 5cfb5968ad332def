"""Predictions of some targets from all others, without solving anything again.

In a linearised problem the targets are jointly Gaussian, with the Gram matrix as their
covariance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._problem import Problem


#
# Linear algebra that is not differentiated through a factorisation
#


def positive_solve(
    matrix: Float[Array, "m m"], vectors: Float[Array, "m k"]
) -> Float[Array, "m k"]:
    # Not by Lineax, whose derivatives raise where there is nan.
    factor = jnp.linalg.cholesky(jax.lax.stop_gradient(matrix))
    return jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        vectors,
        lambda _, b: jax.scipy.linalg.cho_solve((factor, True), b),
        symmetric=True,
    )


def _inverse(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    return positive_solve(matrix, jnp.eye(len(matrix), dtype=matrix.dtype))


@jax.custom_jvp
def log_determinant(matrix: Float[Array, "m m"]) -> Float[Array, ""]:
    factor = jnp.linalg.cholesky(matrix)
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


@log_determinant.defjvp
def _(primals, tangents):
    change = jnp.vdot(_inverse(*primals), tangents[0])
    return log_determinant(*primals), change


#
# Predictions
#


class Errors(NamedTuple):
    # Of predictions: by how much the targets differ from them, and its covariance.
    values: Float[Array, " s"]
    covariance: Float[Array, "s s"]


def predicted(
    matrix: Float[Array, "M M"], rhs: Float[Array, " M"], rows: Int[np.ndarray, " s"]
) -> Errors:
    # Some targets from all others. Not by the inverse of the whole matrix, which is
    # large: what follows from it is only accurate if the others have no tiny nugget.
    others = np.setdiff1d(np.arange(len(rhs)), rows)
    own, inner = matrix[np.ix_(rows, rows)], matrix[np.ix_(others, others)]
    if len(others) == 0:
        return Errors(rhs[rows], own)
    across = matrix[np.ix_(others, rows)]
    weights = positive_solve(inner, across)
    covariance = own - across.T @ weights
    symmetric = 0.5 * (covariance + covariance.T)
    return Errors(rhs[rows] - weights.T @ rhs[others], symmetric)


def left_out(errors: Errors, folds: Sequence[np.ndarray]) -> list[tuple[Array, Array]]:
    # Of predictions from the other folds too. For each (k, s) array of folds: the
    # errors, of the same shape, and the inverses of their covariances, of shape
    # (k, s, s). They are blocks of the inverse: Rasmussen and Williams (2006),
    # equations 5.10 to 5.12.
    precision = _inverse(errors.covariance)
    weights = precision @ errors.values
    out = []
    for chosen in folds:
        blocks = precision[chosen[:, :, None], chosen[:, None, :]]
        values = jnp.linalg.solve(blocks, weights[chosen][..., None])[..., 0]
        out.append((values, blocks))
    return out


#
# Which targets
#


def rows_of(problem: Problem, name: str) -> Int[np.ndarray, "n q"]:
    # Where the targets of a condition stand among all of them.
    sizes = [r.target.size for r in problem.rows]
    i = [r.name for r in problem.rows].index(name)
    shape = problem.rows[i].target.shape
    return sum(sizes[:i]) + np.arange(sizes[i]).reshape(shape)


def folds_of(shape: tuple[int, int], num: int) -> list[np.ndarray]:
    # Of as many points with so many numbers each. One array for all folds of the same
    # size.
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    larger = shape[0] % num  # So many have one point more.
    folds = [numbers[i::num].reshape(-1) for i in range(num)]
    return [np.stack(f) for f in (folds[:larger], folds[larger:]) if f]
