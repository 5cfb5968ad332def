"""A preconditioner for Gram matrices whose eigenvalues decrease fast."""

import functools as ft
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, Int

from ._determinant import Whitening
from ._gram import Block, covariance, Kernels, one_by_one, one_sides, variances
from ._mesh import padded, shared, tall_qr


class LowRank(eqx.Module):
    # (L L^T + N)^-1, with few columns of L, and a diagonal N.
    #
    # With N^-1/2 L = Q R this is N^-1/2 (1 - Q Q^T + Q (1 + R R^T)^-1 Q^T) N^-1/2. The
    # entries of R may be 1e7: Woodbury's formula, with the squares of these added to 1,
    # would have no correct digits.
    basis: Float[Array, "m r"]  # Q, with rows of zeros at its end
    inner: Float[Array, "r r"]  # upper triangular, with 1 + R R^T = inner^T inner
    root: Float[Array, " M"]  # N^-1/2
    # Of what L L^T leaves of a variance, relatively to the noise, the most. The
    # condition number of what is preconditioned is about as large, or some times that.
    rest: Float[Array, ""]

    def __init__(
        self,
        left: Float[Array, "m r"],
        root: Float[Array, " M"],
        rest: Float[Array, ""],
        rank: Int[Array, ""],
    ):
        scaled = padded(root)[:, None] * left
        self.basis, self.inner = _factors(scaled, rank)
        self.root = root
        self.rest = rest

    def __call__(self, vector: Float[Array, " M"]) -> Float[Array, " M"]:
        both = lambda x: self._divide(self._divide(x, 1), 0)
        return self.root * self._on_basis(both, self.root * vector)

    @property
    def whitening(self) -> Whitening:
        # Its root, N^-1/2 (1 - Q Q^T + Q inner^-1 Q^T), and minus its determinant.
        forth = lambda x: self._on_basis(lambda c: self._divide(c, 0), x)
        back = lambda x: self._on_basis(lambda c: self._divide(c, 1), x)
        logarithm = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.inner))))
        return Whitening(
            lambda v: self.root * forth(v),
            lambda v: back(self.root * v),
            2 * (logarithm - jnp.sum(jnp.log(self.root))),
        )

    def _divide(self, coefficients: Float[Array, " r"], trans: int):
        return jsl.solve_triangular(self.inner, coefficients, trans=trans)

    def _on_basis(self, change: Callable, vector: Float[Array, " M"]):
        # Changes coefficients of the basis, and leaves alone what is orthogonal to it.
        rest = shared(padded(vector))
        coefficients = jnp.zeros_like(self.inner[0])
        # Once is not enough: it leaves rounding of what is large.
        for _ in range(2):
            more = self.basis.T @ rest
            rest, coefficients = rest - self.basis @ more, coefficients + more
        return (rest + self.basis @ change(coefficients))[: len(vector)]


