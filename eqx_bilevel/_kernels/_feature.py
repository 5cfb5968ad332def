from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._parameters import AbstractParameter, unwrap, value_of
from ._base import (
    AbstractFeatureKernel,
    AbstractKernel,
    as_kernel,
    rescale,
    smoothness,
)
from ._fields import common_factor, multiply_parameter, positive_field, replace
from ._network import LengthscaleNetwork


def _lengthscale_function(lengthscale: Any) -> Any:
    if not callable(unwrap(lengthscale)):
        raise ValueError(
            "`lengthscale` of `Gibbs` must be a function of the point, such as a "
            f"`LengthscaleNetwork`; got {lengthscale!r}. For a constant lengthscale, "
            "use `Gaussian`."
        )
    return lengthscale


class Gibbs(AbstractFeatureKernel):
    r"""The Gibbs kernel: a Gaussian kernel whose lengthscale $\ell(x)$ varies from
    point to point:

    $$
    k(x, y) = \prod_d \sqrt{\frac{2 \ell_d(x) \ell_d(y)}{\ell_d(x)^2 + \ell_d(y)^2}}
    \exp\left(-\frac{(x_d - y_d)^2}{\ell_d(x)^2 + \ell_d(y)^2}\right).
    $$

    It is positive definite for any positive function $\ell$, and equals
    [`eqx_bilevel.Gaussian`][] if that is constant. If the same lengthscale serves for
    all dimensions then the product is over equal factors, so that the square root
    appears to the power $d$.

    ??? cite "References"

        M. N. Gibbs, *Bayesian Gaussian processes for regression and classification*,
        PhD thesis, University of Cambridge (1997). C. J. Paciorek and M. J. Schervish,
        *Nonstationary covariance functions for Gaussian process regression*, NeurIPS
        (2003).
    """

    lengthscale: Callable[[Array], Array] | AbstractParameter = eqx.field(
        converter=_lengthscale_function
    )

    # All that one point contributes is done here, once for each point and not for each
    # pair.
    def features(
        self, x: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, "..."], Float[Array, ""]]:
        length = jnp.asarray(unwrap(self.lengthscale)(x))
        if length.shape not in ((), x.shape):
            raise ValueError(
                f"`lengthscale` of `Gibbs` returned an array of shape {length.shape} "
                f"for a point of shape {x.shape}. It must return a scalar, or one "
                "number for each dimension."
            )
        # A scalar counts once per dimension.
        logarithms = jnp.broadcast_to(0.5 * jnp.log(length), x.shape)
        return x, length * length, jnp.sum(logarithms)

    def pair(self, f: PyTree[Array], g: PyTree[Array]) -> Float[Array, ""]:
        (x, square_x, log_x), (y, square_y, log_y) = f, g
        squares = square_x + square_y
        # Everything in the exponent: so derivatives are cheap.
        factors = jnp.sum(0.5 * jnp.log(0.5 * squares))
        if jnp.ndim(squares) == 0:
            factors = factors * x.size
        return jnp.exp(log_x + log_y - factors - jnp.sum((x - y) ** 2 / squares))


Gibbs.__init__.__doc__ = r"""**Arguments:**

- `lengthscale`: the function $\ell$, any callable: most often an Equinox module such as
    [`eqx_bilevel.LengthscaleNetwork`][], whose arrays are then learned. It takes a
    point of shape `(d,)` and returns positive numbers, either a scalar or an array of
    shape `(d,)`.
"""


def _warp_function(warp: Any) -> Any:
    if not callable(unwrap(warp)):
        raise ValueError(f"`warp` must be a function of the point; got {warp!r}.")
    return warp


class Warped(AbstractFeatureKernel):
    """A kernel of transformed points: `kernel(warp(x), warp(y))`. With a network as
    the warp it is a deep kernel.

    ??? cite "Reference"

        A. G. Wilson, Z. Hu, R. Salakhutdinov and E. P. Xing, *Deep kernel learning*,
        [arXiv:1511.02222](https://arxiv.org/abs/1511.02222).
    """

    kernel: AbstractKernel | AbstractParameter = eqx.field(converter=as_kernel)
    warp: Callable[[Array], Array] | AbstractParameter = eqx.field(
        converter=_warp_function
    )

    def features(self, x: Float[Array, " d"]) -> PyTree[Array]:
        z = jnp.asarray(unwrap(self.warp)(x))
        if z.ndim != 1:
            raise ValueError(
                "`warp` of `Warped` must return a point, that is an array with one "
                f"axis; got shape {z.shape}."
            )
        kernel = value_of(self.kernel)
        if isinstance(kernel, AbstractFeatureKernel):
            return kernel.features(z)
        return z

    def pair(self, f: PyTree[Array], g: PyTree[Array]) -> Float[Array, ""]:
        kernel = value_of(self.kernel)
        if isinstance(kernel, AbstractFeatureKernel):
            return kernel.pair(f, g)
        return kernel(f, g)


Warped.__init__.__doc__ = """**Arguments:**

- `kernel`: any kernel.
- `warp`: any callable, most often an Equinox module. It takes a point of shape `(d,)`
    and returns a point of any dimension.
"""


@smoothness.register(Warped)
def _(kernel: Warped) -> int | float:
    return smoothness(kernel.kernel)


@rescale.register(Warped)
def _(kernel: Warped, factor: ArrayLike) -> Warped:
    # The dimensions of the warped points are others.
    return Warped(rescale(kernel.kernel, common_factor(factor)), kernel.warp)


# The factor is learned along with the function's own parameters. Were it frozen,
# gradients with respect to the factor given to `rescale` would silently be zero.
class _Rescaled(eqx.Module):
    fn: Callable[[Array], Array]
    factor: AbstractParameter = eqx.field(converter=positive_field("factor", 1))

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, "..."]:
        length = jnp.asarray(unwrap(self.fn)(x))
        return length * jnp.asarray(value_of(self.factor), length.dtype)


@rescale.register(Gibbs)
def _(kernel: Gibbs, factor: ArrayLike) -> Gibbs:
    fn = kernel.lengthscale
    if isinstance(fn, AbstractParameter):
        return kernel  # Frozen.
    if isinstance(fn, LengthscaleNetwork):
        new = replace(fn, "scale", multiply_parameter(fn.scale, factor))
    elif isinstance(fn, _Rescaled):
        new = replace(fn, "factor", multiply_parameter(fn.factor, factor))
    else:
        factor = jnp.asarray(factor)
        if factor.ndim == 1 and jax.eval_shape(unwrap(fn), factor).ndim == 0:
            factor = common_factor(factor)
        new = _Rescaled(fn, factor)
    return Gibbs(new)
