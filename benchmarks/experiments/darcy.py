"""Darcy flow: the pressure u and the log-permeability a, from noisy pressures.

Sixty measurements are all there is. The lengthscale, the mean and the variance of a and
the noise are learned. The pressure follows from the permeability, so its own prior
should say nothing: its variance is far above what pressures are, and its lengthscale
that of what the points can resolve.
"""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import value_of
from references import darcy, darcy_log_permeability


title = "Darcy flow"
square = eb.Box([0.0, 0.0], [1.0, 1.0])
noise = 1e-3


def balance(u, x):
    # -div(exp(a) grad u) = 1, divided by exp(a).
    a, u = u["a"], u["u"]
    return -u.laplacian - a.grad @ u.grad - jnp.exp(-a.value)


def prior():
    vague = eb.Scaled(eb.Gaussian(eb.Frozen(0.3)), eb.Frozen(1e4))
    return {
        "u": eb.GaussianProcess(vague),
        "a": eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.3), 1.0), mean=0.0),
    }


def stated(key, n=400, num_data=60, declared=None, nugget=None):
    keys = jax.random.split(key, 4)
    points = square.interior(num_data, key=keys[0])
    error = noise * jax.random.normal(keys[1], (num_data,))
    data = jnp.asarray(darcy(np.asarray(points))) + error
    declared = eb.Positive(noise) if declared is None else declared
    interior = square.interior(n, key=keys[2])
    edge = square.boundary(n // 4, key=keys[3])
    return [
        eb.Condition(balance, interior, nugget=nugget, name="balance"),
        eb.Condition(value_of("u"), edge, nugget=nugget, name="edge"),
        eb.Condition(value_of("u"), points, data, noise=declared, name="data"),
    ]


# Where fields are compared, and what they are there.
axis = np.linspace(0.02, 0.98, 20)
where = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
fields = {"u": darcy(where), "a": darcy_log_permeability(where)}
numbers = {}
