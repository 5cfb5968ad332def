"""Linear functionals of Gaussian processes, and their covariances by blocks of rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jets import Index
from .._kernels import AbstractKernel
from ._pairs import one_sided, pairs


Kernels = Mapping[str, AbstractKernel]  # by unknown; unknowns are independent

# Pairs of points that are treated at once: enough to keep the cores busy, few enough to
# stay in their caches.
_PAIRS_AT_ONCE = 2**17


class Block(eqx.Module):
    # `q` functionals at each of `n` points, each a combination of the same `p` entries
    # of the unknowns' jets there. Functionals are counted point by point.
    # Without coefficients they are those entries themselves.
    points: Float[Array, "n d"]
    coefficients: Float[Array, "n q p"] | None
    jets: tuple[tuple[str, Index], ...] = eqx.field(static=True)

    @property
    def size(self) -> int:
        return self.points.shape[0] * self.at_each

    @property
    def at_each(self) -> int:
        c = self.coefficients
        return len(self.jets) if c is None else c.shape[1]


def _by_unknown(block: Block) -> dict[str, dict[Index, int]]:
    # For each unknown, the indices of its jet and where they stand in the coefficients.
    out: dict[str, dict[Index, int]] = {}
    for position, (name, index) in enumerate(block.jets):
        out.setdefault(name, {})[index] = position
    return out


def _sides(kernels: Kernels, block: Block):
    # What can be computed point by point: once, outside all loops over pairs.
    sides = {}
    for name, indices in _by_unknown(block).items():
        kernel, asked = kernels[name], tuple(indices)
        sides[name] = jax.vmap(lambda x: one_sided(kernel, asked, x))(block.points)
    return sides, block.coefficients


def _covariance(kernels: Kernels, left: Block, right: Block, left_side, right_side):
    # The (q, r) covariances of the functionals at one pair of points. All scalars, so
    # that the compiler makes one loop over the pairs of it.
    sides, coefficients = left_side
    other_sides, other_coefficients = right_side
    others = _by_unknown(right)
    zero = jnp.zeros((), left.points.dtype)
    total = [[zero] * right.at_each for _ in range(left.at_each)]
    for name, indices in _by_unknown(left).items():
        if name not in others:
            continue
        table = pairs(
            kernels[name],
            tuple(indices),
            tuple(others[name]),
            sides[name],
            other_sides[name],
        )
        for (a, b), entry in table.items():
            i, j = indices[a], others[name][b]
            for q, c in _column(coefficients, i):
                for r, d in _column(other_coefficients, j):
                    total[q][r] = total[q][r] + c * d * entry
    return jnp.stack([jnp.stack(row) for row in total])


def _column(coefficients, i: int) -> list[tuple[int, Any]]:
    # Which functionals have entry `i` of the jet, and with which coefficients.
    return [(i, 1.0)] if coefficients is None else list(enumerate(coefficients[:, i]))


def _map_rows(fn, rows, columns: int):
    # `vmap(fn)(rows)`, in chunks. Nothing of a chunk is kept for reverse mode.
    n = jax.tree.leaves(rows)[0].shape[0]
    chunks = -(-n * columns // _PAIRS_AT_ONCE)
    if chunks <= 1:
        return jax.vmap(fn)(rows)
    size = -(-n // chunks)
    # The last chunk is filled up with copies of the last row.
    index = jnp.minimum(jnp.arange(chunks * size), n - 1).reshape(chunks, size)
    chunked = jax.tree.map(lambda x: x[index], rows)
    out = jax.lax.map(jax.checkpoint(jax.vmap(fn)), chunked)
    return out.reshape((chunks * size,) + out.shape[2:])[:n]


def _block_matrix(kernels: Kernels, left: Block, right: Block) -> Float[Array, "l r"]:
    right_sides = _sides(kernels, right)

    def row(left_side):
        fn = lambda side: _covariance(kernels, left, right, left_side, side)
        block = jax.vmap(fn)(right_sides)  # (m, q, r)
        return jnp.swapaxes(block, 0, 1).reshape(block.shape[1], right.size)

    out = _map_rows(row, _sides(kernels, left), right.points.shape[0])
    return out.reshape(left.size, right.size)


def _block_product(kernels: Kernels, left: Block, right: Block, vector):
    right_sides = _sides(kernels, right)
    vectors = vector.reshape(right.points.shape[0], right.at_each)

    def row(left_side):
        fn = lambda side, v: _covariance(kernels, left, right, left_side, side) @ v
        return jnp.sum(jax.vmap(fn)(right_sides, vectors), axis=0)

    out = _map_rows(row, _sides(kernels, left), right.points.shape[0])
    return out.reshape(left.size)


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


def covariance_product(
    kernels: Kernels,
    left: Sequence[Block],
    right: Sequence[Block],
    vector: Float[Array, " r"],
) -> Float[Array, " l"]:
    # `covariance(...) @ vector`, without ever having the matrix, in reverse mode
    # neither.
    offsets = [sum(b.size for b in right[:j]) for j in range(len(right))]
    out = []
    for a in left:
        parts = [
            _block_product(kernels, a, b, vector[start : start + b.size])
            for b, start in zip(right, offsets)
        ]
        out.append(sum(parts[1:], parts[0]))
    return jnp.concatenate(out)


def variances(kernels: Kernels, blocks: Sequence[Block]) -> Float[Array, " m"]:
    # The diagonal of `covariance(kernels, blocks, blocks)`.
    out = []
    for block in blocks:
        fn = lambda side, block=block: jnp.diagonal(
            _covariance(kernels, block, block, side, side)
        )
        out.append(jax.vmap(fn)(_sides(kernels, block)).reshape(block.size))
    return jnp.concatenate(out)
