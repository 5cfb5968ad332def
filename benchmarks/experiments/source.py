"""Poisson's equation with an unknown source f, from noisy values of u."""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import value_of


title = "Poisson's equation, source"
square = eb.Box([0.0, 0.0], [1.0, 1.0])
noise = 1e-3


def exact(x):
    # Of u; its source is next.
    bumps = np.sin(np.pi * x).prod(axis=1)
    waves = np.sin(2 * np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1])
    return 0.1 * bumps + 0.05 * waves


def exact_source(x):
    bumps = np.sin(np.pi * x).prod(axis=1)
    waves = np.sin(2 * np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1])
    return np.pi**2 * (0.2 * bumps + 0.25 * waves)


def poisson(u, x):
    return -u["u"].laplacian - u["f"].value


def prior():
    kernel = lambda variance: eb.Scaled(eb.Gaussian(0.5), variance)
    return {
        "u": eb.GaussianProcess(kernel(0.01)),
        "f": eb.GaussianProcess(kernel(1.0)),
    }


def stated(key, n=200, num=60):
    keys = jax.random.split(key, 4)
    points = square.interior(num, key=keys[0])
    error = noise * jax.random.normal(keys[1], (num,))
    data = jnp.asarray(exact(np.asarray(points))) + error
    edge = square.boundary(n // 4, key=keys[3])
    return [
        eb.Condition(poisson, square.interior(n, key=keys[2]), name="poisson"),
        eb.Condition(value_of("u"), edge, name="edge"),
        eb.Condition(
            value_of("u"), points, data, noise=eb.Positive(noise), name="data"
        ),
    ]


where = np.random.default_rng(0).uniform(0.02, 0.98, size=(400, 2))
fields = {"u": exact(where), "f": exact_source(where)}
numbers = {}
