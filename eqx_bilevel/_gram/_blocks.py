"""Linear functionals of Gaussian processes, and their covariances by blocks of rows."""

import functools as ft
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._jets import Index
from .._kernels import AbstractKernel
from .._mesh import AXIS, num_shares
from ._pairs import one_sided, pairs


Kernels = Mapping[str, AbstractKernel]  # by unknown; unknowns are independent
Jets = tuple[tuple[str, Index], ...]  # derivatives of unknowns

# Pairs of points that are treated at once: enough to keep the cores busy, few enough to
# stay in their caches.
_PAIRS_AT_ONCE = 2**16


class Block(eqx.Module):
    # `q` functionals at each of `n` points, each a combination of the same `p` entries
    # of the unknowns' jets there. Functionals are counted point by point.
    # Without coefficients they are those entries themselves.
    # Of as many points in a row as `sum_over` says, they are added up.
    points: Float[Array, "n d"]
    coefficients: Float[Array, "n q p"] | None
    jets: Jets = eqx.field(static=True)
    # What `one_sides` gives for these points, and for these jets or more. Default: it
    # is computed wherever it is needed.
    sides: dict[str, Any] | None = None
    sum_over: int = eqx.field(static=True, default=1)

    @property
    def size(self) -> int:
        return self.points.shape[0] // self.sum_over * self.at_each

    @property
    def at_each(self) -> int:
        c = self.coefficients
        return len(self.jets) if c is None else c.shape[1]


def one_by_one(blocks: Sequence[Block]) -> Block:
    # One block of them all, with one functional at each point.
    jets = tuple(dict.fromkeys(jet for block in blocks for jet in block.jets))
    points, coefficients = [], []
    for block in blocks:
        given = block.coefficients
        assert given is not None and block.sum_over == 1
        n, q, _ = given.shape
        full = jnp.zeros((n, q, len(jets)), given.dtype)
        where = jnp.array([jets.index(jet) for jet in block.jets])
        full = full.at[:, :, where].set(given)
        coefficients.append(full.reshape(n * q, 1, len(jets)))
        points.append(jnp.repeat(block.points, q, axis=0))
    return Block(jnp.concatenate(points), jnp.concatenate(coefficients), jets)


def _by_unknown(jets: Jets) -> dict[str, dict[Index, int]]:
    # For each unknown, the indices of its jet and where they stand in the coefficients.
    out: dict[str, dict[Index, int]] = {}
    for position, (name, index) in enumerate(jets):
        out.setdefault(name, {})[index] = position
    return out


def one_sides(
    kernels: Kernels, jets: Jets, points: Float[Array, "n d"]
) -> dict[str, Any]:
    # What the kernels compute of each point on its own.
    sides = {}
    for name, indices in _by_unknown(jets).items():
        kernel, asked = kernels[name], tuple(indices)
        sides[name] = jax.vmap(lambda x: one_sided(kernel, asked, x))(points)
    return sides


class _Side(eqx.Module):
    # What can be computed point by point: once, outside all loops over pairs.
    given: list[Float[Array, "n _"]]  # each leaf of a tree, flattened
    treedef: Any = eqx.field(static=True)
    shapes: list[tuple[int, ...]] = eqx.field(static=True)

    @property
    def size(self) -> int:
        return self.given[0].shape[0]

    def numbers(self, spread: Callable[[Array], Array] = lambda x: x) -> Any:
        # As NumPy arrays of JAX arrays: one for each number, all of the same shape, so
        # that everything is done elementwise. Anything else would keep the compiler
        # from making one loop of it, above all in reverse mode.
        leaves = []
        for given, shape in zip(self.given, self.shapes):
            leaf = np.empty(given.shape[1], object)
            for i, number in enumerate(given.T):
                leaf[i] = spread(number)
            leaves.append(leaf.reshape(shape))
        return jtu.tree_unflatten(self.treedef, leaves)


