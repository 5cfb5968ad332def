"""Predictions at points without conditions, from the functionals around each."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._gram import Block, covariance
from ._factor import Prior
from ._ordering import num_in_ball
from ._regression import regression


# Functionals of one kind that a prediction is made from, at most.
_MOST = 200
# Points at which predictions are made at once.
_AT_ONCE = 32


class Prediction(eqx.Module):
    # Of `q` functionals at each of some points, with `p` others: x = W^T x_p, up to a
    # covariance.
    index: Int[Array, "n p"]
    weights: Float[Array, "n p q"]
    covariance: Float[Array, "n q q"]

    def apply(self, vector: Float[Array, " f"]) -> Float[Array, "n q"]:
        return jnp.einsum("npq,np->nq", self.weights, vector[self.index])

    def apply_transposed(
        self, given: Float[Array, "n q"], size: int
    ) -> Float[Array, " f"]:
        add = jnp.einsum("npq,nq->np", self.weights, given)
        return jnp.zeros(size, add.dtype).at[self.index].add(add)


def predict(prior: Prior, rho: tuple[float, float], block: Block) -> Prediction:
    # From about as many functionals as a factor with these radii has parents.
    functionals, num = prior.functionals, block.at_each

    def joint(part: Block):
        # Of the functionals around one point, and then those at it.
        part = jax.tree.map(lambda x: x[None], part)
        x = part.points[0]
        values = _nearest(functionals.values.points, x, rho[0])
        others = _nearest(functionals.others.points, x, rho[1])
        inner = prior.matrix(values, others)
        across = covariance(prior.kernels, functionals.at(values, others), [part])
        own = covariance(prior.kernels, [part], [part])
        own = own + prior.nugget * jnp.diag(jnp.diagonal(own))
        index = jnp.concatenate([values, others + len(functionals.values.points)])
        return index, jnp.block([[inner, across], [across.T, own]])

    def one(matrix):
        weights, root = regression(matrix, jnp.zeros(len(matrix), bool), num)
        return weights, root @ root.T

    @jax.checkpoint
    def several(chosen):
        # Matrices at once, since one alone takes many small operations; and what is
        # done with them one by one, since batches of triangular solves can hang.
        parts = jax.tree.map(lambda x: x[chosen], block)
        index, matrices = jax.vmap(joint)(parts)
        return index, *jax.lax.map(one, matrices)

    # The last ones are filled up with copies of the last.
    n = len(block.points)
    size = min(n, _AT_ONCE)
    chosen = jnp.minimum(jnp.arange(-(-n // size) * size), n - 1).reshape(-1, size)
    parts = jax.lax.map(several, chosen)
    return Prediction(*(x.reshape(-1, *x.shape[2:])[:n] for x in parts))


def _nearest(
    points: Float[Array, "n d"], x: Float[Array, " d"], rho: float
) -> Int[Array, " k"]:
    # As many as there are within so many spacings on a regular grid.
    n, dim = points.shape
    num = min(math.ceil(num_in_ball(dim, rho)), _MOST, n)
    distance = jax.lax.stop_gradient(jnp.sum((points - x[None]) ** 2, axis=1))
    # In single precision XLA on CPUs selects, and in double precision it sorts all of
    # them, which takes fifty times longer.
    return jax.lax.top_k(-distance.astype(jnp.float32), num)[1]


def of_unknown(block: Block, name: str) -> Block:
    # What a block has of one unknown.
    chosen = [i for i, (unknown, _) in enumerate(block.jets) if unknown == name]
    coefficients = block.coefficients
    if coefficients is None:
        identity = jnp.eye(len(block.jets), dtype=block.points.dtype)
        shape = (len(block.points), *identity.shape)
        coefficients = jnp.broadcast_to(identity, shape)
    sides = None if block.sides is None else {name: block.sides[name]}
    jets = tuple(block.jets[i] for i in chosen)
    return Block(block.points, coefficients[:, :, jnp.array(chosen)], jets, sides)
