"""Compiling within less time and memory."""

import functools as ft
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from ._parameters import is_traced
from ._system import AbstractSystem


# On CPUs XLA makes modules of their own for all groups of operations that it fuses. To
# compile hundreds of them takes half a gigabyte and a quarter of the time. Programs
# with small operations run no faster for it, and others by a fifth.
_FEWER_MODULES = {"xla_cpu_use_fusion_emitters": False}


@ft.cache
def _are_options() -> bool:
    # Others may come with other versions of XLA.
    try:
        jax.jit(lambda: 0, compiler_options=_FEWER_MODULES).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(program: Callable) -> Callable:
    # As `eqx.filter_jit`, with fewer modules if the system in the arguments wants that.
    default = eqx.filter_jit(program)
    options = dict(compiler_options=_FEWER_MODULES)
    fewer_modules = cast(Any, eqx.filter_jit)(program, **options)
    is_system = lambda x: isinstance(x, AbstractSystem)

    def of(*args) -> Any:
        leaves = jax.tree.leaves(args, is_leaf=is_system)
        cheap = any(is_system(x) and x.cheap_to_compile for x in leaves)
        # Programs within others have no options. There new arrays are traced, even if
        # no argument is.
        if cheap and not is_traced((args, jnp.zeros(()))) and _are_options():
            return fewer_modules
        return default

    @ft.wraps(program)
    def call(*args, **kwargs):
        return of(*args)(*args, **kwargs)

    cast(Any, call).lower = lambda *args: of(*args).lower(*args)
    return call
