import abc
import functools as ft
from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, ArrayLike, DTypeLike, Float, PyTree

from ._pretty import named_doc


_Values: TypeAlias = ArrayLike | Sequence[ArrayLike]

# Larger arrays are shown as shape and dtype, so that the repr of a model stays legible.
_MAX_SHOWN = 8


def _no_number(self: Any, *other: Any) -> Any:
    # With anything else, such as a kernel, it is for that to say what it means.
    if not all(isinstance(x, AbstractParameter) or eqx.is_array_like(x) for x in other):
        return NotImplemented
    raise TypeError(
        f"A `{type(self).__name__}` is no number. Kernels and operators get its value "
        "during a solve; elsewhere use `eqx_bilevel.unwrap(...)` first, on whatever it "
        "is part of, or its `value`."
    )


class AbstractParameter(eqx.Module):
    """A node of a pytree that stands for a value, and says how that value may be
    learned.

    The library replaces such nodes by their `value` (see [`eqx_bilevel.unwrap`][])
    before it calls kernels and operators, so those only ever see plain arrays.

    Available are [`eqx_bilevel.Positive`][], [`eqx_bilevel.Bounded`][],
    [`eqx_bilevel.Unconstrained`][] and [`eqx_bilevel.Frozen`][]. For a constraint of
    your own, subclass this class, define `value`, and, if the parameter is to be
    rescaled by the library, register the class with `eqx_bilevel.with_value`.

    !!! info

        The `repr` shows the value and not the stored variable. A gradient or an
        optimiser's update of a model is made of the same classes; look at its leaves
        (`jax.tree.leaves`) and not at its `repr`.
    """

    @property
    @abc.abstractmethod
    def value(self) -> PyTree:
        """What this parameter stands for."""

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_number
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = _no_number
    __rmatmul__ = __neg__ = __abs__ = __float__ = _no_number

    def __format__(self, spec: str) -> str:
        # Who says how many digits to show takes it for a number.
        return _no_number(self) if spec else str(self)

    __lt__ = __le__ = __gt__ = __ge__ = _no_number


class Positive(AbstractParameter):
    """A positive number, or an array of positive numbers, that is learned through its
    logarithm.

    The value is $\\exp(\\mathtt{raw})$, with `raw` clipped so that the value neither
    underflows to zero nor overflows. The gradient is finite everywhere (and zero where
    it was clipped).
    """

    raw: Float[Array, "..."]

    def __init__(self, value: _Values):
        array = _as_float_array("Positive", value)
        concrete = _concrete(value)
        if concrete is not None and not np.all((concrete > 0) & np.isfinite(concrete)):
            raise ValueError(
                f"`value` of `Positive` must be finite and greater than zero, got "
                f"{_show(concrete)}."
            )
        self.raw = _logarithm(array)

    @property
    def value(self) -> Float[Array, "..."]:
        finfo = jnp.finfo(self.raw.dtype)
        # The argument is clipped, not the result: the derivative of an overflown `exp`
        # is infinite, and infinity times zero is NaN. The shrinking keeps the rounding
        # of the two logarithms from leaving the range.
        shrink = 1 - float(finfo.eps)
        lower = float(np.log(float(finfo.tiny))) * shrink
        upper = float(np.log(float(finfo.max))) * shrink
        return jnp.exp(jnp.clip(self.raw, lower, upper))

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return named_doc("Positive", [_value_doc(self, **kwargs)], **kwargs)


@jax.jit
def _logarithm(array: Array) -> Array:
    finfo = jnp.finfo(array.dtype)
    # What underflows in the given precision is not a mistake. A negative traced value
    # cannot be reported: let it become NaN, not a tiny valid number.
    clipped = jnp.clip(array, finfo.tiny, finfo.max)
    return jnp.log(jnp.where(array < 0, array, clipped))


Positive.__init__.__doc__ = """**Arguments:**

- `value`: the value to start from: a number, an array, or a sequence of numbers.
    Numbers become arrays of the default floating-point dtype; floating-point arrays
    keep theirs.

**Raises:**

A `ValueError` if `value` is not finite and positive. A traced value cannot be checked;
a negative one gives NaN.
"""


