"""Compiling programs before they are called.

XLA needs no Python: while it compiles one program, the next one can be traced.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


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


def is_placed(tree: PyTree) -> bool:
    # What was put on a device has results there, where no `stand_ins` are.
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return any(x.committed for x in arrays)


def compiling(thread: Executor, program: Callable, *args: Any) -> Future:
    # It is traced here, since JAX may have been configured for this thread alone.
    lowered = cast(Any, program).lower(*args)  # of an `eqx.filter_jit`
    return thread.submit(lowered.compile)
