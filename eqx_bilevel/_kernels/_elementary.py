import math
import operator

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._parameters import AbstractParameter, value_of
from ._base import AbstractKernel, rescale, rescale_lengthscale
from ._fields import (
    as_parameter,
    check_value,
    ParameterLike,
    per_dimension,
    positive_field,
)


class Periodic(AbstractKernel):
    r"""A kernel for periodic functions:
    $k(x, y) = \exp\bigl(-2 \sum_d \sin^2(\pi (x_d - y_d) / p_d) / \ell_d^2\bigr)$.

    Functions with this prior satisfy periodic boundary conditions exactly. With
    [`eqx_bilevel.Subspace`][] they are periodic in some of the dimensions.
    """

    lengthscale: AbstractParameter = eqx.field(
        converter=positive_field("lengthscale", max_ndim=1)
    )
    period: AbstractParameter = eqx.field(
        converter=positive_field("period", max_ndim=1)
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        lengthscale = per_dimension("lengthscale", self.lengthscale, x)
        period = per_dimension("period", self.period, x)
        z = jnp.sin(math.pi * (x - y) / period) / lengthscale
        return jnp.exp(-2 * jnp.sum(z * z))


Periodic.__init__.__doc__ = r"""**Arguments:**

- `lengthscale`: $\ell$, a positive scalar, or an array with one entry for each
    dimension. It has no unit: the kernel varies over $\ell p / (2 \pi)$.
- `period`: $p$, a positive scalar, or an array with one entry for each dimension. Like
    any number it is learned; usually it is known, and given as
    `eqx_bilevel.Frozen(10.0)`.
"""


@rescale.register(Periodic)
def _(kernel: Periodic, factor: ArrayLike) -> Periodic:
    return rescale_lengthscale(kernel, factor)


def _degree(degree: int) -> int:
    try:
        degree = operator.index(degree)
    except TypeError:
        raise ValueError(f"`degree` must be an integer; got {degree!r}.") from None
    if degree < 1:
        raise ValueError(f"`degree` must be at least 1; got {degree}.")
    return degree


# Zero is a legal offset, although not a legal `Positive`.
def _offset(offset: ParameterLike) -> AbstractParameter:
    hint = " For no offset at all, write `Frozen(0.0)`."
    parameter = as_parameter("offset", offset, hint)
    check_value("offset", parameter.value, 0, lambda v: v >= 0, "non-negative")
    return parameter


class Polynomial(AbstractKernel):
    r"""The kernel of polynomials: $k(x, y) = (a\, x \cdot y + c)^n$. With degree one it
    is the kernel of affine functions.
    """

    degree: int = eqx.field(static=True, converter=_degree)
    scale: AbstractParameter = eqx.field(
        default=1.0, converter=positive_field("scale", max_ndim=0)
    )
    offset: AbstractParameter = eqx.field(default=1.0, converter=_offset)

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        # A sum of products and not `jnp.dot`, which under `vmap` would become a batch
        # of tiny matrix products.
        scale, offset = value_of(self.scale), value_of(self.offset)
        return (scale * jnp.sum(x * y) + offset) ** self.degree


Polynomial.__init__.__doc__ = r"""**Arguments:**

- `degree`: $n$, a Python integer, at least 1.
- `scale`: $a$, a positive scalar.
- `offset`: $c$, a positive scalar, or `eqx_bilevel.Frozen(0.0)` for homogeneous
    polynomials.
"""


class Constant(AbstractKernel):
    """The kernel of constant functions, $k(x, y) = c$."""

    value: AbstractParameter = eqx.field(
        default=1.0, converter=positive_field("value", max_ndim=0)
    )

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        del x, y
        return jnp.asarray(value_of(self.value))


Constant.__init__.__doc__ = """**Arguments:**

- `value`: $c$, a positive scalar: the variance of the constant.
"""


@rescale.register(Polynomial)
@rescale.register(Constant)
def _(kernel: Polynomial | Constant, factor: ArrayLike) -> Polynomial | Constant:
    del factor  # They have no lengthscale.
    return kernel
