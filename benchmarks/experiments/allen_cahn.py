"""The Allen-Cahn equation, periodic in space, with sharp layers that form with time.

The kernel is one of features: a network of the time and of a circle, so that all of it
is periodic.
"""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import coarse_to_fine, Published, tensor_grid, value
from references import allen_cahn as reference


title = "Allen-Cahn"
published = Published({})

space_time = eb.Box([0.0, -1.0], [1.0, 1.0])
t, x = np.linspace(0, 1, 101), np.linspace(-1, 1, 256, endpoint=False)
on_grid = tensor_grid(t, x)
truth = reference(t, x)


def allen_cahn(u, x):
    return u.d(0) - 1e-4 * u.d(1, 1) - 5 * u.value + 5 * u.value**3


def start(x):
    return x[1] ** 2 * jnp.cos(jnp.pi * x[1])


def stated(key, n):
    keys = jax.random.split(key, 3)
    early = space_time.face(0, "lower", n // 5, key=keys[1])
    conditions = [
        eb.Condition(allen_cahn, space_time.interior(n, key=keys[0])),
        eb.Condition(value, early, start),
    ]
    return conditions, eb.ValidationResidual(space_time.interior(n, key=keys[2]))
