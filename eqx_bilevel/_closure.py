import dis
import functools as ft
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import wadler_lindig as wl

from ._pretty import named_doc


class _ByIdentity:
    # Makes a dictionary of globals usable as static data.
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


class Function(eqx.Module):
    # A Python function, taken apart: what it closes over is data, and so are the
    # variables of its module that it reads. The rest is static and compares by value.
    closure: tuple
    read: dict[str, Any]
    defaults: tuple | None
    kwdefaults: dict | None
    code: types.CodeType = eqx.field(static=True)
    globals: _ByIdentity = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return self._together()(*args, **kwargs)

    def _together(self) -> types.FunctionType:
        # The function again, and those inside it as well: JAX hashes what is given to
        # `jax.lax.cond`, for instance.
        is_function = lambda x: isinstance(x, Function)
        together = lambda x: x._together() if is_function(x) else x
        closure, read, defaults, kwdefaults = jtu.tree_map(
            together,
            (self.closure, self.read, self.defaults, self.kwdefaults),
            is_leaf=is_function,
        )
        cells = tuple(types.CellType(x) for x in closure)
        globals_ = {**self.globals.value, **read}
        function = types.FunctionType(self.code, globals_, self.name, defaults, cells)
        function.__kwdefaults__ = kwdefaults
        return function

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        data = dict(zip(self.code.co_freevars, self.closure)) | self.read
        inside = wl.named_objs(data.items(), **kwargs)
        name = f"<function {self.name}>"
        return named_doc(name, inside, **kwargs) if inside else wl.TextDoc(name)


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
    foreign = len(inside) > 0 and fn.__globals__ is not inside[0].__globals__
    if foreign and fn.__closure__ is None:  # A library's: always the same.
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
    read = {} if foreign else _globals_of(fn)
    closure, read, defaults, kwdefaults = jtu.tree_map(
        convert, (contents, read, fn.__defaults__, fn.__kwdefaults__), is_leaf=is_leaf
    )
    static = eqx.filter((closure, defaults, kwdefaults), eqx.is_array, inverse=True)
    if not all(_is_static(x) for x in jax.tree.leaves(static)):
        return fn
    globals_ = _ByIdentity(fn.__globals__)
    return Function(
        closure, read, defaults, kwdefaults, fn.__code__, globals_, fn.__name__
    )


_READS = ("LOAD_GLOBAL", "LOAD_NAME")


def names_read(code: types.CodeType) -> list[str]:
    # Of globals, also by functions defined inside.
    codes, names = [code], set()
    for code in codes:
        # Not `co_names`, which has the names of attributes as well.
        names.update(i.argval for i in dis.get_instructions(code) if i.opname in _READS)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return sorted(names)


def _globals_of(fn: types.FunctionType) -> dict[str, Any]:
    names = names_read(fn.__code__)
    found = {n: fn.__globals__[n] for n in names if n in fn.__globals__}
    return {n: x for n, x in found.items() if _is_data(x)}


def _is_data(x) -> bool:
    is_array = lambda y: isinstance(y, jax.Array | np.ndarray)
    return not _is_opaque(x) and all(
        is_array(y) or _is_static(y) for y in jtu.tree_leaves(x)
    )
