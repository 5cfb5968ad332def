"""Mixed derivatives of a kernel at pairs of points, by structure of the kernel.

Two functions, each with a rule per kind of kernel. `one_sided` is what can be computed
at each point on its own; `pairs` is what is left for each pair of points, where every
number of it has become an array with one element for each pair. A kernel without a rule
is traced and goes through the arithmetic of `_series.py`; or through nested automatic
differentiation, if it has operations which that does not know.
"""

import functools as ft
import itertools as it
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._jets import derivative, derivatives, Index
from .._kernels import (
    AbstractFeatureKernel,
    AbstractKernel,
    AbstractRadialKernel,
    Constant,
    Product,
    Scaled,
    Stretched,
    Subspace,
    Sum,
)
from .._parameters import value_of
from ._propagate import propagate
from ._series import closure, each, Scope, Series, Unsupported


# {(a, b): derivative a in the first argument and b in the second}
Table = dict[tuple[Index, Index], Any]


@ft.singledispatch
def one_sided(kernel: AbstractKernel, indices: tuple[Index, ...], x: Array) -> Any:
    return x


@ft.singledispatch
def pairs(
    kernel: AbstractKernel,
    left_indices: tuple[Index, ...],
    right_indices: tuple[Index, ...],
    left: Any,
    right: Any,
) -> Table:
    scope = _scope(left_indices, right_indices)
    x, y = _coordinates(scope, left, 0), _coordinates(scope, right, 1)
    try:
        k = propagate(kernel, (x, y), (_struct(left), _struct(right)))
        return _table(k, left_indices, right_indices)
    except Unsupported:
        return _automatic(kernel, derivative, left_indices, right_indices, left, right)


def _automatic(
    fn: Callable, differentiate: Callable, left_indices, right_indices, left, right
) -> Table:
    # Nested automatic differentiation of `fn` in both arguments, which are arrays
    # where `left` and `right` have arrays of numbers.
    def at_one(x, y):
        out = {}
        for a, b in it.product(left_indices, right_indices):
            inner = lambda x, b=b: differentiate(lambda y: fn(x, y), b)(y)
            out[a, b] = differentiate(inner, a)(x)
        return out

    join = lambda x: jnp.stack(list(x.flat), -1)
    shaped = lambda x, like: jtu.tree_map(lambda a, b: a.reshape(b.shape), x, like)
    ndim = next(iter(jtu.tree_leaves(left)[0].flat)).ndim
    at_pairs = each(lambda x, y: at_one(shaped(x, left), shaped(y, right)), ndim)
    return at_pairs(jtu.tree_map(join, left), jtu.tree_map(join, right))