def _side(kernels: Kernels, block: Block, weights=None) -> _Side:
    sides = block.sides
    if sides is None:
        sides = one_sides(kernels, block.jets, block.points)
    n = block.points.shape[0]
    given = block.coefficients if weights is None else weights
    leaves, treedef = jtu.tree_flatten((sides, given))
    shapes = [leaf.shape[1:] for leaf in leaves]
    flat = [leaf.reshape(n, math.prod(s)) for leaf, s in zip(leaves, shapes)]
    return _Side(flat, treedef, shapes)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _spread(x: Float[Array, " n"], m: int, axis: int) -> Float[Array, "..."]:
    # Along a new axis. Reverse mode has a product with ones: XLA on CPUs hands other
    # sums to a library that does one operation at a time, which keeps it from making
    # one loop of everything.
    shape = (x.shape[0], m) if axis == 1 else (m, x.shape[0])
    return jax.lax.broadcast_in_dim(x, shape, (1 - axis,))


@_spread.defjvp
def _(m: int, axis: int, primals, tangents):
    (x,), (dx,) = primals, tangents
    ones = jnp.ones(m, x.dtype)
    pair = (dx[:, None], ones[None]) if axis == 1 else (ones[:, None], dx[None])
    return _spread(x, m, axis), jax.lax.dot(*pair)


def _tables(kernels: Kernels, left: Block, right: Block, left_sides, right_sides):
    # Covariances of entries of the jets at pairs of points: (i, {j: covariance}).
    others = _by_unknown(right.jets)
    for name, indices in _by_unknown(left.jets).items():
        if name in others:
            table = pairs(
                kernels[name],
                tuple(indices),
                tuple(others[name]),
                left_sides[name],
                right_sides[name],
            )
            for a, i in indices.items():
                yield i, {j: table[a, b] for b, j in others[name].items()}


def _covariances(kernels: Kernels, left: Block, right: Block, shape, *numbers):
    # The `q` times `r` covariances of the functionals, at pairs of points.
    (left_sides, coefficients), (right_sides, other_coefficients) = numbers
    zero = jnp.zeros(shape, left.points.dtype)
    total = [[zero] * right.at_each for _ in range(left.at_each)]
    for i, row in _tables(kernels, left, right, left_sides, right_sides):
        combined = [zero] * right.at_each
        for j, entry in row.items():
            for r, d in _column(other_coefficients, j):
                combined[r] = combined[r] + d * entry
        for q, c in _column(coefficients, i):
            total[q] = [t + c * x for t, x in zip(total[q], combined)]
    return total


def _products(kernels: Kernels, left: Block, right: Block, shape, *numbers):
    # The `q` covariances with a combination of entries of the other point's jet.
    (left_sides, coefficients), (right_sides, weights) = numbers
    total = [jnp.zeros(shape, left.points.dtype)] * left.at_each
    for i, row in _tables(kernels, left, right, left_sides, right_sides):
        combined = sum(weights[j] * entry for j, entry in row.items())
        for q, c in _column(coefficients, i):
            total[q] = total[q] + c * combined
    return total


def _column(coefficients, i: int) -> list[tuple[int, Any]]:
    # Which functionals have entry `i` of the jet, and with which coefficients.
    return [(i, 1)] if coefficients is None else list(enumerate(coefficients[:, i]))


