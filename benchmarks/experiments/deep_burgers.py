"""Burgers' equation with a deep kernel: a Gaussian one of points moved by a network."""

import burgers
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from common import coarse_to_fine


title = "Burgers, viscosity 0.02, deep kernel"
published = burgers.published
compare = burgers.compare


class Displacement(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, 2, 50, 2, activation=jnp.tanh, key=key)

    def __call__(self, x):
        return x + self.mlp(x)


def kernel(key):
    return eb.Warped(eb.Gaussian([0.3, 0.3]), Displacement(key))


def run(key, n=900):
    key, network_key = jax.random.split(key)
    return coarse_to_fine(
        eb.GaussianProcess(kernel(network_key)),
        lambda n: burgers.stated(key, n),
        sizes=(n // 3, n),
        steps=(300, 100),
    )
