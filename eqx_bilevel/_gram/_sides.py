"""What is computed for pairs of points: elementwise, with one array for each number."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PyTree

from .._mesh import AXIS, num_shares, on_each
from ._functionals import Block, by_unknown, Kernels, one_sides
from ._pairs import pairs


# Pairs of points that are treated at once: enough to keep the cores busy, few enough to
# stay in their caches.
_PAIRS_AT_ONCE = 2**16


class Side(eqx.Module):
    # What can be computed point by point: once, outside all loops over pairs. And
    # weights of the functionals there, or none.
    given: list[Float[Array, "*batch n _"]]  # each leaf of a tree, flattened
    weights: Float[Array, "*batch n q"] | None
    treedef: Any = eqx.field(static=True)
    shapes: list[tuple[int, ...]] = eqx.field(static=True)

    @property
    def size(self) -> int:
        return self.given[0].shape[0]

    def __getitem__(self, index) -> "Side":
        return jax.tree.map(lambda x: x[index], self)

    def reshape(self, *shape: int) -> "Side":
        return jax.tree.map(lambda x: x.reshape(*shape, x.shape[-1]), self)

    def padded(self, size: int) -> "Side":
        # With copies of the last point, without weight.
        rows = ((0, size - self.size), (0, 0))
        given = [jnp.pad(x, rows, mode="edge") for x in self.given]
        weights = None if self.weights is None else jnp.pad(self.weights, rows)
        return Side(given, weights, self.treedef, self.shapes)

    def times(self, factor: Float[Array, ""]) -> "Side":
        assert self.weights is not None
        return Side(self.given, factor * self.weights, self.treedef, self.shapes)

    def numbers(self, along: Callable[[Array], Array] = lambda x: x) -> Any:
        # As NumPy arrays of JAX arrays: one for each number, all of the same shape, so
        # that everything is done elementwise. Anything else would keep the compiler
        # from making one loop of it, above all in reverse mode.
        leaves = []
        for given, shape in zip(self.given, self.shapes):
            leaf = np.empty(given.shape[1], object)
            for i, number in enumerate(given.T):
                leaf[i] = along(number)
            leaves.append(leaf.reshape(shape))
        return jtu.tree_unflatten(self.treedef, leaves)


def side_of(kernels: Kernels, block: Block, weights: Array | None = None) -> Side:
    sides = block.sides
    if sides is None:
        sides = one_sides(kernels, block.jets, block.points)
    n = block.points.shape[0]
    leaves, treedef = jtu.tree_flatten((sides, block.coefficients))
    shapes = [leaf.shape[1:] for leaf in leaves]
    flat = [leaf.reshape(n, math.prod(s)) for leaf, s in zip(leaves, shapes)]
    return Side(flat, weights, treedef, shapes)


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


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def weighted(
    matrices: Sequence[Float[Array, "n m"]], weights: Float[Array, "q _"], axis: int
) -> Float[Array, " _"]:
    # Sums along an axis. Again, reverse mode in the matrices is elementwise. (With the
    # factors in the derivative the other way round, the loops that XLA makes of it take
    # a quarter more time.)
    each = [_along(x, w, axis) for x, w in zip(matrices, weights)]
    return ft.reduce(jnp.add, each)


def _along(x, weights, axis: int):
    return x @ weights if axis == 1 else weights @ x


@ft.partial(weighted.defjvp, symbolic_zeros=True)
def _(axis: int, primals, tangents):
    (matrices, weights), (changes, dweights) = primals, tangents
    out = weighted(matrices, weights, axis)
    n = matrices[0].shape[1 - axis]
    ones = jnp.ones(weights.shape[1], weights.dtype)
    dx = sum(
        _spread(w, n, 1 - axis) * dx
        for dx, w in zip(changes, weights)
        if not isinstance(dx, SymbolicZero)
    )
    change = jnp.zeros_like(out)
    if isinstance(dx, Array):
        change = _along(dx, ones, axis)
    if not isinstance(dweights, SymbolicZero):
        change = change + weighted(matrices, dweights, axis)
    return out, change


def _tables(kernels: Kernels, left: Block, right: Block, left_sides, right_sides):
    # Covariances of entries of the jets at pairs of points: (i, {j: covariance}).
    others = by_unknown(right.jets)
    for name, indices in by_unknown(left.jets).items():
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


def _column(coefficients, i: int) -> list[tuple[int, Any]]:
    # Which functionals have entry `i` of the jet, and with which coefficients.
    return [(i, 1)] if coefficients is None else list(enumerate(coefficients[:, i]))


def covariances(kernels: Kernels, left: Block, right: Block, shape, *numbers):
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


def at_pairs(kernels: Kernels, left: Block, right: Block, rows: Side, columns: Side):
    # `covariances` of all points of these sides.
    shape = n, m = rows.size, columns.size
    here = rows.numbers(lambda x: _spread(x, m, 1))
    others = columns.numbers(lambda y: _spread(y, n, 0))
    return covariances(kernels, left, right, shape, here, others)


def by_rows(
    fn: Callable, kernels: Kernels, left: Side, right: Side, struct: PyTree
) -> tuple[PyTree[Array], PyTree[Array]]:
    # `by_chunks`, shared between the devices of a mesh.
    n, shares = left.size, num_shares()
    if shares == 1:
        return by_chunks(fn, kernels, left, right, struct)
    size = -(-n // shares)

    def of_share(which, kernels, left: Side, right: Side):
        mine = lambda x: jax.lax.dynamic_slice_in_dim(x, size * which, size)
        whole = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
        left = jax.tree.map(mine, left)
        for_each, totals = by_chunks(fn, kernels, left, right, struct)
        return jax.tree.map(whole, for_each), jax.lax.psum(totals, AXIS)

    for_each, totals = on_each(of_share, kernels, left.padded(size * shares), right)
    return jax.tree.map(lambda x: x[:n], for_each), totals


def by_chunks(
    fn: Callable,
    kernels: Kernels,
    left: Side,
    right: Side,
    struct: PyTree[jax.ShapeDtypeStruct],
    least: int = 1,
) -> tuple[PyTree[Array], PyTree[Array]]:
    # `fn(kernels, rows, columns)` for all pairs, in chunks of points on the left, of
    # which nothing is kept for reverse mode: what it returns for each point on the
    # left, and what is to be added up over them, of which this is the `struct`. There
    # are at least so many chunks, if there are points.
    n, m = left.size, right.size
    of_rows = lambda rows: fn(kernels, rows, right)
    most = max(1, min(_PAIRS_AT_ONCE // max(1, m), n // least))
    if n <= most:
        return of_rows(left)
    # Without a remainder, if possible.
    divisors = (s for s in range(most, most // 2, -1) if n % s == 0)
    size = next(divisors, -(-n // -(-n // most)))
    chunks = -(-n // size)

    def step(totals, rows: Side):
        for_each, more = jax.checkpoint(of_rows)(rows)
        return jax.tree.map(jnp.add, totals, more), for_each

    rows = left.padded(chunks * size).reshape(chunks, size)
    totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
    totals, for_each = jax.lax.scan(step, totals, rows)
    join = lambda x: x.reshape(chunks * size, *x.shape[2:])[:n]
    return jax.tree.map(join, for_each), totals