def _map_pairs(fn, kernels: Kernels, left: _Side, right: _Side, reduce=lambda x: x):
    # `reduce(fn(...))` for each point on the left, where `fn(...)` is for all points on
    # the right. A mesh of devices shares those on the left.
    n, shares = left.size, num_shares()
    if shares == 1:
        return _map_chunks(fn, kernels, left, right, reduce)
    size = -(-n // shares)
    padding = size * shares - n
    fill = lambda x: jnp.pad(x, ((0, padding), (0, 0)), mode="edge")
    left = jax.tree.map(fill, left)
    arrays, static = eqx.partition((kernels, left, right), eqx.is_array)

    def on_one_device(arrays):
        kernels, left, right = eqx.combine(arrays, static)
        start = size * jax.lax.axis_index(AXIS)
        mine = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
        whole = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
        out = _map_chunks(fn, kernels, jax.tree.map(mine, left), right, reduce)
        return jax.tree.map(whole, out)

    replicated = jax.sharding.PartitionSpec()
    everywhere = jax.shard_map(
        on_one_device, in_specs=replicated, out_specs=replicated, check_vma=False
    )
    return jax.tree.map(lambda x: x[:n], everywhere(arrays))


def _map_chunks(fn, kernels: Kernels, left: _Side, right: _Side, reduce):
    # In chunks, of which nothing is kept for reverse mode.
    n, m = left.size, right.size

    def of_rows(rows: _Side):
        size = rows.size
        here = rows.numbers(lambda x: _spread(x, m, 1))
        others = right.numbers(lambda y: _spread(y, size, 0))
        return jax.tree.map(reduce, fn(kernels, (size, m), here, others))

    most = max(1, _PAIRS_AT_ONCE // max(1, m))
    if n <= most:
        return of_rows(left)
    # Without a remainder, if possible.
    divisors = (s for s in range(most, most // 2, -1) if n % s == 0)
    size = next(divisors, -(-n // -(-n // most)))
    chunks = -(-n // size)
    # The last chunk is filled up with copies of the last row.
    index = jnp.minimum(jnp.arange(chunks * size), n - 1).reshape(chunks, size)
    chunked = jax.tree.map(lambda x: x[index], left)
    out = jax.lax.map(jax.checkpoint(of_rows), chunked)
    return jax.tree.map(lambda x: x.reshape((chunks * size,) + x.shape[2:])[:n], out)


def _block_matrix(kernels: Kernels, left: Block, right: Block) -> Float[Array, "l r"]:
    fn = lambda kernels, *at: _covariances(kernels, left, right, *at)
    out = _map_pairs(fn, kernels, _side(kernels, left), _side(kernels, right))
    out = jnp.stack([jnp.stack(row, axis=-1) for row in out], axis=1)  # (n, q, m, r)
    if left.sum_over > 1:
        out = out.reshape(-1, left.sum_over, *out.shape[1:]).sum(axis=1)
    if right.sum_over > 1:
        n, q, _, r = out.shape
        out = out.reshape(n, q, -1, right.sum_over, r).sum(axis=3)
    return out.reshape(left.size, right.size)


def _block_product(kernels: Kernels, left: Block, right: Block, vector):
    # With weights for the entries of the jets instead of the functionals.
    weights = vector.reshape(-1, right.at_each)
    if right.sum_over > 1:
        weights = jnp.repeat(weights, right.sum_over, axis=0)
    if right.coefficients is not None:
        weights = jnp.einsum("nq,nqp->np", weights, right.coefficients)
    fn = lambda kernels, *at: _products(kernels, left, right, *at)
    sides = _side(kernels, left), _side(kernels, right, weights)
    out = _map_pairs(
        fn, kernels, *sides, reduce=lambda x: x @ jnp.ones(x.shape[1], x.dtype)
    )
    out = jnp.stack(out, axis=1)
    if left.sum_over > 1:
        out = out.reshape(-1, left.sum_over, left.at_each).sum(axis=1)
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
        if block.sum_over > 1:
            out.append(_variances_of_sums(kernels, block))
            continue
        numbers = _side(kernels, block).numbers()
        shape = block.points.shape[:1]
        table = _covariances(kernels, block, block, shape, numbers, numbers)
        each = [row[q] for q, row in enumerate(table)]
        out.append(jnp.stack(each, axis=1).reshape(block.size))
    return jnp.concatenate(out)


def _variances_of_sums(kernels: Kernels, block: Block) -> Float[Array, " m"]:
    # One small matrix for each sum.
    def of_one(part: Block):
        return jnp.diagonal(_block_matrix(kernels, part, part))

    split = lambda x: x.reshape(-1, block.sum_over, *x.shape[1:])
    return jax.lax.map(of_one, jax.tree.map(split, block)).reshape(block.size)
