"""The heat equation with an unknown diffusion coefficient, from noisy temperatures.

The logarithm of the coefficient is an unknown of the inner problem: a function with a
constant kernel, which is a number with a normal prior.
"""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from common import value_of


title = "Heat equation, diffusion coefficient"
box = eb.Box([0.0, 0.0], [1.0, 1.0])  # (t, x)
noise, diffusion = 0.02, 0.1


def exact(t, x, diffusion):
    def mode(k):
        return np.exp(-diffusion * (k * np.pi) ** 2 * t) * np.sin(k * np.pi * x)

    return mode(1) + 0.5 * mode(3)


def heat(u, x):
    return u["u"].d(0) - jnp.exp(u["log_diffusion"].value) * u["u"].d(1, 1)


def start(x):
    begin = jnp.sin(jnp.pi * x[1]) + 0.5 * jnp.sin(3 * jnp.pi * x[1])
    return jnp.where(x[0] == 0, begin, 0.0)


def prior():
    # The coefficient lies between 0.003 and 20 with a probability of 0.95.
    log_diffusion = eb.GaussianProcess(eb.Constant(eb.Frozen(5.0)), eb.Frozen(-1.4))
    return {
        "u": eb.GaussianProcess(eb.Scaled(eb.Gaussian([0.5, 0.5]), 1.0)),
        "log_diffusion": log_diffusion,
    }


def measured(key, num=40):
    keys = jax.random.split(key)
    points = box.interior(num, key=keys[0])
    error = noise * jax.random.normal(keys[1], (num,))
    return points, jnp.asarray(exact(*np.asarray(points).T, diffusion)) + error


def stated(key, n=200):
    keys = jax.random.split(key, 3)
    points, data = measured(keys[0])
    faces = [(0, "lower"), (1, "lower"), (1, "upper")]
    edge = box.boundary(n // 4, faces=faces, key=keys[2])
    return [
        eb.Condition(heat, box.interior(n, key=keys[1]), name="heat"),
        eb.Condition(value_of("u"), edge, start, name="edge"),
        eb.Condition(
            value_of("u"), points, data, noise=eb.Positive(noise), name="data"
        ),
    ]


def most_likely(condition):
    """By the exact solution, for the same data."""
    (t, x), data = np.asarray(condition.points).T, np.asarray(condition.target)
    misfit = lambda log: np.sum((exact(t, x, np.exp(log)) - data) ** 2)
    found = scipy.optimize.minimize_scalar(misfit, bounds=(-6, 3), method="bounded")
    return {"log_diffusion": float(found.x)}


where = np.random.default_rng(0).uniform(size=(400, 2))
fields = {"u": exact(*where.T, diffusion)}
numbers = {"log_diffusion": np.log(diffusion)}
