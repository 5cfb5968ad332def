"""Regression of some functionals on others: the dense linear algebra of a supernode.

A covariance matrix M is that of parents first, P, and then of columns. With

    x_c = W^T x_p + L e,   e ~ N(0, I),   W = P^-1 M_pc,   L L^T = S = M_cc - W^T M_pc,

they contribute M^-1 - P^-1 = G S^-1 G^T, where G = [-W; I], to the precision of all.
Derivatives need products with dM only: no factorisation is differentiated, and no
difference of large numbers is taken.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Bool, Float


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def regression(
    matrix: Float[Array, "m m"], fill: Bool[Array, " m"], num_columns: int
) -> tuple[Float[Array, "p c"], Float[Array, "c c"]]:
    # W and L. What is filled up is independent of all else.
    return _Factor.of(matrix, fill, num_columns).regression()


@regression.defjvp
def _(num_columns, primals, tangents):
    matrix, fill = primals
    factor = _Factor.of(matrix, fill, num_columns)
    weights, root = factor.regression()
    # dW = P^-1 (dM G)_p and dS = G^T dM G
    change = factor.masked(tangents[0])
    m = factor.num_parents
    product = change[:, m:] - change[:, :m] @ weights
    inner = product[m:] - weights.T @ product[:m]
    solved = jsl.solve_triangular(root, inner, lower=True)
    solved = jsl.solve_triangular(root, solved.T, lower=True).T
    lower = jnp.tril(solved) - 0.5 * jnp.diag(jnp.diagonal(solved))
    return (weights, root), (factor.solve_parents(product[:m]), root @ lower)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def precision_product(
    matrix: Float[Array, "m m"],
    fill: Bool[Array, " m"],
    vector: Float[Array, " m"],
    num_columns: int,
) -> Float[Array, " m"]:
    # (M^-1 - P^-1) v
    return _Factor.of(matrix, fill, num_columns).difference(vector)


@precision_product.defjvp
def _(num_columns, primals, tangents):
    # -M^-1 dM M^-1 v + P^-1 dP P^-1 v, arranged.
    matrix, fill, vector = primals
    factor = _Factor.of(matrix, fill, num_columns)
    out = factor.difference(vector)
    change = factor.masked(tangents[0])
    from_parents = factor.solve_parents((change @ out)[: factor.num_parents])
    dv = tangents[2] - change @ factor.solve(vector)
    return out, factor.difference(dv).at[: factor.num_parents].add(-from_parents)


class _Factor(NamedTuple):
    # Of M in units of standard deviations, which can be very different.
    cholesky: Float[Array, "m m"]
    scale: Float[Array, " m"]
    keep: Float[Array, " m"]
    num_parents: int

    @staticmethod
    def of(matrix, fill, num_columns: int) -> "_Factor":
        variance = jnp.where(fill, 1, jnp.diagonal(matrix))
        zero = variance == 0
        scale = jnp.where(zero, _NOTHING, jnp.sqrt(jnp.where(zero, 1, variance)))
        keep = jnp.invert(fill).astype(matrix.dtype)
        matrix = matrix * (keep / scale)[:, None] * (keep / scale)[None, :]
        on_diagonal = jnp.eye(len(matrix), dtype=bool)
        matrix = jnp.where(on_diagonal, jnp.where(zero | fill, 1, matrix), matrix)
        cholesky = jsl.cholesky(matrix, lower=True)
        return _Factor(cholesky, scale, keep, len(matrix) - num_columns)

    def masked(self, change: Float[Array, "m m"]) -> Float[Array, "m m"]:
        return change * self.keep[:, None] * self.keep[None, :]

    def regression(self):
        m, scale = self.num_parents, self.scale
        weights = _back(self.cholesky[:m, :m], self.cholesky[m:, :m].T)
        weights = weights * scale[None, m:] / scale[:m, None]
        return weights, scale[m:, None] * self.cholesky[m:, m:]

    def solve(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        # M^-1 v
        return _solve(self.cholesky, vector / self.scale) / self.scale

    def solve_parents(self, given: Float[Array, " p *k"]) -> Float[Array, " p *k"]:
        # P^-1 v
        m = self.num_parents
        scale = self.scale[:m].reshape(m, *[1] * (given.ndim - 1))
        return _solve(self.cholesky[:m, :m], given / scale) / scale

    def difference(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        # (M^-1 - P^-1) v
        v = _forth(self.cholesky, vector / self.scale).at[: self.num_parents].set(0)
        return _back(self.cholesky, v) / self.scale


# In place of the standard deviation of a functional that is zero, such as a term of an
# equation whose coefficient is.
_NOTHING = 1e-30


def _forth(cholesky, given):
    return jsl.solve_triangular(cholesky, given, lower=True)


def _back(cholesky, given):
    return jsl.solve_triangular(cholesky, given, lower=True, trans=1)


def _solve(cholesky, given):
    return _back(cholesky, _forth(cholesky, given))
