import functools as ft
import operator
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._parameters import AbstractParameter, Frozen, value_of
from ._base import AbstractKernel, as_kernel, rescale, smoothness
from ._elementary import Constant
from ._fields import multiply_parameter, per_dimension, positive_field, replace


def _kernels(kernels: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(kernels, AbstractKernel) or len(kernels) == 0:
        raise ValueError(
            f"`kernels` must be a non-empty tuple of kernels; got {kernels!r}."
        )
    return tuple(as_kernel(kernel) for kernel in kernels)


class Sum(AbstractKernel):
    """A sum of kernels. It is most easily written `kernel1 + kernel2`."""

    kernels: tuple[AbstractKernel | AbstractParameter, ...] = eqx.field(
        converter=_kernels
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return ft.reduce(operator.add, [value_of(k)(x, y) for k in self.kernels])


Sum.__init__.__doc__ = """**Arguments:**

- `kernels`: a tuple of kernels.
"""


class Product(AbstractKernel):
    """A product of kernels. It is most easily written `kernel1 * kernel2`."""

    kernels: tuple[AbstractKernel | AbstractParameter, ...] = eqx.field(
        converter=_kernels
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return ft.reduce(operator.mul, [value_of(k)(x, y) for k in self.kernels])


Product.__init__.__doc__ = Sum.__init__.__doc__


class Scaled(AbstractKernel):
    """A kernel times a variance. It is most easily written `variance * kernel`."""

    kernel: AbstractKernel | AbstractParameter = eqx.field(converter=as_kernel)
    variance: AbstractParameter = eqx.field(
        converter=positive_field("variance", max_ndim=0)
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return value_of(self.variance) * value_of(self.kernel)(x, y)


Scaled.__init__.__doc__ = """**Arguments:**

- `kernel`: any kernel.
- `variance`: a positive scalar. A number or an array becomes a
    [`eqx_bilevel.Positive`][] parameter, which is learned.
"""


def _dims(dims: int | Sequence[int]) -> tuple[int, ...]:
    given = dims if isinstance(dims, Sequence) else (dims,)
    try:
        found = tuple(operator.index(i) for i in given)
    except TypeError:
        found = ()
    if len(found) == 0 or min(found) < 0 or len(set(found)) != len(found):
        raise ValueError(
            "`dims` must be a non-negative integer, or a tuple of different ones; got "
            f"{dims!r}."
        )
    return found


class Subspace(AbstractKernel):
    """A kernel of some of the coordinates only. For example, this one is periodic in
    the second coordinate:

    ```python
    Subspace(Gaussian(0.3), 0) * Subspace(Periodic(1.0, Frozen(10.0)), 1)
    ```
    """

    kernel: AbstractKernel | AbstractParameter = eqx.field(converter=as_kernel)
    dims: tuple[int, ...] = eqx.field(static=True, converter=_dims)

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        if max(self.dims) >= x.size:
            raise ValueError(
                f"`dims` of `Subspace` is {self.dims}, but the kernel is called with "
                f"points of shape {x.shape}."
            )
        # Slices, because indexing with an array becomes a slow gather.
        x, y = (
            jnp.concatenate([jax.lax.slice_in_dim(z, i, i + 1) for i in self.dims])
            for z in (x, y)
        )
        return value_of(self.kernel)(x, y)


Subspace.__init__.__doc__ = """**Arguments:**

- `kernel`: a kernel of points of dimension `len(dims)`.
- `dims`: the indices of the coordinates, an integer or a tuple of integers.
"""


class Stretched(AbstractKernel):
    """A kernel of scaled points: `kernel(x / factor, y / factor)`."""

    kernel: AbstractKernel | AbstractParameter = eqx.field(converter=as_kernel)
    factor: AbstractParameter = eqx.field(
        converter=positive_field("factor", max_ndim=1)
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        factor = per_dimension("factor", self.factor, x)
        return value_of(self.kernel)(x / factor, y / factor)


Stretched.__init__.__doc__ = """**Arguments:**

- `kernel`: any kernel.
- `factor`: a positive scalar, or an array with one entry for each dimension. Lengths of
    `kernel` are multiplied by it.
"""


@smoothness.register(Sum)
@smoothness.register(Product)
def _(kernel: Sum | Product) -> int | float:
    return min(smoothness(k) for k in kernel.kernels)


@smoothness.register(Scaled)
@smoothness.register(Subspace)
@smoothness.register(Stretched)
def _(kernel: Scaled | Subspace | Stretched) -> int | float:
    return smoothness(kernel.kernel)


@rescale.register(Sum)
@rescale.register(Product)
def _(kernel: Sum | Product, factor: ArrayLike) -> Sum | Product:
    return type(kernel)(tuple(rescale(k, factor) for k in kernel.kernels))


# Not by `__init__`, which would wrap an already unwrapped variance.
@rescale.register(Scaled)
def _(kernel: Scaled, factor: ArrayLike) -> Scaled:
    return replace(kernel, "kernel", rescale(kernel.kernel, factor))


@rescale.register(Subspace)
def _(kernel: Subspace, factor: ArrayLike) -> Subspace:
    if jnp.ndim(factor) == 1:
        factor = jnp.asarray(factor)[jnp.array(kernel.dims)]
    return replace(kernel, "kernel", rescale(kernel.kernel, factor))


# The kernel inside may be one for which only this wrapper can be rescaled, so that
# rescaling it would add a wrapper each time.
@rescale.register(Stretched)
def _(kernel: Stretched, factor: ArrayLike) -> Stretched:
    if isinstance(kernel.factor, Frozen):
        return replace(kernel, "kernel", rescale(kernel.kernel, factor))
    return replace(kernel, "factor", multiply_parameter(kernel.factor, factor))


# The operators. They return `NotImplemented` where Python is to raise a `TypeError`.
def add(left: Any, right: Any) -> Any:
    terms = []
    for term in (left, right):
        if isinstance(term, int | float) and term == 0:
            continue  # The start of the builtin `sum`.
        elif isinstance(term, Sum):
            terms.extend(term.kernels)
        elif _is_kernel(term):
            terms.append(term)
        elif _is_number(term):
            terms.append(Constant(term))
        else:
            return NotImplemented
    return Sum(tuple(terms)) if len(terms) > 1 else terms[0]


def multiply(left: Any, right: Any) -> Any:
    if _is_kernel(left) and _is_kernel(right):
        factors = []
        for factor in (left, right):
            nested = isinstance(factor, Product)
            factors.extend(factor.kernels if nested else (factor,))
        return Product(tuple(factors))
    elif _is_number(left):
        return Scaled(right, left)
    elif _is_number(right):
        return Scaled(left, right)
    else:
        return NotImplemented


def _is_kernel(x: Any) -> bool:
    return isinstance(value_of(x), AbstractKernel)


def _is_number(x: Any) -> bool:
    return eqx.is_array_like(x) or isinstance(x, AbstractParameter)
