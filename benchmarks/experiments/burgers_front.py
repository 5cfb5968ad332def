"""Burgers' equation with a sharp front: by continuation in the viscosity."""

import functools as ft

import burgers
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from burgers import Burgers, kernel, space_time, start
from common import by_continuation, Published, tensor_grid, value
from references import burgers as reference


title = "Burgers, viscosity 0.01 / pi, by continuation"
# The best of neural networks, relative: 2e-4 usually, 4e-5 at best.
published = Published({})

viscosity = 0.01 / np.pi
t, x = np.linspace(0, 1, 101), np.linspace(-1, 1, 257)
on_grid = tensor_grid(t, x)
faces = {(0, "lower"): 2, (1, "lower"): 4, (1, "upper"): 4}


def stated(key, viscosity, n, place):
    keys = jax.random.split(key, 3)
    interior, validation = [
        place(space_time.interior(16 * n, key=key), n) for key in keys[:2]
    ]
    sides = [
        place(space_time.face(*face, 2048, key=keys[2]), n // 3 // share)
        for face, share in faces.items()
    ]
    conditions = [
        eb.Condition(Burgers(jnp.asarray(viscosity)), interior),
        eb.Condition(value, jnp.concatenate(sides), start),
    ]
    return conditions, eb.ValidationResidual(validation)


def run(key, n=1000, viscosity=viscosity, num=8, steps=(150, 100, 40)):
    key, network_key = jax.random.split(key)
    values = np.geomspace(burgers.viscosity, viscosity, num)
    prior = eb.GaussianProcess(kernel(network_key))
    states = ft.partial(stated, key)
    return by_continuation(prior, states, values, n=n, steps=steps)


def compare(solution, viscosity=viscosity):
    return {"u": (on_grid(solution), reference(t, x, viscosity))}
