"""Compiling programs before they are called, and only once.

XLA needs no Python: while it compiles one program, the next one can be traced.
"""

import contextlib
import functools as ft
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PRNGKeyArray, PyTree

from ._condition import is_concrete


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    # Tracing makes millions of objects that stay until it ends. Python's collector of
    # garbage looks at them again and again, which takes a quarter of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stand_ins(shapes: PyTree) -> PyTree:
    # Arrays for what `eqx.filter_eval_shape` returns. Large ones take no memory.
    def array(shape):
        zero = np.zeros((), shape.dtype)
        if shape.weak_type:
            return jnp.full(shape.shape, zero.item())
        return np.broadcast_to(zero, shape.shape)

    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: array(x) if is_shape(x) else x, shapes)


def _is_there(x: Any) -> bool:
    return isinstance(x, jax.Array) and is_concrete(x)


def _places(tree: PyTree) -> set[Sharding]:
    # Of what was put on devices.
    arrays = [x for x in jax.tree.leaves(tree) if _is_there(x)]
    return {x.sharding for x in arrays if x.committed}


def is_placed(tree: PyTree) -> bool:
    # Then results are there, where no `stand_ins` are.
    return len(_places(tree)) > 0


def movable(key: PRNGKeyArray) -> PRNGKeyArray:
    # On no device in particular, where all else would have to go too.
    data = jnp.asarray(np.asarray(jax.random.key_data(key)))
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # An old one, of integers.
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def placed_alike(program: Callable) -> Callable:
    # Each mixture of arrays that were put on a device with others would be compiled on
    # its own. So if there are some then all others go there too.
    @ft.wraps(program)
    def call(*args):
        places = _places(args)
        if len(places) == 1 and all(len(place.device_set) == 1 for place in places):
            (place,) = places
            put = lambda x: jax.device_put(x, place) if _is_there(x) else x
            args = jax.tree.map(put, args)
        return program(*args)

    cast(Any, call).lower = cast(Any, program).lower
    return call


def compiling(thread: Executor, program: Callable, *args: Any) -> Future:
    # It is traced here, since JAX may have been configured for this thread alone.
    lowered = cast(Any, program).lower(*args)  # of a `jit`
    return thread.submit(lowered.compile)
