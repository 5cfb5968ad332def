"""The nonlinear Schroedinger equation: two unknowns, periodic in space."""

import functools as ft

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import learned_from, Published, tensor_grid, values
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


def kernel():
    in_time = eb.Subspace(eb.Gaussian(0.7), 0)
    in_space = eb.Subspace(eb.Periodic(1.0, eb.Frozen(10.0)), 1)
    return in_time * in_space


def run(key, n=1500):
    keys = jax.random.split(key, 3)
    early = space_time.face(0, "lower", 2 * n // 15, key=keys[1])
    conditions = [
        eb.Condition(schroedinger, space_time.interior(n, key=keys[0])),
        eb.Condition(values, early, start),
    ]
    objective = eb.ValidationResidual(space_time.interior(n, key=keys[2]))
    prior = {name: eb.GaussianProcess(kernel()) for name in "uv"}
    return learned_from(prior, conditions, objective)


def compare(solution):
    found = on_grid(solution)
    return {name: (found[name], truth()[name]) for name in "uv"}
