"""The nonlinear Schroedinger equation: two unknowns, periodic in space, that focus.

Circles are mapped to circles by Moebius transformations. One of them, whose strength is
learned, moves points away from the middle, where waves are short. So the kernel is
periodic as before.
"""

import functools as ft

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import (
    learned_from,
    place_by,
    place_most,
    Published,
    tensor_grid,
    values,
)
from references import schroedinger as reference


title = "Schroedinger"
published = Published({"u": (6.70e-3, None), "v": (7.15e-3, None)}, 11176)

space_time = eb.Box([0.0, -5.0], [1.0, 5.0])
t, x = np.linspace(0, 1, 101), np.linspace(-5, 5, 128, endpoint=False)
on_grid = tensor_grid(t, x)
truth = ft.cache(lambda: dict(zip("uv", reference(t, x))))


def schroedinger(h, x):
    u, v = h["u"], h["v"]
    square = u.value**2 + v.value**2
    return [
        u.d(0) + 0.5 * v.d(1, 1) + square * v.value,
        v.d(0) - 0.5 * u.d(1, 1) - square * u.value,
    ]


def start(x):
    return {"u": 2 / jnp.cosh(x[1]), "v": 0.0}


class Focus(eqx.Module):
    strength: eb.AbstractParameter

    def __call__(self, x):
        angle = jnp.pi * x[1] / 10  # half of that on the circle
        c, s = jnp.cos(angle), self.strength * jnp.sin(angle)
        return jnp.stack([x[0], *jnp.array([c**2 - s**2, 2 * c * s]) / (c**2 + s**2)])


def kernel():
    return eb.Warped(eb.Gaussian([0.2, 0.2, 0.2]), Focus(eb.Positive(3.0)))


def mostly_early(points):
    # The initial values have a kink where the ends of the circle meet, and it sends out
    # waves of all lengths.
    return points.at[:, 0].power(3)


def run(key, n=1500):
    keys = jax.random.split(key, 3)
    by_kernel = ft.partial(place_by, kernel())
    place = ft.partial(place_most, by_kernel, spread=mostly_early)
    interior, validation = [
        place(space_time.interior(16 * n, key=key), n) for key in keys[:2]
    ]
    early = place(space_time.face(0, "lower", 2048, key=keys[2]), 2 * n // 15)
    conditions = [
        eb.Condition(schroedinger, interior),
        eb.Condition(values, early, start),
    ]
    objective = eb.ValidationResidual(validation)
    prior = {name: eb.GaussianProcess(kernel()) for name in "uv"}
    return learned_from(prior, conditions, objective)


def compare(solution):
    found = on_grid(solution)
    return {name: (found[name], truth()[name]) for name in "uv"}
