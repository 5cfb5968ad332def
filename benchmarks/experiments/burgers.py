"""Burgers' equation: two lengthscales, by a network."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import coarse_to_fine, Published, tensor_grid, value
from references import burgers as reference


title = "Burgers, viscosity 0.02, network"
published = Published({"u": (6.0e-5, 3.1e-4)}, 7847)

viscosity = 0.02
space_time = eb.Box([0.0, -1.0], [1.0, 1.0])
t, x = np.linspace(0, 1, 60), np.linspace(-1, 1, 60)
on_grid = tensor_grid(t, x)


class Burgers(eqx.Module):
    viscosity: jax.Array | eb.AbstractParameter

    def __call__(self, u, x):
        return u.d(0) + u.value * u.d(1) - self.viscosity * u.d(1, 1)


equation = Burgers(jnp.array(viscosity))


def start(x):
    return jnp.where(x[0] == 0, -jnp.sin(jnp.pi * x[1]), 0.0)


def stated(key, n, equation=equation):
    keys = jax.random.split(key, 3)
    faces = [(0, "lower"), (1, "lower"), (1, "upper")]
    sides = space_time.boundary(n // 3, faces=faces, key=keys[1])
    conditions = [
        eb.Condition(equation, space_time.interior(n, key=keys[0])),
        eb.Condition(value, sides, start),
    ]
    return conditions, eb.ValidationResidual(space_time.interior(n, key=keys[2]))


def kernel(key):
    return eb.Gibbs(eb.LengthscaleNetwork(2, 2, scale=0.25, key=key))


def run(key, n=900, steps=(150, 180), kernel=kernel):
    key, network_key = jax.random.split(key)
    return coarse_to_fine(
        eb.GaussianProcess(kernel(network_key)),
        lambda n: stated(key, n),
        sizes=(n // 3, n),
        steps=steps,
    )


def compare(solution, viscosity=viscosity):
    return {"u": (on_grid(solution), reference(t, x, viscosity))}
