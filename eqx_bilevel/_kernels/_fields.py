from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .._parameters import AbstractParameter, Frozen, positive, value_of, with_value


ParameterLike: TypeAlias = AbstractParameter | ArrayLike | Sequence[float | int]


# Not `dataclasses.replace`: in an already unwrapped kernel it would wrap the other
# fields. `is_leaf`, since `old` may have no leaves.
def replace(kernel: Any, name: str, new: Any) -> Any:
    old = getattr(kernel, name)
    return eqx.tree_at(
        lambda k: getattr(k, name), kernel, new, is_leaf=lambda x: x is old
    )


# Of factors for each dimension, a value that is one for all gets their geometric mean.
def multiply_parameter(parameter: Any, factor: ArrayLike) -> Any:
    if isinstance(parameter, Frozen):
        return parameter
    value = jnp.asarray(value_of(parameter))
    factor = jnp.asarray(factor, value.dtype)
    value = value * (common_factor(factor) if value.ndim == 0 else factor)
    if isinstance(parameter, AbstractParameter):
        return with_value(parameter, value)
    return value


def common_factor(factor: ArrayLike) -> Array:
    factor = jnp.asarray(factor)
    return factor if factor.ndim == 0 else jnp.exp(jnp.mean(jnp.log(factor)))


# The converter of a field that is a positive number, or one per dimension. Plain
# numbers are checked by `Positive`; the rest here, where the value is known.
def positive_field(
    name: str, max_ndim: int
) -> Callable[[ParameterLike], AbstractParameter]:
    def convert(x: ParameterLike) -> AbstractParameter:
        parameter = as_parameter(name, x)
        check_value(name, parameter.value, max_ndim, lambda v: v > 0, "positive")
        return parameter

    return convert


def as_parameter(name: str, x: ParameterLike, hint: str = "") -> AbstractParameter:
    try:
        return positive(x)
    except ValueError as error:
        raise ValueError(f"Wrong value for `{name}`. {error}{hint}") from error


def check_value(
    name: str, value: Any, max_ndim: int, legal: Callable[[Any], Any], what: str
) -> None:
    if not eqx.is_array_like(value):
        raise ValueError(f"`{name}` must be a number or an array; got {value!r}.")
    if jnp.ndim(value) > max_ndim:
        shape = "a scalar" if max_ndim == 0 else "a scalar, or have one axis"
        raise ValueError(f"`{name}` must be {shape}; got shape {jnp.shape(value)}.")
    if isinstance(value, jax.core.Tracer):
        return
    if not np.all(legal(np.asarray(value))):
        raise ValueError(f"`{name}` must be {what}; got {np.asarray(value)}.")


# The value of a parameter that is a scalar or has an entry for each dimension of `x`.
def per_dimension(name: str, parameter: Any, x: Array) -> Array:
    value = value_of(parameter)
    if jnp.shape(value) not in ((), x.shape):
        raise ValueError(
            f"`{name}` has shape {jnp.shape(value)}, but the kernel is called with "
            f"points of shape {x.shape}. It must be a scalar or have one entry for "
            "each dimension."
        )
    return value
