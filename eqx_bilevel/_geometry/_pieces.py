"""Which pieces of the boundaries of some shapes bound a whole that is made of them."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._box import Box
from ._domain import AbstractDomain, rounding
from ._faces import all_faces
from ._sampling import as_key


class _Piece(NamedTuple):
    # A part of the boundary of an elementary shape, on which points are uniform.
    shape: int
    measure: float
    points: Callable[..., Array]


def _pieces(shapes: Sequence[AbstractDomain]) -> list[_Piece]:
    pieces = []
    for i, shape in enumerate(shapes):
        if isinstance(shape, Box) and shape.dim > 1:
            # `Box.boundary` has as many points on small faces as on large ones.
            areas = np.asarray(shape.volume / shape.size)
            for axis, side in all_faces(shape.dim):
                points = ft.partial(shape.face, axis, side)
                pieces.append(_Piece(i, float(areas[axis]), points))
        else:
            measure = float(shape.boundary_measure)
            pieces.append(_Piece(i, measure, shape.boundary))
    return pieces


# About `n` points on the boundaries of all shapes, and of each piece those that are on
# the boundary of the whole; and the measure of all these.
def boundary_of_parts(
    domain: AbstractDomain,
    shapes: Sequence[AbstractDomain],
    n: int,
    key: PRNGKeyArray | None,
    method: str,
) -> tuple[list[Float[Array, "_ d"]], float]:
    pieces = _pieces(shapes)
    total = sum(piece.measure for piece in pieces)
    drawn = []
    for piece in pieces:
        count = math.ceil(n * piece.measure / total)
        own = None if key is None else jr.fold_in(as_key(key), piece.shape)
        drawn.append(piece.points(count, key=own, method=method))
    ends = np.cumsum([len(x) for x in drawn])
    owner = np.repeat([piece.shape for piece in pieces], [len(x) for x in drawn])
    x, owner = jnp.concatenate(drawn), jnp.asarray(owner)
    on = np.split(np.asarray(_on_boundary(domain, shapes, x, owner)), ends[:-1])
    found = [x[np.flatnonzero(k)] for x, k in zip(drawn, on, strict=True)]
    shares = [piece.measure * np.mean(k) for piece, k in zip(pieces, on, strict=True)]
    return found, float(sum(shares))


# One side of the piece is inside and the other is not. Where two shapes have a piece in
# common, it is the first one's.
@eqx.filter_jit
def _on_boundary(
    domain: AbstractDomain,
    shapes: Sequence[AbstractDomain],
    x: Float[Array, "n d"],
    owner: Int[Array, " n"],
) -> Bool[Array, " n"]:
    normals = jnp.stack([shape.normal(x) for shape in shapes])
    lower, upper = domain.bounds
    step = jnp.finfo(x.dtype).eps ** 0.5 * jnp.max(upper - lower)
    step = step * normals[owner, jnp.arange(len(x))]
    here, there = domain.signed_distance(jnp.stack([x - step, x + step]))
    distances = jnp.stack([shape.signed_distance(x) for shape in shapes])
    near = jnp.abs(distances) <= rounding(domain)
    first = jnp.argmax(near, axis=0)
    return (jnp.sign(here) * jnp.sign(there) < 0) & (first == owner)


# Whole numbers with this sum, by largest remainders.
def proportional(n: int, sizes: list[int]) -> list[int]:
    exact = n * np.asarray(sizes) / sum(sizes)
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: n - counts.sum()]
    counts[rest] += 1
    return counts.tolist()
