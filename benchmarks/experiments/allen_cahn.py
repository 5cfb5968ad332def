"""The Allen-Cahn equation, whose layers get sharp: by continuation in the strength of
its reaction.

Solutions are even and periodic in x, so that half of the domain is enough: there are no
slopes at its ends.
"""

import functools as ft

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import by_continuation, place_most, Published, tensor_grid, value
from references import allen_cahn as reference


title = "Allen-Cahn, by continuation"
# Relative errors of neural networks: 2e-5 and 3.5e-6 at best.
published = Published({})

strength = 5.0
half = eb.Box([0.0, 0.0], [1.0, 1.0])
t, x = np.linspace(0, 1, 101), np.linspace(0, 1, 129)
on_grid = tensor_grid(t, x)


class AllenCahn(eqx.Module):
    strength: jax.Array

    def __call__(self, u, x):
        reaction = u.value - u.value**3
        return u.d(0) - 1e-4 * u.d(1, 1) - self.strength * reaction


def slope(u, x):
    return u.d(1)


def start(x):
    return x[1] ** 2 * jnp.cos(jnp.pi * x[1])


def stated(key, strength, n, place):
    keys = jax.random.split(key, 4)
    interior, validation = [
        place_most(place, half.interior(16 * n, key=key), n) for key in keys[:2]
    ]
    early = place(half.face(0, "lower", 2048, key=keys[2]), n // 6)
    ends = [
        place(half.face(1, side, 2048, key=keys[3]), n // 12)
        for side in ("lower", "upper")
    ]
    conditions = [
        eb.Condition(AllenCahn(jnp.asarray(strength)), interior),
        eb.Condition(value, early, start),
        eb.Condition(slope, jnp.concatenate(ends)),
    ]
    return conditions, eb.ValidationResidual(validation)


def run(key, n=900, num=7, steps=(150, 200, 100)):
    key, network_key = jax.random.split(key)
    values = np.linspace(1.0, strength, num)
    kernel = eb.Gibbs(eb.LengthscaleNetwork(2, 2, scale=0.25, key=network_key))
    prior = eb.GaussianProcess(kernel)
    states = ft.partial(stated, key)
    return by_continuation(prior, states, values, n=n, steps=steps, enough=1e-5)


def compare(solution):
    return {"u": (on_grid(solution), reference(t, x))}
