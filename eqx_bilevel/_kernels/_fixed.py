import dataclasses
from typing import Any

import jax

from .._parameters import AbstractParameter, learnable
from ._base import AbstractKernel


# Python floats in kernels that have nothing to learn, as `Class.field`: they are never
# learned, which whoever wrote them may not know. Frozen ones were meant to be.
def fixed_numbers(tree: Any) -> list[str]:
    stop = AbstractKernel, AbstractParameter
    kernels = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, stop))
    found = []
    for kernel in kernels:
        if not isinstance(kernel, AbstractKernel):
            continue
        values = {f.name: f for f in dataclasses.fields(kernel)}
        inside = [getattr(kernel, name) for name in values]
        if not any(jax.tree.leaves(learnable(kernel))):
            found += [
                f"{type(kernel).__name__}.{name}"
                for (name, field), x in zip(values.items(), inside)
                if isinstance(x, float) and not field.metadata.get("static", False)
            ]
        found += fixed_numbers(inside)
    return list(dict.fromkeys(found))