class Bounded(AbstractParameter):
    """A number, or an array of numbers, that is kept between two bounds.

    The value is $\\mathtt{lower} + (\\mathtt{upper} - \\mathtt{lower})
    \\sigma(\\mathtt{raw})$ with the logistic function $\\sigma$. It never leaves the
    closed interval.
    """

    raw: Float[Array, "..."]
    lower: float = eqx.field(static=True)
    upper: float = eqx.field(static=True)

    def __init__(self, value: _Values, lower: int | float, upper: int | float):
        self.lower, self.upper = float(lower), float(upper)
        if not (self.lower < self.upper and np.isfinite(self.upper - self.lower)):
            raise ValueError(
                "`lower` and `upper` of `Bounded` must be finite with `lower < upper`, "
                f"got lower={self.lower} and upper={self.upper}."
            )
        array = _as_float_array("Bounded", value)
        concrete = _concrete(value)
        if concrete is not None:
            # In the precision that it will be stored in: 0.3 < 0.1 + 0.2 in float64.
            rounded = concrete.astype(array.dtype)
            low, high = np.asarray([self.lower, self.upper], array.dtype)
            if not np.all((rounded > low) & (rounded < high)):
                raise ValueError(
                    f"`value` of `Bounded` must lie strictly between lower="
                    f"{self.lower} and upper={self.upper}, got {_show(concrete)}."
                )
        self.raw = jnp.log(array - self.lower) - jnp.log(self.upper - array)

    @property
    def value(self) -> Float[Array, "..."]:
        width = self.upper - self.lower
        value = self.lower + width * jax.nn.sigmoid(self.raw)
        # Rounding may leave the interval by a unit in the last place.
        return jnp.clip(value, self.lower, self.upper)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        bounds = wl.named_objs([("lower", self.lower), ("upper", self.upper)], **kwargs)
        docs = [_value_doc(self, **kwargs), *bounds]
        return named_doc("Bounded", docs, **kwargs)


Bounded.__init__.__doc__ = """**Arguments:**

- `value`: the value to start from: a number, an array, or a sequence of numbers,
    strictly between the bounds. Numbers become arrays of the default floating-point
    dtype; floating-point arrays keep theirs.
- `lower`: the lower bound, a number. It is not learned.
- `upper`: the upper bound, a number. It is not learned.

**Raises:**

A `ValueError` if the bounds are not finite and in order, or if `value` does not lie
strictly between them. A traced value cannot be checked; one outside gives NaN.
"""


class Unconstrained(AbstractParameter):
    """A number, or an array of numbers, that is learned as it is.

    Arrays are learned anyway; this marks a coefficient as something to learn where a
    plain number would be a constant.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: _Values):
        self.raw = _as_float_array("Unconstrained", value)

    @property
    def value(self) -> Float[Array, "..."]:
        return self.raw

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return named_doc("Unconstrained", [_value_doc(self, **kwargs)], **kwargs)


Unconstrained.__init__.__doc__ = """**Arguments:**

- `value`: the value to start from: a number, an array, or a sequence of numbers.
    Numbers become arrays of the default floating-point dtype; floating-point arrays
    keep theirs.
"""


class Frozen(AbstractParameter):
    """Something that is not learned: a number, an array, a network, or another
    parameter, as in `Frozen(Positive(0.2))`.

    The value is what was wrapped, with all parameters in it replaced by their values,
    and without a gradient.
    """

    wrapped: PyTree

    def __init__(self, value: PyTree):
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            value = _as_float_array("Frozen", value)
        elif isinstance(value, list | tuple) and type(value) in (list, tuple):
            numbers = len(value) > 0 and all(type(x) in (int, float) for x in value)
            value = _as_float_array("Frozen", value) if numbers else value
        self.wrapped = value

    @property
    def value(self) -> PyTree:
        return jtu.tree_map(_stop_gradient, unwrap(self.wrapped))

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return named_doc("Frozen", [array_doc(self.wrapped, **kwargs)], **kwargs)


Frozen.__init__.__doc__ = """**Arguments:**

- `value`: any pytree; it may contain other parameters. A number, or a list or tuple of
    numbers, becomes an array of the default floating-point dtype; everything else is
    kept as it is.