def _struct(numbers: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(numbers.shape, jnp.result_type(*numbers.flat))


# More operations on numbers than that would take too long to compile.
_BUDGET = 4000


def _scope(left_indices, right_indices) -> Scope:
    return Scope(left_indices, right_indices, _BUDGET)


def _unit(dim: int, axis: int) -> Index:
    return tuple(int(d == axis) for d in range(dim))


def _coordinates(scope: Scope, x: np.ndarray, side: int) -> np.ndarray:
    # A point, as numbers that know that they are its coordinates.
    dim = len(x)
    out = np.empty(dim, object)
    for axis in range(dim):
        key = list(scope.zero)
        key[side] = _unit(dim, axis)
        terms = {scope.zero: x[axis], tuple(key): 1.0}
        out[axis] = Series(scope, {k: v for k, v in terms.items() if k in scope.keys})
    return out


def _table(k: Any, left_indices, right_indices) -> Table:
    value = k.value if isinstance(k, Series) else k
    terms = k.terms if isinstance(k, Series) else {}
    get = lambda key: value if not any(map(any, key)) else terms.get(key, 0.0)
    keys = it.product(left_indices, right_indices)
    return {key: jnp.asarray(get(key), jnp.result_type(value)) for key in keys}


def spread(number: Array, shape: tuple[int, ...]) -> Array:
    # For each point or pair, by a product with ones. So reverse mode adds up over pairs
    # once, and not at each use; and XLA on CPUs hands reductions other than products to
    # a library that does one operation at a time, which keeps it from making one loop.
    if len(shape) < 2:
        return jnp.broadcast_to(number, shape)
    rows, columns = (jnp.ones(n, number.dtype) for n in shape)
    return jax.lax.dot(jax.lax.dot(rows[:, None], number[None, None]), columns[None])


#
# Radial kernels: k = phi(s), s = sum_d (D_d / l_d)^2, D = x - y.
#
# Each dimension contributes to s a multiple of D_d^2, for which
#   (d/dD)^n f(D^2 / l^2)
#     = sum_j n! / (j! (n - 2j)!) (2 D / l^2)^(n - 2j) (1 / l^2)^j f^(n - j).
#


def _dimension_terms(n: int, slope, curvature) -> list[tuple[int, Any]]:
    # (order of the derivative of phi, factor); `slope` is 2 D / l^2, `curvature` 1 /
    # l^2.
    terms = []
    for j in range(n // 2 + 1):
        count = math.factorial(n) // (math.factorial(j) * math.factorial(n - 2 * j))
        terms.append((n - j, count * _power(slope, n - 2 * j) * _power(curvature, j)))
    return terms


def _power(x, n: int):
    # By multiplication, so that derivatives at zero are exact.
    return math.prod([x] * n)


@pairs.register
def _(kernel: AbstractRadialKernel, left_indices, right_indices, left, right):
    dim = len(left_indices[0])
    lengthscale = jnp.broadcast_to(value_of(kernel.lengthscale), (dim,))
    # From differences: |x|^2 + |y|^2 - 2 x.y would lose the digits that small nuggets
    # need.
    difference = [left[d] - right[d] for d in range(dim)]
    # Not 1 / l^2, whose derivative is nan if l^2 overflows.
    curvatures = [spread((1 / l) ** 2, difference[0].shape) for l in lengthscale]
    slopes = [2 * c * d for c, d in zip(curvatures, difference)]
    squares = [0.5 * m * d for m, d in zip(slopes, difference)]
    s = sum(squares[1:], squares[0])
    order = max(map(sum, left_indices)) + max(map(sum, right_indices))
    profile = each(lambda s: kernel.profile(s, order), s.ndim)(s)
    known: dict[Index, Any] = {}
    out = {}
    for a in left_indices:
        for b in right_indices:
            index = tuple(i + j for i, j in zip(a, b))
            if index not in known:
                known[index] = _radial(index, slopes, curvatures, profile)
            sign = -1 if sum(b) % 2 else 1
            out[a, b] = sign * known[index]
    return out


def _radial(index: Index, slopes, curvatures, profile):
    per_dimension = [
        _dimension_terms(n, slopes[d], curvatures[d])
        for d, n in enumerate(index)
        if n > 0
    ]
    by_order: dict[int, Any] = {}
    for terms in it.product(*per_dimension):
        order = sum(m for m, _ in terms)
        factor = math.prod(f for _, f in terms)
        by_order[order] = by_order.get(order, 0) + factor
    return sum(profile[order] * factor for order, factor in by_order.items())


#
# Feature kernels: k = pair(f(x), f(y)).
#
# The features' derivatives are computed once for each point.
#


@one_sided.register
def _(kernel: AbstractFeatureKernel, indices, x):
    return derivatives(kernel.features, closure(indices), x)


@pairs.register
def _(kernel: AbstractFeatureKernel, left_indices, right_indices, left, right):
    zero = (0,) * len(left_indices[0])
    scope = _scope(left_indices, right_indices)
    f, g = _features(scope, kernel, left, 0), _features(scope, kernel, right, 1)
    leaves_f, treedef = jtu.tree_flatten(left[zero])
    leaves_g = jtu.tree_leaves(right[zero])

    def fn(*leaves):
        n = len(leaves_f)
        f, g = jtu.tree_unflatten(treedef, leaves[:n]), leaves[n:]
        return kernel.pair(f, jtu.tree_unflatten(treedef, g))

    try:
        k = propagate(fn, (*f, *g), [_struct(leaf) for leaf in leaves_f + leaves_g])
        return _table(k, left_indices, right_indices)
    except Unsupported:
        value = lambda left, right: kernel.pair(left[zero], right[zero])
        return _automatic(value, _total, left_indices, right_indices, left, right)


def _features(scope: Scope, kernel: AbstractFeatureKernel, side: dict, which: int):
    # The features of one point, as numbers that know their derivatives.
    derivatives = {index: jtu.tree_leaves(leaves) for index, leaves in side.items()}
    values = derivatives[scope.zero[which]]
    point = jax.ShapeDtypeStruct((len(scope.zero[which]),), _struct(values[0]).dtype)
    jaxpr = jax.make_jaxpr(kernel.features)(point).jaxpr
    out = []
    for position, (value, var) in enumerate(zip(values, jaxpr.outvars)):
        if var is jaxpr.invars[0]:  # The point itself is one: most derivatives vanish.
            out.append(_coordinates(scope, value, which))
            continue
        if not jnp.issubdtype(_struct(value).dtype, jnp.inexact):
            out.append(value)  # It has no derivatives.
            continue
        numbers = np.empty(value.shape, object)
        for i in np.ndindex(value.shape):
            terms = {}
            for index, leaves in derivatives.items():
                key = list(scope.zero)
                key[which] = index
                if tuple(key) in scope.keys:
                    terms[tuple(key)] = leaves[position][i]
            numbers[i] = Series(scope, terms)
        out.append(numbers)
    return out


def _total(fn, index: Index):
    # A function of features and of their derivatives is differentiated along the
    # points' dimension i by moving each derivative f^(a) in the direction f^(a + e_i).
    for axis, order in enumerate(index):
        for _ in range(order):
            fn = _total_along(fn, axis)
    return fn


def _total_along(fn, axis: int):
    def differentiated(features):
        tangents = {}
        for index, value in features.items():
            above = tuple(n + (d == axis) for d, n in enumerate(index))
            zero = jtu.tree_map(jnp.zeros_like, value)
            tangents[index] = features.get(above, zero)
        return jax.jvp(fn, (features,), (tangents,))[1]

    return differentiated


#
# Kernels made of kernels
#


@one_sided.register
def _(kernel: Sum, indices, x):
    return tuple(one_sided(k, indices, x) for k in kernel.kernels)


@pairs.register
def _(kernel: Sum, left_indices, right_indices, left, right):
    tables = [
        pairs(k, left_indices, right_indices, a, b)
        for k, a, b in zip(kernel.kernels, left, right)
    ]
    return {key: sum(t[key] for t in tables) for key in tables[0]}


@one_sided.register
def _(kernel: Product, indices, x):
    return tuple(one_sided(k, closure(indices), x) for k in kernel.kernels)


@pairs.register
def _(kernel: Product, left_indices, right_indices, left, right):
    scope = Scope(left_indices, right_indices)
    lefts, rights = closure(left_indices), closure(right_indices)
    factors = [
        Series(scope, pairs(k, lefts, rights, a, b))
        for k, a, b in zip(kernel.kernels, left, right)
    ]
    return _table(ft.reduce(operator.mul, factors), left_indices, right_indices)


@one_sided.register
def _(kernel: Scaled, indices, x):
    return one_sided(kernel.kernel, indices, x)


@pairs.register
def _(kernel: Scaled, left_indices, right_indices, left, right):
    table = pairs(kernel.kernel, left_indices, right_indices, left, right)
    shape = next(iter(table.values())).shape
    variance = spread(value_of(kernel.variance), shape)
    return {key: variance * entry for key, entry in table.items()}


@pairs.register
def _(kernel: Constant, left_indices, right_indices, left, right):
    value = value_of(kernel.value)
    keys = it.product(left_indices, right_indices)
    return {(a, b): jnp.zeros_like(value) if any(a + b) else value for a, b in keys}


def _inside(dims: tuple[int, ...], indices: tuple[Index, ...]):
    # The derivatives that act only in the subspace, as indices there.
    inner = lambda index: tuple(index[d] for d in dims)
    return {index: inner(index) for index in indices if sum(inner(index)) == sum(index)}


def _distinct(values: Iterable[Index], fallback: int) -> tuple[Index, ...]:
    return tuple(dict.fromkeys(values)) or ((0,) * fallback,)


@one_sided.register
def _(kernel: Subspace, indices, x):
    dims = kernel.dims
    inner = _distinct(_inside(dims, indices).values(), len(dims))
    return one_sided(kernel.kernel, inner, x[jnp.array(dims)])


@pairs.register
def _(kernel: Subspace, left_indices, right_indices, left, right):
    dims = kernel.dims
    lefts, rights = _inside(dims, left_indices), _inside(dims, right_indices)
    table = pairs(
        kernel.kernel,
        _distinct(lefts.values(), len(dims)),
        _distinct(rights.values(), len(dims)),
        left,
        right,
    )
    zero = jnp.zeros_like(next(iter(table.values())))
    return {
        (a, b): table[lefts[a], rights[b]] if a in lefts and b in rights else zero
        for a, b in it.product(left_indices, right_indices)
    }


@one_sided.register
def _(kernel: Stretched, indices, x):
    return one_sided(kernel.kernel, indices, x / value_of(kernel.factor))


@pairs.register
def _(kernel: Stretched, left_indices, right_indices, left, right):
    table = pairs(kernel.kernel, left_indices, right_indices, left, right)
    dim = len(left_indices[0])
    factor = jnp.broadcast_to(value_of(kernel.factor), (dim,))
    # One factor for each derivative, in either argument, along its dimension.
    powers = lambda a, b: [_power(factor[d], a[d] + b[d]) for d in range(dim)]
    return {(a, b): e / math.prod(powers(a, b)) for (a, b), e in table.items()}
