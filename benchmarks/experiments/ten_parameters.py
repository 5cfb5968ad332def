"""The elliptic equation with a sum of four kernels, and learned nuggets.

The last kernel is a user's own: an exponential, which is too rough for the Laplacian,
with its distance smoothed by a learned length.
"""

import elliptic
import eqx_bilevel as eb
import jax.numpy as jnp
from common import learned_from, Published


title = "Elliptic, ten parameters and nuggets"
published = Published({})
compare = elliptic.compare


class SmoothedExponential(eb.AbstractKernel):
    smoothing: eb.Positive

    def __call__(self, x, y):
        return jnp.exp(-0.5 * jnp.sqrt(jnp.sum((x - y) ** 2) + self.smoothing**2))


def run(key, n=900):
    kernel = (
        eb.Scaled(eb.Polynomial(1, scale=eb.Frozen(1.0)), 1.0)
        + eb.Scaled(eb.Polynomial(1), 1.0)
        + eb.Scaled(eb.Gaussian(1.0), 1.0)
        # What is rough is little: from a weight of one, learning ends where it is not.
        + eb.Scaled(eb.Stretched(SmoothedExponential(eb.Positive(0.1)), 1.0), 1e-4)
    )
    conditions, objective = elliptic.stated(key, n, nugget=eb.Positive(1e-12))
    return learned_from(eb.GaussianProcess(kernel), conditions, objective)
