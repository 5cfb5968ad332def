"""Which variables and attributes functions read, by their code."""

import dataclasses
import dis
import functools as ft
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np


# Of these a function may rely on the very object that it closes over, unless there are
# arrays inside: then it is data.
_MUTABLE = (list, dict, set, bytearray)


def is_opaque(x) -> bool:
    try:
        leaves = jtu.tree_leaves(x)
    except (TypeError, ValueError):  # A dictionary with keys that cannot be sorted.
        return True
    has_arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    return isinstance(x, _MUTABLE) and not has_arrays


def has_attributes(x: Any) -> bool:
    # Whether they may change, or be arrays, while it compares equal.
    if isinstance(x, types.ModuleType):
        return not is_library(x.__name__)
    if isinstance(x, types.SimpleNamespace):
        return True
    cls = x if isinstance(x, type) else type(x)
    if type(cls) is not type or is_library(cls.__module__):
        return False
    by_identity = cls.__hash__ is object.__hash__ or cls.__hash__ is None
    return x is cls or by_identity or dataclasses.is_dataclass(cls)


_MISSING = object()


def _attribute(x: Any, name: str) -> Any:
    # As it was written into the object or its class.
    value = inspect.getattr_static(x, name, _MISSING)
    if isinstance(value, types.MemberDescriptorType):  # One of its `__slots__`.
        return getattr(x, name, _MISSING)
    return value


def attributes(x: Any, names: Iterable[str]) -> dict[str, Any]:
    # Those that it has, and that are no methods.
    own = {} if isinstance(x, type) else getattr(x, "__dict__", {})
    found = {name: _attribute(x, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if value is not _MISSING
        and (name in own or not hasattr(type(value), "__get__"))
    }


# These make objects, or print them.
_UNUSED = ("__init__", "__post_init__", "__new__", "__repr__", "__str__")


class Uses:
    # The names of all attributes that a function reads and changes, with the functions
    # and methods that it uses itself.
    def __init__(self):
        self.read: set[str] = set()
        self.changed: set[str] = set()
        self._owners: list[Any] = []
        self._known: list[Any] = []

    @staticmethod
    def of(fn: Any) -> "Uses":
        uses = Uses()
        uses._add(fn)
        return uses

    def _add(self, x: Any) -> None:
        if any(x is y for y in self._known):
            return
        if isinstance(x, property):
            self._add(x.fget)
        elif isinstance(x, classmethod | staticmethod):
            self._add(x.__func__)
        elif isinstance(x, types.MethodType):
            self._add(x.__func__)
            self._add(x.__self__)
        elif isinstance(x, types.FunctionType):
            if not is_library(x.__globals__.get("__name__", "")):
                self._known.append(x)
                self._add_function(x)
        elif has_attributes(x):
            self._known.append(x)
            self._owners.append(x)
            self._add_attributes(x, self.read)
            cls = x if isinstance(x, type) else type(x)
            for name in dir(cls) if not isinstance(x, types.ModuleType) else ():
                if name.startswith("__") and name not in _UNUSED:
                    self._add(inspect.getattr_static(cls, name))

    def _add_function(self, fn: types.FunctionType) -> None:
        new = _names_in(fn.__code__, _READS) - self.read
        self.read |= new
        self.changed |= _names_in(fn.__code__, _CHANGES)
        for owner in [*self._owners]:
            self._add_attributes(owner, new)
        cells = [c.cell_contents for c in fn.__closure__ or () if _is_assigned(c)]
        for x in (*cells, globals_of(fn), fn.__defaults__, fn.__kwdefaults__):
            self._add_leaves(x)

    def _add_attributes(self, owner: Any, names: Iterable[str]) -> None:
        for name in [*names]:
            self._add_leaves(_attribute(owner, name))

    def _add_leaves(self, x: Any) -> None:
        if not is_opaque(x):
            for leaf in jtu.tree_leaves(x):
                self._add(leaf)


def _is_assigned(cell: types.CellType) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True


#
# Names in code
#


def globals_of(fn: types.FunctionType) -> dict[str, Any]:
    names = names_read(fn.__code__)
    return {n: fn.__globals__[n] for n in names if n in fn.__globals__}


_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_CHANGES = ("STORE_ATTR", "DELETE_ATTR")


@ft.lru_cache(maxsize=1000)
def _names_in(code: types.CodeType, operations: tuple[str, ...]) -> frozenset[str]:
    # Also in functions defined inside.
    def names(code) -> Iterator[str]:
        for instruction in dis.get_instructions(code):
            if instruction.opname in operations:
                yield instruction.argval
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from names(constant)

    return frozenset(names(code))


def names_read(code: types.CodeType) -> list[str]:
    # Of globals. Not `co_names`, which has the names of attributes as well.
    return sorted(_names_in(code, _GLOBALS))


@ft.cache
def is_library(module: str) -> bool:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