"""


def unwrap(tree: PyTree) -> PyTree:
    """Replaces every parameter in a pytree by its value.

    This is differentiable, and works under `jax.jit` and `jax.vmap`.

    **Arguments:**

    - `tree`: any pytree, for example a kernel.

    **Returns:**

    A pytree like `tree` in which [`eqx_bilevel.Positive`][] and the like have become
    plain arrays, however deeply they were nested.
    """
    return jtu.tree_map(value_of, tree, is_leaf=_is_parameter)


def value_of(x: PyTree) -> PyTree:
    """The value of a parameter; anything else is returned as it is.

    **Arguments:**

    - `x`: a parameter, or anything else.

    **Returns:**

    `x.value` if `x` is an [`eqx_bilevel.AbstractParameter`][], and `x` if not.
    """
    return x.value if isinstance(x, AbstractParameter) else x


def positive(x: AbstractParameter | _Values) -> AbstractParameter:
    """Makes a parameter of a plain number: a converter for fields that must be
    positive, as in `eqx.field(converter=positive)`.

    **Arguments:**

    - `x`: a parameter, which is left alone whatever its class, or positive numbers.

    **Returns:**

    `x` if it is a parameter, and `Positive(x)` if not.
    """
    return x if isinstance(x, AbstractParameter) else Positive(x)


def learnable(tree: PyTree) -> PyTree[bool]:
    """Says which leaves of a pytree are learned: the floating-point arrays that are not
    inside a [`eqx_bilevel.Frozen`][].

    !!! example

        ```python
        params, rest = eqx.partition(kernel, learnable(kernel))
        ```

    **Arguments:**

    - `tree`: any pytree, for example a kernel.

    **Returns:**

    A pytree of the same structure with `True` or `False` in place of every leaf.
    """

    def mark(node):
        if isinstance(node, Frozen):
            return jtu.tree_map(lambda _: False, node)
        return eqx.is_inexact_array(node)

    return jtu.tree_map(mark, tree, is_leaf=lambda x: isinstance(x, Frozen))


@ft.singledispatch
def with_value(parameter: AbstractParameter, value: _Values) -> AbstractParameter:
    """A parameter of the same class, and of the same dtype, with another value.

    Works with traced values and is differentiable with respect to them. Register a
    class of your own with `with_value.register(MyParameter)`.

    **Arguments:**

    - `parameter`: the parameter to start from.
    - `value`: the new value. For [`eqx_bilevel.Bounded`][] it is moved strictly inside
        the bounds if it is not there; [`eqx_bilevel.Frozen`][] ignores it.

    **Returns:**

    The new parameter.
    """
    raise NotImplementedError(
        f"`with_value` is not implemented for {type(parameter).__name__}. Register it "
        "with `with_value.register`."
    )


@with_value.register(Positive)
def _(parameter: Positive, value: _Values) -> Positive:
    return Positive(_as_float_array("Positive", value, parameter.raw.dtype))


@with_value.register(Unconstrained)
def _(parameter: Unconstrained, value: _Values) -> Unconstrained:
    return Unconstrained(_as_float_array("Unconstrained", value, parameter.raw.dtype))


@with_value.register(Frozen)
def _(parameter: Frozen, value: _Values) -> Frozen:
    del value
    return parameter


@with_value.register(Bounded)
def _(parameter: Bounded, value: _Values) -> Bounded:
    array = _as_float_array("Bounded", value, parameter.raw.dtype)
    lower, upper = parameter.lower, parameter.upper
    # A few units in the last place, so that the value is still strictly inside after
    # rounding, and no more: values near a bound are legitimate.
    eps = 8 * float(jnp.finfo(array.dtype).eps)
    margin = eps * max(upper - lower, abs(lower), abs(upper))
    return Bounded(jnp.clip(array, lower + margin, upper - margin), lower, upper)


def _is_parameter(x: Any) -> bool:
    return isinstance(x, AbstractParameter)


def _stop_gradient(x: Any) -> Any:
    return lax.stop_gradient(x) if eqx.is_inexact_array(x) else x


def is_traced(x: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves(x))


# NumPy and not JAX, since under a trace JAX operations on concrete arrays are traced.
def _concrete(value: Any) -> np.ndarray | None:
    return None if is_traced(value) else np.asarray(value)


# Strongly typed: a weak dtype would change, and so recompile, at the first update.
def _as_float_array(
    name: str, value: Any, dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"`value` of `{name}` must be a number or an array of numbers, got an "
            f"object of type {type(value).__name__}."
        ) from e
    if not (
        jnp.issubdtype(array.dtype, jnp.floating)
        or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise ValueError(
            f"`value` of `{name}` must be real numbers, got dtype {array.dtype}."
        )
    if dtype is None:
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        dtype = array.dtype if is_float else jnp.result_type(float)
    return jnp.asarray(array, dtype=dtype)


def _show(x: np.ndarray) -> str:
    # Always with a point or an exponent, as Python shows floats.
    def number(v):
        text = f"{float(v):.6g}"
        return text if any(c in text for c in ".en") else text + ".0"

    return np.array2string(
        x, separator=", ", formatter={"all": number}, threshold=_MAX_SHOWN
    )


# In a gradient, a filter specification or a `jax.eval_shape` the stored variable need
# not be a concrete array. The repr must not fail then.
def _is_shown(x: Any) -> bool:
    return (
        eqx.is_inexact_array(x)
        and not is_traced(x)
        and not (isinstance(x, jax.Array) and x.is_deleted())
        and x.size <= _MAX_SHOWN
    )


def _value_doc(
    parameter: Positive | Bounded | Unconstrained, **kwargs
) -> wl.AbstractDoc:
    if not _is_shown(parameter.raw):
        return wl.pdoc(parameter.raw, **kwargs)
    with jax.ensure_compile_time_eval():
        return array_doc(parameter.value, **kwargs)


def array_doc(x: Any, **kwargs) -> wl.AbstractDoc:
    return wl.TextDoc(_show(np.asarray(x))) if _is_shown(x) else wl.pdoc(x, **kwargs)
