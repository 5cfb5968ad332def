"""Darcy flow: the pressure u and the log-permeability a, from noisy pressures.

Sixty measurements of the pressure are all there is. Both functions' scales, the mean
log-permeability and the noise are learned with the evidence.
"""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import learned_from, Published, tensor_grid
from references import darcy, darcy_log_permeability


title = "Darcy flow"
published = Published({})

square = eb.Box([0.0, 0.0], [1.0, 1.0])
axis = np.linspace(0.02, 0.98, 25)
on_grid = tensor_grid(axis, axis)
noise = 1e-3


def balance(u, x):
    # -div(exp(a) grad u) = 1, divided by exp(a).
    a, u = u["a"], u["u"]
    return -u.laplacian - a.grad @ u.grad - jnp.exp(-a.value)


def pressure(u, x):
    return u["u"].value


def measured(key, n=60):
    keys = jax.random.split(key)
    points = square.interior(n, key=keys[0])
    error = noise * jax.random.normal(keys[1], (n,))
    return points, jnp.asarray(darcy(np.asarray(points))) + error


def stated(key, n, declared, nugget=None):
    keys = jax.random.split(key, 3)
    points, data = measured(keys[0])
    interior = square.interior(n, key=keys[1])
    edge = square.boundary(n // 4, key=keys[2])
    return [
        eb.Condition(balance, interior, nugget=nugget, name="balance"),
        eb.Condition(pressure, edge, nugget=nugget, name="edge"),
        eb.Condition(pressure, points, data, noise=declared, name="data"),
    ]


def prior():
    return {
        "u": eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.5), 1e-3)),
        "a": eb.GaussianProcess(
            eb.Scaled(eb.Gaussian(0.5), 1.0), eb.Unconstrained(0.0)
        ),
    }


def run(key, n=400):
    conditions = stated(key, n, eb.Positive(noise))
    return learned_from(prior(), conditions, eb.NegativeLogEvidence())


def compare(solution):
    found = on_grid(solution)
    truth = {
        "u": on_grid(lambda x: jnp.asarray(darcy(np.asarray(x)))),
        "a": on_grid(lambda x: jnp.asarray(darcy_log_permeability(np.asarray(x)))),
    }
    return {name: (found[name], truth[name]) for name in truth}
