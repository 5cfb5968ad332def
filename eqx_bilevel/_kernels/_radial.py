import fractions
import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._parameters import AbstractParameter, value_of
from ._base import AbstractRadialKernel, smoothness
from ._fields import positive_field


class Gaussian(AbstractRadialKernel):
    r"""The Gaussian kernel, also known as squared exponential or radial basis function:
    $k(x, y) = \exp(-s/2)$ with $s = \sum_d (x_d - y_d)^2 / \ell_d^2$.

    Some authors leave out the factor $1/2$. Their lengthscale is $\sqrt{2}$ times the
    one here.
    """

    lengthscale: AbstractParameter = eqx.field(
        converter=positive_field("lengthscale", max_ndim=1)
    )

    def profile(self, s: Float[Array, ""], order: int) -> tuple[Float[Array, ""], ...]:
        value = jnp.exp(-0.5 * s)
        return tuple((-0.5) ** m * value for m in range(order + 1))


Gaussian.__init__.__doc__ = r"""**Arguments:**

- `lengthscale`: $\ell$, a positive scalar, or an array with one entry for each
    dimension. A number or an array becomes a [`eqx_bilevel.Positive`][] parameter,
    which is learned.
"""


class RationalQuadratic(AbstractRadialKernel):
    r"""The rational quadratic kernel: $k(x, y) = (1 + s / (2 \alpha))^{-\alpha}$ with
    $s = \sum_d (x_d - y_d)^2 / \ell_d^2$.

    It is a mixture of Gaussian kernels with different lengthscales, and tends to
    [`eqx_bilevel.Gaussian`][] as $\alpha$ grows.
    """

    lengthscale: AbstractParameter = eqx.field(
        converter=positive_field("lengthscale", max_ndim=1)
    )
    alpha: AbstractParameter = eqx.field(
        default=1.0, converter=positive_field("alpha", max_ndim=0)
    )

    def profile(self, s: Float[Array, ""], order: int) -> tuple[Float[Array, ""], ...]:
        alpha = value_of(self.alpha)
        ratio = 0.5 * s / alpha
        # `log1p`, since a power would lose the digits of `ratio` for large `alpha`.
        terms = [jnp.exp(-alpha * jnp.log1p(ratio))]
        for m in range(order):
            terms.append(-0.5 * (1 + m / alpha) / (1 + ratio) * terms[-1])
        return tuple(terms)


RationalQuadratic.__init__.__doc__ = r"""**Arguments:**

- `lengthscale`: $\ell$, a positive scalar, or an array with one entry for each
    dimension.
- `alpha`: $\alpha$, a positive scalar.
"""


def _half_integer(nu: float | int) -> float:
    if not (nu > 0 and float(nu - 0.5).is_integer()):
        raise ValueError(
            "`nu` must be half an odd integer, that is one of 0.5, 1.5, 2.5, ...; got "
            f"{nu}."
        )
    return float(nu)


class Matern(AbstractRadialKernel):
    r"""The Matérn kernel of half-integer order $\nu = p + 1/2$:

    $$
    k(x, y) = \frac{2^{1 - \nu}}{\Gamma(\nu)} u^\nu K_\nu(u), \qquad
    u^2 = 2 \nu \sum_d (x_d - y_d)^2 / \ell_d^2,
    $$

    with the modified Bessel function $K_\nu$, which for these orders is an exponential
    times a polynomial. Functions with this prior have $p$ derivatives: an equation of
    second order needs $\nu \geq 5/2$.
    """

    lengthscale: AbstractParameter = eqx.field(
        converter=positive_field("lengthscale", max_ndim=1)
    )
    nu: float = eqx.field(default=2.5, static=True, converter=_half_integer)

    def profile(self, s: Float[Array, ""], order: int) -> tuple[Float[Array, ""], ...]:
        p = _whole(self.nu)
        return tuple(_matern(s, p, m) for m in range(order + 1))


Matern.__init__.__doc__ = r"""**Arguments:**

- `lengthscale`: $\ell$, a positive scalar, or an array with one entry for each
    dimension.
- `nu`: the order $\nu$, one of $0.5, 1.5, 2.5, \dots$, as a Python number: it is not
    learned.
"""


@smoothness.register(Matern)
def _(kernel: Matern) -> int:
    return _whole(kernel.nu)


def _whole(nu: float) -> int:
    return round(nu - 0.5)


# The m-th derivative of the profile of order nu = p + 1/2 with respect to s.
#
# With u = sqrt(2 nu s), d/ds is (nu/u) d/du, and (1/u) d/du [u^a K_a(u)] is
# -u^(a-1) K_(a-1)(u). So every derivative lowers a by one and multiplies by -nu:
#
#     phi^(m)(s) = c (-nu)^m u^(nu-m) K_(nu-m)(u)
#
# For q = j + 1/2 > 0, u^q K_q(u) = sqrt(pi/2) exp(-u) theta_j(u) with the reverse
# Bessel polynomial theta_j, and K_(-q) = K_q gives u^(-q) K_(-q) = u^(-2q) u^q K_q.
# The constant c is such that phi(0) = 1, and theta_p(0) = (2p-1)!!.
#
# The derivative is a rule and not left to automatic differentiation, which at s = 0
# would meet the square root. It also means that `__call__` can be differentiated at
# x == y, as often as the kernel has derivatives.
@ft.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _matern(s, p, m):
    nu = p + 0.5
    u = jnp.sqrt(2 * nu * s)
    info = jnp.finfo(u.dtype)
    # exp(-u) is zero long before this. Here it keeps powers of u finite, since zero
    # times infinity is not a number.
    u = jnp.minimum(u, -1.25 * math.log(info.tiny))
    if m <= p:
        coefficients = _reverse_bessel(p - m)
        power = 1.0
    else:
        # Singular at zero. The floor is so small that no two different points are as
        # close, and so large that the negative powers do not overflow.
        u = jnp.maximum(u, float(info.tiny) ** (1 / 16))
        coefficients = _reverse_bessel(m - p - 1)
        power = u ** (2 * (p - m) + 1)
    leading = (-fractions.Fraction(2 * p + 1, 2)) ** m / _reverse_bessel(p)[-1]
    total = 0.0
    for c in coefficients:
        total = total * u + float(leading * c)
    return jnp.exp(-u) * total * power


@_matern.defjvp
def _matern_jvp(p, m, primals, tangents):
    (s,) = primals
    (s_dot,) = tangents
    return _matern(s, p, m), _matern(s, p, m + 1) * s_dot


# Coefficients of theta_n, those of high powers first, as exact numbers.
def _reverse_bessel(n: int) -> list[fractions.Fraction]:
    f = math.factorial
    return [fractions.Fraction(f(n + k), f(n - k) * f(k) * 2**k) for k in range(n + 1)]
