"""Covariances of functionals times a vector, without ever having the matrix, in reverse
mode neither.

Of functionals with themselves, each pair of points is computed once, and contributes to
both of its points.
"""

import dataclasses
import functools as ft
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._mesh import AXIS, num_shares, on_each
from ._functionals import Block, Kernels
from ._sides import at_pairs, by_chunks, by_rows, Side, side_of, weighted


def covariance_product(
    kernels: Kernels,
    left: Sequence[Block],
    right: Sequence[Block],
    vector: Float[Array, " r"],
) -> Float[Array, " l"]:
    # `covariance(...) @ vector`.
    ends = np.cumsum([block.size for block in right])
    parts = jnp.split(vector, ends[:-1])
    weights = [_at_points(block, part) for block, part in zip(right, parts)]
    if left is right:
        products = symmetric_product(kernels, left, weights)
    else:
        sides = [side_of(kernels, b, w) for b, w in zip(right, weights)]
        products = []
        for a in left:
            at_a = side_of(kernels, a)
            each = [_products(kernels, a, b, at_a, s)[0] for b, s in zip(right, sides)]
            products.append(sum(each[1:], each[0]))
    return jnp.concatenate([_sums(*given) for given in zip(left, products)])


def _at_points(block: Block, vector: Float[Array, " r"]) -> Float[Array, "n q"]:
    return jnp.repeat(vector.reshape(-1, block.at_each), block.sum_over, axis=0)


def _sums(block: Block, product: Float[Array, "n q"]) -> Float[Array, " l"]:
    if block.sum_over > 1:
        product = product.reshape(-1, block.sum_over, block.at_each).sum(axis=1)
    return product.reshape(block.size)


def _products(
    kernels: Kernels, a: Block, b: Block, left: Side, right: Side, over=by_rows
) -> tuple[Float[Array, "n q"], Float[Array, "m r"]]:
    # Of the functionals on each side with what has a weight on the other one.
    def fn(kernels, rows: Side, columns: Side):
        matrices = at_pairs(kernels, a, b, rows, columns)
        assert columns.weights is not None
        to_left = [weighted(row, columns.weights.T, 1) for row in matrices]
        if rows.weights is None:
            return to_left, []
        return to_left, [weighted(c, rows.weights.T, 0) for c in zip(*matrices)]

    num, dtype = 0 if left.weights is None else b.at_each, a.points.dtype
    struct = [jax.ShapeDtypeStruct((right.size,), dtype)] * num
    to_left, to_right = over(fn, kernels, left, right, struct)
    join = lambda x, n: jnp.stack(x, axis=1) if x else jnp.zeros((n, 0), dtype)
    return join(to_left, left.size), join(to_right, right.size)


#
# Of functionals with themselves
#

# Points in a tile, at most; there are at least so many tiles.
_TILE = 512
_TILES = 4
# With fewer points the gain is too small for a larger program.
_MANY = 500


def symmetric_product(
    kernels: Kernels, blocks: Sequence[Block], weights: Sequence[Float[Array, "_ _"]]
) -> list[Float[Array, "_ _"]]:
    # `covariance(kernels, blocks, blocks)` times weights of functionals at the first
    # points of each block. At the others there are none: these are only read.
    num = [len(w) for w in weights]
    sides = []
    for block, w in zip(blocks, weights):
        w = jnp.pad(w, ((0, len(block.points) - len(w)), (0, 0)))
        sides.append(side_of(kernels, block, w))
    out = [_within(kernels, *given) for given in zip(blocks, sides, num)]
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks[:i]):
            left, right = sides[i], sides[j]
            to_a, to_b = _products(kernels, a, b, left, right[: num[j]])
            if num[j] < right.size:
                more, _ = _products(kernels, b, a, right[num[j] :], left[: num[i]])
                to_b = jnp.concatenate([to_b, more])
            out[i], out[j] = out[i] + to_a, out[j] + to_b
    return out


def _within(
    kernels: Kernels, block: Block, side: Side, num: int
) -> Float[Array, "n q"]:
    if num < _MANY:
        read = dataclasses.replace(side, weights=None)
        return _products(kernels, block, block, read, side[:num])[0]
    first = max(_TILES, -(-num // _TILE))
    size = -(-num // first)
    rest = -(-(side.size - num) // size)
    parts = side[:num].padded(first * size), side[num:].padded(rest * size)
    tiles = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    tiles = tiles.reshape(first + rest, size)
    # Each tile with those after it, and what is only read with all that have weights.
    among, read = np.triu_indices(first), np.indices((rest, first)).reshape(2, -1)
    lefts = np.concatenate([among[0], read[0] + first])
    rights = np.concatenate([among[1], read[1]])
    total = _over_tiles(kernels, block, tiles, lefts, rights)
    total = total.reshape(-1, block.at_each)
    return jnp.concatenate([total[:num], total[first * size :][: side.size - num]])


def _over_tiles(
    kernels: Kernels, block: Block, tiles: Side, lefts: np.ndarray, rights: np.ndarray
) -> Float[Array, "t n q"]:
    # The products of pairs of tiles, added up for each tile. A mesh of devices shares
    # the pairs, so that devices wait for each other once. Those that are added, for all
    # shares to be of the same size, do not count.
    dtype, shares = block.points.dtype, num_shares()
    add = -len(lefts) % shares
    # Points of the same tile meet twice.
    counts = np.pad(np.where(lefts == rights, 0.5, 1.0), (0, add))
    pairs = (np.pad(lefts, (0, add)), np.pad(rights, (0, add)), counts.astype(dtype))
    pairs = jax.tree.map(jnp.asarray, pairs)
    # In several chunks, since with one the compiler would read each number of the
    # points on the right out of `tiles` for each pair.
    over = ft.partial(by_chunks, least=2)

    def of_share(which, kernels, tiles: Side, pairs):
        @jax.checkpoint
        def products(i, j, count):
            left, right = tiles[i].times(count), tiles[j].times(count)
            return _products(kernels, block, block, left, right, over)

        def step(total, pair):
            i, j, count = pair
            to_left, to_right = products(i, j, count)
            return total.at[i].add(to_left).at[j].add(to_right), None

        size = len(counts) // shares
        mine = lambda x: jax.lax.dynamic_slice_in_dim(x, size * which, size)
        total = jnp.zeros((*tiles.given[0].shape[:2], block.at_each), dtype)
        return jax.lax.scan(step, total, jax.tree.map(mine, pairs))[0]

    if shares == 1:
        return of_share(0, kernels, tiles, pairs)
    whole = lambda *args: jax.lax.psum(of_share(*args), AXIS)
    return on_each(whole, kernels, tiles, pairs)
