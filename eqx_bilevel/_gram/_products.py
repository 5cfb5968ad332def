"""Covariances of functionals times a vector, without ever having the matrix.

Of functionals with themselves, each pair of points is computed once, and contributes to
both of its points.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._functionals import Block, Kernels
from ._sides import by_rows, column, Side, side_of, tables


def covariance_product(
    kernels: Kernels,
    left: Sequence[Block],
    right: Sequence[Block],
    vector: Float[Array, " r"],
) -> Float[Array, " l"]:
    # `covariance(...) @ vector`, without ever having the matrix, in reverse mode
    # neither.
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


def _at_points(block: Block, vector: Float[Array, " r"]) -> Float[Array, "n p"]:
    # Weights of the entries of the jets, in place of functionals.
    weights = vector.reshape(-1, block.at_each)
    if block.sum_over > 1:
        weights = jnp.repeat(weights, block.sum_over, axis=0)
    if block.coefficients is None:
        return weights
    return jnp.einsum("nq,nqp->np", weights, block.coefficients)


def _sums(block: Block, product: Float[Array, "n q"]) -> Float[Array, " l"]:
    if block.sum_over > 1:
        product = product.reshape(-1, block.sum_over, block.at_each).sum(axis=1)
    return product.reshape(block.size)


def _products(
    kernels: Kernels, a: Block, b: Block, left: Side, right: Side, least: int = 1
) -> tuple[Float[Array, "n q"], Float[Array, "m r"]]:
    # Of the functionals on each side with what has a weight on the other one.
    def fn(kernels, shape, here, others):
        to_left, to_right = _of_pairs(kernels, a, b, shape, here, others)
        # By products: XLA on CPUs does other sums one operation at a time.
        ones = [jnp.ones(size, a.points.dtype) for size in shape]
        return [x @ ones[1] for x in to_left], [ones[0] @ x for x in to_right]

    num, dtype = 0 if left.weights is None else b.at_each, a.points.dtype
    struct = [jax.ShapeDtypeStruct((right.size,), dtype)] * num
    to_left, to_right = by_rows(fn, kernels, left, right, struct, least)
    join = lambda x, n: jnp.stack(x, axis=1) if x else jnp.zeros((n, 0), dtype)
    return join(to_left, left.size), join(to_right, right.size)


def _of_pairs(kernels: Kernels, left: Block, right: Block, shape, here, others):
    # For each pair of points, what its covariances contribute to both.
    sides, coefficients, weights = here
    other_sides, other_coefficients, other_weights = others
    zero = jnp.zeros(shape, left.points.dtype)
    to_left, to_right = [zero] * left.at_each, [zero] * right.at_each
    across = [zero] * len(right.jets)
    for i, row in tables(kernels, left, right, sides, other_sides):
        combined = sum(other_weights[j] * entry for j, entry in row.items())
        for q, c in column(coefficients, i):
            to_left[q] = to_left[q] + c * combined
        if weights is not None:
            for j, entry in row.items():
                across[j] = across[j] + weights[i] * entry
    if weights is None:
        return to_left, []
    for j, combined in enumerate(across):
        for r, c in column(other_coefficients, j):
            to_right[r] = to_right[r] + c * combined
    return to_left, to_right


#
# Of functionals with themselves
#

# Points in a tile, at most; there are at least so many tiles. Points of the same tile
# meet twice.
_TILE = 512
_TILES = 4
# With fewer points the gain is too small for a larger program.
_MANY = 500


def symmetric_product(
    kernels: Kernels, blocks: Sequence[Block], weights: Sequence[Float[Array, "_ _"]]
) -> list[Float[Array, "_ _"]]:
    # `covariance(kernels, blocks, blocks)` times weights of the entries of the jets at
    # each block's first `m` points. At the others there are none: these are only read.
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
    rest = side.size - num
    if num < _MANY:
        read = dataclasses.replace(side, weights=None)
        return _products(kernels, block, block, read, side[:num])[0]
    with_weight = max(_TILES, -(-num // _TILE))
    size = -(-num // with_weight)
    only_read = -(-rest // size)
    parts = side[:num].padded(with_weight * size), side[num:].padded(only_read * size)
    tiles = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    tiles = tiles.reshape(with_weight + only_read, size)

    @jax.checkpoint
    def products(i, j):
        share = jnp.where(i == j, 0.5, 1.0).astype(block.points.dtype)
        left, right = tiles[i].weighted(share), tiles[j].weighted(share)
        # In several chunks, since with one the compiler would read each number of the
        # points on the right out of `tiles` for each pair.
        return _products(kernels, block, block, left, right, 2)

    def step(total, pair):
        i, j = pair
        to_left, to_right = products(i, j)
        return total.at[i].add(to_left).at[j].add(to_right), None

    above = np.triu_indices(with_weight)
    below = np.indices((only_read, with_weight)).reshape(2, -1) + [[with_weight], [0]]
    pairs = jnp.concatenate([jnp.array(above), jnp.array(below)], axis=1)
    total = jnp.zeros((tiles.size, size, block.at_each), block.points.dtype)
    total = jax.lax.scan(step, total, tuple(pairs))[0].reshape(-1, block.at_each)
    return jnp.concatenate([total[:num], total[with_weight * size :][:rest]])
