"""The Gray-Scott reaction-diffusion system: two unknowns, Neumann conditions."""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import learned_from, Published, tensor_grid, values
from references import gray_scott as reference, gray_scott_starts


title = "Gray-Scott"
# Against an exact reference, see gray_scott in references.py.
published = Published({"u": (1.1e-5, 7.2e-5), "v": (2.5e-5, 1.6e-4)}, 151)

space_time = eb.Box([0.0, 0.0], [1.0, 1.0])
t, x = np.linspace(0, 1, 101), np.linspace(0, 1, 201)
on_grid = tensor_grid(t, x)


def gray_scott(w, x):
    u, v = w["u"], w["v"]
    reaction = u.value * v.value**2
    return [
        u.d(0) - 1e-3 * u.d(1, 1) + reaction - 0.04 * (1 - u.value),
        v.d(0) - 2e-3 * v.d(1, 1) - reaction + 0.1 * v.value,
    ]


def slopes(w, x):
    return {name: each.d(1) for name, each in w.items()}


def start(x):
    return {"u": -jnp.cos(3 * jnp.pi * x[1]), "v": jnp.cos(2 * jnp.pi * x[1])}


prior = {name: eb.GaussianProcess(eb.Gaussian([0.7, 0.7])) for name in "uv"}


def stated(key, n, start):
    keys = jax.random.split(key, 4)
    early = space_time.face(0, "lower", 2 * n // 9, key=keys[1])
    walls = [(1, "lower"), (1, "upper")]
    sides = space_time.boundary(4 * n // 9, faces=walls, key=keys[2])
    conditions = [
        eb.Condition(gray_scott, space_time.interior(n, key=keys[0])),
        eb.Condition(values, early, start),
        eb.Condition(slopes, sides),
    ]
    return conditions, eb.ValidationResidual(space_time.interior(n, key=keys[3]))


def run(key, n=600):
    return learned_from(prior, *stated(key, n, start))


def compare(solution):
    found, truth = on_grid(solution), reference(t, x, *gray_scott_starts["main"])
    return {name: (found[name], known) for name, known in zip("uv", truth)}
