"""Burgers' equation with a deep kernel: a Gaussian one of points moved by a network."""

import functools as ft

import burgers
import equinox as eqx
import eqx_bilevel as eb
import jax.numpy as jnp


title = "Burgers, viscosity 0.02, deep kernel (published: network)"
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


run = ft.partial(burgers.run, kernel=kernel)
