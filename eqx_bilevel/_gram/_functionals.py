"""Linear functionals of Gaussian processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jets import Index
from .._kernels import AbstractKernel
from ._pairs import one_sided


Kernels = Mapping[str, AbstractKernel]  # by unknown; unknowns are independent
Jets = tuple[tuple[str, Index], ...]  # derivatives of unknowns


class Block(eqx.Module):
    # `q` functionals at each of `n` points, each a combination of the same `p` entries
    # of the unknowns' jets there. Functionals are counted point by point.
    # Without coefficients they are those entries themselves.
    # Of as many points in a row as `sum_over` says, they are added up.
    points: Float[Array, "n d"]
    coefficients: Float[Array, "n q p"] | None
    jets: Jets = eqx.field(static=True)
    # What `one_sides` gives for these points, and for these jets or more. Default: it
    # is computed wherever it is needed.
    sides: dict[str, Any] | None = None
    sum_over: int = eqx.field(static=True, default=1)

    @property
    def size(self) -> int:
        return self.points.shape[0] // self.sum_over * self.at_each

    @property
    def at_each(self) -> int:
        c = self.coefficients
        return len(self.jets) if c is None else c.shape[1]


def one_by_one(blocks: Sequence[Block]) -> Block:
    # One block of them all, with one functional at each point.
    jets = tuple(dict.fromkeys(jet for block in blocks for jet in block.jets))
    points, coefficients = [], []
    for block in blocks:
        given = block.coefficients
        assert given is not None and block.sum_over == 1
        n, q, _ = given.shape
        full = jnp.zeros((n, q, len(jets)), given.dtype)
        where = jnp.array([jets.index(jet) for jet in block.jets])
        full = full.at[:, :, where].set(given)
        coefficients.append(full.reshape(n * q, 1, len(jets)))
        points.append(jnp.repeat(block.points, q, axis=0))
    return Block(jnp.concatenate(points), jnp.concatenate(coefficients), jets)


def by_unknown(jets: Jets) -> dict[str, dict[Index, int]]:
    # For each unknown, the indices of its jet and where they stand in the coefficients.
    out: dict[str, dict[Index, int]] = {}
    for position, (name, index) in enumerate(jets):
        out.setdefault(name, {})[index] = position
    return out


def one_sides(
    kernels: Kernels, jets: Jets, points: Float[Array, "n d"]
) -> dict[str, Any]:
    # What the kernels compute of each point on its own.
    sides = {}
    for name, indices in by_unknown(jets).items():
        kernel, asked = kernels[name], tuple(indices)
        sides[name] = jax.vmap(lambda x: one_sided(kernel, asked, x))(points)
    return sides
