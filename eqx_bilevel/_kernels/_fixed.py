import dataclasses
from typing import Any

import equinox as eqx
import jax

from .._parameters import AbstractParameter, learnable
from ._algebra import Stretched


# Python floats in functions that have nothing to learn, be they kernels, means or what
# these are made of, as `Class.field`: they are never learned, which whoever wrote them
# may not know. Frozen ones were meant to be, those of a kernel that is stretched may
# be, and what is no function, as the settings of a solver, has numbers for other
# reasons.
def fixed_numbers(tree: Any) -> list[str]:
    is_leaf = lambda x: isinstance(x, AbstractParameter) or _is_function(x)
    found = []
    for node in jax.tree.leaves(tree, is_leaf=is_leaf):
        if isinstance(node, AbstractParameter) or not _is_function(node):
            continue
        if isinstance(node, Stretched) and _is_learned(node.factor):
            continue
        fields = [f for f in dataclasses.fields(node) if not f.metadata.get("static")]
        inside = {f.name: getattr(node, f.name) for f in fields}
        if not _is_learned(node):
            name = type(node).__name__
            found += [f"{name}.{k}" for k, x in inside.items() if isinstance(x, float)]
        found += fixed_numbers(list(inside.values()))
    return list(dict.fromkeys(found))


def _is_function(x: Any) -> bool:
    return isinstance(x, eqx.Module) and callable(x)


def _is_learned(x: Any) -> bool:
    return any(jax.tree.leaves(learnable(x)))
