"""Burgers' equation with an unknown viscosity, from noisy data.

The viscosity is a hyperparameter here, inside of the operator. Its error bar comes from
the second derivatives of the evidence. It determines the function, whose own prior
should say nothing: as for Darcy flow, its kernel is held, with lengthscales that the
points resolve.
"""

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from burgers import Burgers, space_time, start
from common import value
from references import burgers as reference


title = "Burgers, viscosity"
noise, viscosity = 0.02, 0.1


def exact(points, viscosity):
    return np.array(
        [reference(p[:1], p[1:], viscosity)[0, 0] for p in np.asarray(points)]
    )


def prior():
    lengthscales = eb.Frozen(jnp.array([0.3, 0.2]))
    return eb.GaussianProcess(eb.Scaled(eb.Gaussian(lengthscales), eb.Frozen(1e4)))


def stated(key, n=400, num=40):
    keys = jax.random.split(key, 4)
    points = space_time.interior(num, key=keys[0])
    error = noise * jax.random.normal(keys[1], (num,))
    data = jnp.asarray(exact(points, viscosity)) + error
    faces = [(0, "lower"), (1, "lower"), (1, "upper")]
    edge = space_time.boundary(n // 4, faces=faces, key=keys[3])
    equation = Burgers(eb.Positive(0.2))
    return [
        eb.Condition(equation, space_time.interior(n, key=keys[2]), name="equation"),
        eb.Condition(value, edge, start, name="edge"),
        eb.Condition(value, points, data, noise=eb.Positive(noise), name="data"),
    ]


def read(prior, conditions):
    """The numbers that are hyperparameters."""
    return {"log_viscosity": jnp.log(conditions[0].operator.viscosity)}


def most_likely(condition):
    """By the exact solution, for the same data."""
    data = np.asarray(condition.target)
    misfit = lambda log: np.sum((exact(condition.points, np.exp(log)) - data) ** 2)
    found = scipy.optimize.minimize_scalar(misfit, bounds=(-4, -1), method="bounded")
    return {"log_viscosity": float(found.x)}


where = np.random.default_rng(0).uniform(size=(200, 2)) * [1, 2] - [0, 1]
fields = {"u": exact(where, viscosity)}
numbers = {"log_viscosity": np.log(viscosity)}