def _factors(
    left: Float[Array, "m r"], rank: Int[Array, ""]
) -> tuple[Float[Array, "m r"], Float[Array, "r r"]]:
    # Q and `inner`, of columns that are zero but for the first `rank`. Most often these
    # are few, and time grows with the square of the number that are looked at.
    width = left.shape[1]
    eye = jnp.eye(width, dtype=left.dtype)

    def of_first(num, left):
        basis, right = tall_qr(left[:, :num])
        num = len(right)
        inner = jnp.linalg.qr(jnp.concatenate([right.T, eye[:num, :num]]), mode="r")
        basis = jnp.pad(basis, ((0, 0), (0, width - num)))
        return basis, eye.at[:num, :num].set(inner)

    widths = sorted({-(-width // parts) for parts in _PARTS})
    which = jnp.searchsorted(jnp.asarray(widths), rank)
    branches = [ft.partial(of_first, num) for num in widths]
    return jax.lax.switch(which, branches, left)


# An eighth, a fourth, a half or all of the columns are looked at.
_PARTS = (8, 4, 2, 1)
# Functionals that are chosen at once, at most.
_AT_ONCE = 64
# Of correlations, in units of the last digit.
_ROUNDING = 30
# Where the rest of the variance is so small, relatively to the noise, it is enough.
_ENOUGH = 0.1


def low_rank(
    kernels: Kernels,
    functionals: Sequence[Block],
    noise: Float[Array, " M"],
    rank: int,
) -> LowRank:
    # For their covariance plus a diagonal, of which N has what L L^T leaves.
    #
    # Randomly pivoted Cholesky, by blocks: Chen, Epperly, Tropp and Webber (2025). As a
    # preconditioner: Diaz, Epperly, Frangella, Tropp and Webber, arXiv:2304.12465.
    rest = variances(kernels, functionals)
    # Correlations: the units of functionals can be very different.
    scale = jnp.sqrt(rest + noise)
    rest, noise = rest / scale**2, noise / scale**2
    candidates = _pointwise(functionals)
    left_over = lambda rest: jnp.max((rest / noise)[candidates], initial=0)
    rank = min(rank, len(candidates))
    # In blocks of the same size.
    num_blocks = -(-rank // _AT_ONCE)
    size = -(-rank // num_blocks) if rank > 0 else 0
    rank = num_blocks * size
    left = shared(padded(jnp.zeros((len(noise), rank), noise.dtype)))
    used = jnp.asarray(0)
    if rank > 0:
        single = _with_sides(kernels, functionals)
        columns = lambda i: covariance(kernels, functionals, [_take(single, i)])

        def unfinished(carry):
            _, rest, k, _ = carry
            return (k < rank) & (left_over(rest) > _ENOUGH)

        def step(carry):
            left, rest, k, key = carry
            key, this = jax.random.split(key)
            # So many different ones, with probabilities in proportion to the rest.
            odds = jnp.log(rest / noise)[candidates]
            odds = odds + jax.random.gumbel(this, odds.shape, odds.dtype)
            picked = jax.lax.top_k(odds, size)[1]
            index = candidates[picked]
            new = columns(picked) / scale[:, None] / scale[index][None]
            new = padded(new) - left @ left[index].T
            new = _divided(shared(new), new[index])
            left = jax.lax.dynamic_update_slice(left, new, (0, k))
            rest = jnp.maximum(rest - jnp.sum(new**2, axis=1)[: len(rest)], 0)
            return left, rest, k + size, key

        start = left, rest, used, jax.random.key(0)
        left, rest, used, _ = jax.lax.while_loop(unfinished, step, start)
    root = jax.lax.rsqrt(noise + rest) / scale
    left = padded(scale)[:, None] * left
    return LowRank(left, root, left_over(rest), used)


def _pointwise(functionals: Sequence[Block]) -> Int[Array, " c"]:
    # Averages are not chosen, since each takes many points: conjugate gradients have to
    # deal with them.
    ends = np.cumsum([0] + [block.size for block in functionals])
    each = [
        np.arange(start, end)
        for block, start, end in zip(functionals, ends, ends[1:])
        if block.sum_over == 1
    ]
    return jnp.asarray(np.concatenate([np.arange(0), *each]))


def _with_sides(kernels: Kernels, functionals: Sequence[Block]) -> Block:
    single = one_by_one([block for block in functionals if block.sum_over == 1])
    sides = one_sides(kernels, single.jets, single.points)
    return Block(single.points, single.coefficients, single.jets, sides)


def _take(block: Block, index: Int[Array, " k"]) -> Block:
    return jax.tree.map(lambda x: x[index], block)


def _divided(columns: Float[Array, "m k"], square: Float[Array, "k k"]):
    # Columns of a positive definite matrix by the root of the part with their own rows,
    # less what of that is nothing but rounding.
    values, vectors = jnp.linalg.eigh(0.5 * (square + square.T))
    keep = values > _ROUNDING * jnp.finfo(square.dtype).eps
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1)), 0)
    return columns @ (vectors * root[None])
