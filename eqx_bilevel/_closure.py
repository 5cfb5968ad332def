import functools as ft
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np


class _ByIdentity:
    # Makes a dictionary of globals usable as static data.
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


class _Function(eqx.Module):
    # A Python function, taken apart: what it closes over is data, the rest is static
    # and compares by value.
    closure: tuple
    defaults: tuple | None
    kwdefaults: dict | None
    code: types.CodeType = eqx.field(static=True)
    globals: _ByIdentity = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        function = types.FunctionType(
            self.code,
            self.globals.value,
            self.name,
            self.defaults,
            tuple(types.CellType(x) for x in self.closure),
        )
        function.__kwdefaults__ = self.kwdefaults
        return function(*args, **kwargs)


# Of these a function may rely on the very object that it closes over, unless there are
# arrays inside: then it is data.
_MUTABLE = (list, dict, set, bytearray)


def _is_opaque(x) -> bool:
    try:
        leaves = jtu.tree_leaves(x)
    except (TypeError, ValueError):  # A dictionary with keys that cannot be sorted.
        return True
    has_arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    return isinstance(x, _MUTABLE) and not has_arrays


def _as_jax(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _is_static(x) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def function_as_pytree(fn: Any) -> Any:
    # Two things go wrong with plain functions. A new lambda is a new jit-cache key,
    # even if it has the same code; and arrays that it closes over are invisible to
    # whatever differentiates the function's owner as a pytree. Both are cured by making
    # the closure a pytree. Anything that is not a plain function is returned unchanged.
    if isinstance(fn, ft.partial):
        return eqx.Partial(_convert(fn.func, ()), *fn.args, **fn.keywords)
    return _convert(fn, ())


def _convert(fn, inside: tuple):
    if not isinstance(fn, types.FunctionType) or any(fn is f for f in inside):
        return fn
    inside = (*inside, fn)
    try:
        contents = tuple(cell.cell_contents for cell in fn.__closure__ or ())
    except ValueError:  # A variable that is not assigned yet.
        return fn
    if any(c is f for c in contents for f in inside):  # Recursive functions.
        return fn
    if any(map(_is_opaque, contents)):
        return fn
    convert = lambda x: _as_jax(_convert(x, inside))
    is_leaf = lambda x: isinstance(x, types.FunctionType)
    closure, defaults, kwdefaults = jtu.tree_map(
        convert, (contents, fn.__defaults__, fn.__kwdefaults__), is_leaf=is_leaf
    )
    static = eqx.filter((closure, defaults, kwdefaults), eqx.is_array, inverse=True)
    if not all(_is_static(x) for x in jax.tree.leaves(static)):
        return fn
    globals_ = _ByIdentity(fn.__globals__)
    return _Function(closure, defaults, kwdefaults, fn.__code__, globals_, fn.__name__)
