"""Covariances of linear functionals, as matrices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._functionals import Block, Kernels
from ._sides import at_pairs, by_rows, covariances, side_of


def _block_matrix(kernels: Kernels, left: Block, right: Block) -> Float[Array, "l r"]:
    fn = lambda kernels, *at: (at_pairs(kernels, left, right, *at), ())
    sides = side_of(kernels, left), side_of(kernels, right)
    out, _ = by_rows(fn, kernels, *sides, struct=())
    out = jnp.stack([jnp.stack(row, axis=-1) for row in out], axis=1)  # (n, q, m, r)
    if left.sum_over > 1:
        out = out.reshape(-1, left.sum_over, *out.shape[1:]).sum(axis=1)
    if right.sum_over > 1:
        n, q, _, r = out.shape
        out = out.reshape(n, q, -1, right.sum_over, r).sum(axis=3)
    return out.reshape(left.size, right.size)


def covariance(
    kernels: Kernels, left: Sequence[Block], right: Sequence[Block]
) -> Float[Array, "l r"]:
    # The dense matrix of covariances between functionals.
    symmetric = left is right
    rows: list[list] = []
    for i, a in enumerate(left):
        row = []
        for j, b in enumerate(right):
            if symmetric and j < i:
                row.append(rows[j][i].T)
            else:
                row.append(_block_matrix(kernels, a, b))
        rows.append(row)
    return jnp.block(rows)


def variances(kernels: Kernels, blocks: Sequence[Block]) -> Float[Array, " m"]:
    # The diagonal of `covariance(kernels, blocks, blocks)`.
    out = []
    for block in blocks:
        if block.sum_over > 1:
            out.append(_variances_of_sums(kernels, block))
            continue
        numbers = side_of(kernels, block).numbers()
        shape = block.points.shape[:1]
        table = covariances(kernels, block, block, shape, numbers, numbers)
        each = [row[q] for q, row in enumerate(table)]
        out.append(jnp.stack(each, axis=1).reshape(block.size))
    return jnp.concatenate(out)


def _variances_of_sums(kernels: Kernels, block: Block) -> Float[Array, " m"]:
    # One small matrix for each sum.
    def of_one(part: Block):
        return jnp.diagonal(_block_matrix(kernels, part, part))

    split = lambda x: x.reshape(-1, block.sum_over, *x.shape[1:])
    return jax.lax.map(of_one, jax.tree.map(split, block)).reshape(block.size)
