"""A nonlinear elliptic equation: one lengthscale."""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import learned_from, Published, tensor_grid, value


title = "Elliptic, one lengthscale"
published = Published({"u": (None, 4.2e-5)}, 258)

square = eb.Box([0.0, 0.0], [1.0, 1.0])
on_grid = tensor_grid(np.linspace(0, 1, 60), np.linspace(0, 1, 60))


def elliptic(u, x):
    return -u.laplacian + u.value**3


def exact(x):
    return jnp.sin(jnp.pi * x).prod() + 4 * jnp.sin(4 * jnp.pi * x).prod()


def source(x):
    return -jnp.trace(jax.hessian(exact)(x)) + exact(x) ** 3


def stated(key, n, equation=elliptic, source=source, **nuggets):
    keys = jax.random.split(key, 3)
    conditions = [
        eb.Condition(equation, square.interior(n, key=keys[0]), source, **nuggets),
        eb.Condition(value, square.boundary(n // 3, key=keys[1]), **nuggets),
    ]
    return conditions, eb.ValidationResidual(square.interior(n, key=keys[2]))


def run(key, n=900, **nuggets):
    prior = eb.GaussianProcess(eb.Gaussian(1.0))
    return learned_from(prior, *stated(key, n, **nuggets))


def compare(solution):
    return {"u": (on_grid(solution), on_grid(jax.vmap(exact)))}
