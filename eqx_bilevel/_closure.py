"""Python functions as pytrees."""

import copy
import functools as ft
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import wadler_lindig as wl

from ._code import (
    attributes,
    globals_of,
    has_attributes,
    is_library,
    is_opaque,
    Uses,
)
from ._pretty import named_doc


class _ByIdentity:
    # Makes a dictionary of globals usable as static data.
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


class _ByType(_ByIdentity):
    # Likewise an object, whose attributes are compared elsewhere.
    def __eq__(self, other):
        return isinstance(other, _ByType) and type(self.value) is type(other.value)

    def __hash__(self):
        return hash(type(self.value))


class Function(eqx.Module):
    # A Python function, taken apart: what it closes over is data, and so are the
    # variables of its module that it reads. The rest is static and compares by value.
    closure: tuple
    read: dict[str, Any]
    defaults: tuple | None
    kwdefaults: dict | None
    code: types.CodeType = eqx.field(static=True)
    globals: _ByIdentity = eqx.field(static=True)
    seen: tuple = eqx.field(static=True)  # in what may change
    name: str = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return self._together()(*args, **kwargs)

    def _together(self) -> types.FunctionType:
        # The function again, and those inside it as well: JAX hashes what is given to
        # `jax.lax.cond`, for instance.
        closure, read, defaults, kwdefaults = _together(
            (self.closure, self.read, self.defaults, self.kwdefaults)
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


class Owner(eqx.Module):
    # A Python object, class or module whose attributes a function reads: these are
    # data. All else is as it is in the original.
    _read: dict[str, Any]
    _original: _ByIdentity = eqx.field(static=True)
    _seen: tuple = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return self._together()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._together(), name)

    def _together(self) -> Any:
        original, read = self._original.value, _together(self._read)
        if isinstance(original, type):
            return type(original.__name__, (original,), read)
        if isinstance(original, types.ModuleType):
            new = types.ModuleType(original.__name__)
            new.__dict__.update(vars(original))
        else:
            new = copy.copy(original)
        for name, value in read.items():
            object.__setattr__(new, name, value)
        return new

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        original = self._original.value
        name = getattr(original, "__name__", type(original).__name__)
        return named_doc(name, wl.named_objs(self._read.items(), **kwargs), **kwargs)


class Method(eqx.Module):
    function: Any
    owner: Any

    def __call__(self, *args, **kwargs):
        return self._together()(*args, **kwargs)

    def _together(self) -> types.MethodType:
        return types.MethodType(*_together((self.function, self.owner)))


def _together(tree: Any) -> Any:
    is_apart = lambda x: isinstance(x, Function | Owner | Method)
    together = lambda x: x._together() if is_apart(x) else x
    return jtu.tree_map(together, tree, is_leaf=is_apart)


def _as_jax(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _is_static(x) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def function_as_pytree(fn: Any) -> Any:
    # Three things go wrong with plain functions. A new lambda is a new jit-cache key,
    # even if it has the same code; arrays that it closes over are invisible to whatever
    # differentiates the function's owner as a pytree; and attributes that it reads may
    # have changed since it was compiled. All are cured by making what it uses a pytree.
    # Anything that cannot be called, or is JAX's or Equinox's, is returned unchanged.
    if isinstance(fn, ft.partial):
        function = function_as_pytree(fn.func)
        return eqx.Partial(function, *fn.args, **fn.keywords)
    is_function = isinstance(fn, types.FunctionType | types.MethodType)
    if is_function or (callable(fn) and has_attributes(fn)):
        return _convert(fn, (), Uses.of(fn))
    return fn


def _convert(x: Any, inside: tuple, uses: Uses):
    if any(x is y for y in inside):
        return x
    if isinstance(x, types.FunctionType):
        return _function(x, inside, uses)
    if isinstance(x, types.MethodType):
        fn, owner = x.__func__, x.__self__
        if not isinstance(fn, types.FunctionType) or not has_attributes(owner):
            return x
        return Method(*(_convert(y, inside, uses) for y in (fn, owner)))
    return _owner(x, inside, uses) if has_attributes(x) else x


def _function(fn: types.FunctionType, inside: tuple, uses: Uses):
    library = len(inside) > 0 and is_library(fn.__globals__.get("__name__", ""))
    if library and fn.__closure__ is None:  # Always the same.
        return fn
    inside = (*inside, fn)
    try:
        contents = tuple(cell.cell_contents for cell in fn.__closure__ or ())
    except ValueError:  # A variable that is not assigned yet.
        return fn
    if any(c is f for c in contents for f in inside):  # Recursive functions.
        return fn
    if any(map(is_opaque, contents)):
        return fn
    read, seen = _data_and_seen({} if library else globals_of(fn))
    data = contents, read, fn.__defaults__, fn.__kwdefaults__
    contents, read, defaults, kwdefaults = data = _data(data, inside, uses)
    static = eqx.filter(data, eqx.is_array, inverse=True)
    if not all(map(_is_static, jtu.tree_leaves(static))):
        return fn
    globals_ = _ByIdentity(fn.__globals__)
    return Function(
        contents, read, defaults, kwdefaults, fn.__code__, globals_, seen, fn.__name__
    )


def _data(tree: Any, inside: tuple, uses: Uses) -> Any:
    convert = lambda x: _as_jax(_convert(x, inside, uses))
    is_leaf = lambda x: isinstance(x, types.FunctionType)
    return jtu.tree_map(convert, tree, is_leaf=is_leaf)


def _data_and_seen(variables: dict[str, Any]) -> tuple[dict[str, Any], tuple]:
    # Lists and so on are left where they are, and what they contain is compared.
    data = {n: x for n, x in variables.items() if _is_data(x)}
    others = sorted(variables.keys() - data.keys())
    return data, tuple((n, _content(variables[n])) for n in others)


def _is_data(x) -> bool:
    is_data = lambda y: (
        isinstance(y, jax.Array | np.ndarray) or has_attributes(y) or _is_static(y)
    )
    return not is_opaque(x) and all(map(is_data, jtu.tree_leaves(x)))


def _content(x: Any, inside: tuple = ()) -> Any:
    if any(x is y for y in inside):
        return None
    content = lambda y: _content(y, (*inside, x))
    if isinstance(x, dict):
        return dict, tuple((k, content(v)) for k, v in x.items())
    if isinstance(x, list | tuple):
        return type(x), tuple(map(content, x))
    if isinstance(x, set):
        return set, frozenset(x)
    return type(x), x if _is_static(x) else _ByIdentity(x)


#
# Attributes
#


def _owner(x: Any, inside: tuple, uses: Uses):
    read = attributes(x, uses.read)
    # What a function changes has to be the very object.
    if len(read) == 0 or any(name in uses.changed for name in read):
        return x
    read, seen = _data_and_seen(read)
    by_identity = isinstance(x, type | types.ModuleType)
    original = _ByIdentity(x) if by_identity else _ByType(x)
    return Owner(_data(read, (*inside, x), uses), original, seen)
