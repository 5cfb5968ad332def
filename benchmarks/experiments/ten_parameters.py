"""The elliptic equation with a sum of four kernels, and learned nuggets.

The last kernel is a user's own: an exponential, which is too rough for the Laplacian,
with its distance smoothed by a learned length.
"""

import elliptic
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from common import learned_from, Published


title = "Elliptic, ten parameters and nuggets"
published = Published({"u": (None, None)})
compare = elliptic.compare


class SmoothedExponential(eb.AbstractKernel):
    log_lengthscale: jax.Array
    log_smoothing: jax.Array

    def __call__(self, x, y):
        smoothing = jnp.exp(self.log_smoothing)
        distance = jnp.sqrt(jnp.sum((x - y) ** 2) + smoothing**2)
        return jnp.exp(-0.5 * distance / jnp.exp(2 * self.log_lengthscale))


def run(key, n=900):
    kernel = (
        eb.Scaled(eb.Polynomial(1), 1.0)
        + eb.Scaled(eb.Polynomial(1), 1.0)
        + eb.Scaled(eb.Gaussian(1.0), 1.0)
        + eb.Scaled(SmoothedExponential(jnp.log(1.0), jnp.log(0.1)), 1.0)
    )
    conditions, objective = elliptic.stated(key, n, nugget=eb.Positive(1e-12))
    return learned_from(eb.GaussianProcess(kernel), conditions, objective)
