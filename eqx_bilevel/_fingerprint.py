"""A hash of what a computation depends on: data, and the code of functions.

The same in each process, and wherever the code stands.
"""

import dataclasses
import functools as ft
import hashlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._closure import Function, Owner
from ._code import is_library, names_read


def fingerprint(x: Any) -> str:
    return _Fingerprints().of(x).hex()


_LITERALS = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice)


class _Fingerprints:
    # Each part has a hash of its own, of those of its parts.

    def __init__(self):
        self._known: dict[int, tuple[Any, bytes | None]] = {}

    def of(self, x: Any) -> bytes:
        if isinstance(x, _LITERALS):
            return _hash(type(x).__name__, repr(x))
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return _hash(*_array(x))
        # With the object itself, lest another one gets its id.
        _, known = self._known.setdefault(id(x), (x, None))
        if known is None:
            self._known[id(x)] = x, _hash("inside itself", _name(type(x)))
            known = _hash(*self._parts(x))
            self._known[id(x)] = x, known
        return known

    def _parts(self, x: Any) -> list[str | bytes]:
        of, each = self.of, lambda xs: [self.of(y) for y in xs]
        if isinstance(x, list | tuple):
            return [_name(type(x)), *each(x)]
        if isinstance(x, dict):
            return ["dict", *sorted(of(k) + of(v) for k, v in x.items())]
        if isinstance(x, set | frozenset):
            return ["set", *sorted(each(x))]
        if isinstance(x, types.FunctionType):
            closure = [_contents(cell) for cell in x.__closure__ or ()]
            return self._function(
                x.__code__, x.__globals__, closure, x.__defaults__, x.__kwdefaults__
            )
        if isinstance(x, Function):
            globals_ = x.globals.value
            return self._function(x.code, globals_, x.closure, x.defaults, x.kwdefaults)
        if isinstance(x, Owner):
            return ["owner", *each([type(x._original.value), x._read])]
        if isinstance(x, types.CodeType):
            return ["code", x.co_code, *each([x.co_consts, x.co_names])]
        if isinstance(x, types.MethodType):
            return ["method", *each([x.__func__, x.__self__])]
        if isinstance(x, ft.partial):
            return ["partial", *each([x.func, x.args, x.keywords])]
        if isinstance(x, type):
            return [_name(x), *each(_members(x))]
        wrapped = getattr(x, "__wrapped__", None)  # By `jax.jit`, for instance.
        return [_called(x), *each([type(x), wrapped, _fields(x)])]

    def _function(self, code, globals_, closure, *defaults) -> list[str | bytes]:
        # Of libraries it is only said which function it is.
        if is_library(globals_.get("__name__", "")):
            parts = [globals_["__name__"], code.co_qualname]
        else:
            read = {n: globals_[n] for n in names_read(code) if n in globals_}
            parts = [code, read]
        return ["function", *map(self.of, [parts, list(closure), *defaults])]


def _hash(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(part)}:".encode() + part)
    return digest.digest()


def _array(x: Any) -> tuple[str, bytes]:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(x) if is_key else x)
    if array.dtype == object:
        return "objects", str(array.shape).encode()
    return f"{array.shape}{array.dtype}", array.tobytes()


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not assigned yet.
        return None


def _name(cls: type) -> str:
    # A script is a module of another name if it is imported.
    library = is_library(cls.__module__)
    return f"{cls.__module__}.{cls.__qualname__}" if library else cls.__qualname__


def _called(x: Any) -> str:
    # Of what is known by its name only, if it has one: modules, compiled functions.
    names = [getattr(x, n, None) for n in ("__qualname__", "__name__")]
    return ".".join(name for name in names if isinstance(name, str))


def _fields(x: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(x):  # All modules of Equinox are.
        names = [field.name for field in dataclasses.fields(x)]
        return {n: getattr(x, n) for n in names if hasattr(x, n)}
    return {} if is_library(type(x).__module__) else dict(getattr(x, "__dict__", {}))


def _members(cls: type) -> list[Any]:
    # What a user has written into a class and those that it comes from.
    bases = [c for c in cls.__mro__ if not is_library(c.__module__)]
    return [_written(dict(vars(c))) for c in bases]


def _written(members: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, x in members.items():
        x = getattr(x, "method", x)  # Equinox wraps methods.
        x = getattr(x, "__func__", getattr(x, "fget", x))
        if isinstance(x, types.FunctionType):
            found[name] = x
        elif not name.startswith("_") and isinstance(x, (*_LITERALS, jax.Array)):
            found[name] = x
    return found
