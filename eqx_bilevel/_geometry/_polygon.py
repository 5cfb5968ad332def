"""Polygons in the plane."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._domain import AbstractDomain, at_each_point, interior_by_rejection, length
from ._sampling import as_floats, check_method, numbers_of, SEQUENCES, unit_points


class Polygon(AbstractDomain):
    """What a closed line through some vertices encloses.

    !!! example

        ```python
        l_shape = Polygon([[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]])
        inside = l_shape.interior(300, key=jax.random.key(0))
        ```
    """

    vertices: Float[Array, "m 2"]

    def __init__(self, vertices: ArrayLike | Sequence[Sequence[ArrayLike]]):
        (corners,) = as_floats(vertices=vertices)
        if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
            raise ValueError(
                "`vertices` must have shape `(m, 2)` with at least three vertices, got "
                f"{corners.shape}."
            )
        numbers = numbers_of(vertices)
        if numbers is not None:
            _check_simple(numbers)
        # Counterclockwise, so that the normal is to the right of an edge.
        self.vertices = jnp.where(_area(corners) < 0, corners[::-1], corners)

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of the smallest box around the polygon."""
        return jnp.min(self.vertices, axis=0), jnp.max(self.vertices, axis=0)

    @property
    def volume(self) -> Float[Array, ""]:
        """The area."""
        return _area(self.vertices)

    @property
    def boundary_measure(self) -> Float[Array, ""]:
        """The sum of the lengths of the edges."""
        return jnp.sum(length(self._edges))

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The distance to the nearest edge, negative inside the polygon.

        **Arguments:**

        - `x`: one point of shape `(2,)`, or several in an array of shape `(..., 2)`.

        **Returns:**

        An array of shape `(...)`.
        """
        return at_each_point(self, self._distance, x)

    def interior(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside the polygon: those of a sequence in the box around it
        that lie in the polygon.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`, not traced.
        - `method`: `"sobol"`, `"halton"` or `"random"`.

        **Returns:**

        An array of shape `(n, 2)`.
        """
        return interior_by_rejection(self, n, key, method)

    def boundary(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points on the edges, uniformly distributed by arc length.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`.
        - `method`: `"sobol"`, `"halton"` or `"random"`. The first two need a `key` that
            is not traced.

        **Returns:**

        An array of shape `(n, 2)`.
        """
        check_method(method, SEQUENCES)
        unit = jnp.asarray(unit_points(n, 1, key, method, 1), self.vertices.dtype)[:, 0]
        lengths = length(self._edges)
        ends = jnp.cumsum(lengths)
        along = unit * ends[-1]
        edge = jnp.minimum(jnp.searchsorted(ends, along, side="right"), len(ends) - 1)
        share = 1 - (ends[edge] - along) / lengths[edge]
        share = jnp.clip(share, 0, 1)[:, None]
        end = jnp.roll(self.vertices, -1, axis=0)[edge]
        return (1 - share) * self.vertices[edge] + share * end

    @property
    def _edges(self) -> Float[Array, "m 2"]:
        return jnp.roll(self.vertices, -1, axis=0) - self.vertices

    def _distance(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        edges = self._edges
        normals = jnp.stack([edges[:, 1], -edges[:, 0]], axis=1)
        normals = normals / length(edges)[:, None]
        apart = x[None] - self.vertices
        share = jnp.sum(apart * edges, axis=1) / jnp.sum(edges**2, axis=1)
        nearest = jnp.clip(share, 0, 1)[:, None] * edges
        i = jnp.argmin(jnp.sum((apart - nearest) ** 2, axis=1))
        # Beside the nearest edge, its normal tells the side.
        beside = (share[i] >= 0) & (share[i] <= 1)
        # Beyond its end, the normals of the two edges that meet there do, together.
        j = jnp.where(share[i] < 0, i, (i + 1) % len(edges))
        outwards = jnp.sum(apart[j] * (normals[j - 1] + normals[j]))
        beyond = jnp.where(outwards < 0, -1, 1) * length(apart[j])
        return jnp.where(beside, jnp.sum(apart[i] * normals[i]), beyond)


Polygon.__init__.__doc__ = """**Arguments:**

- `vertices`: an array of shape `(m, 2)`, in either sense of rotation. The last vertex
    is joined to the first, which is not repeated.

**Raises:**

A `ValueError` if the shape is wrong, or if edges meet anywhere but in the vertices that
they share. The latter is not checked if the vertices are traced.
"""


def _area(vertices: Float[Array, "m 2"]) -> Float[Array, ""]:
    # From the first vertex, so that nothing cancels far from the origin.
    x, y = (vertices - vertices[:1]).T
    return jnp.sum(x * jnp.roll(y, -1) - y * jnp.roll(x, -1)) / 2


def _check_simple(vertices: np.ndarray) -> None:
    if not np.all(np.isfinite(vertices)):
        raise ValueError("`vertices` must be finite.")
    start, end = vertices, np.roll(vertices, -1, axis=0)
    if np.any(np.all(start == end, axis=1)):
        raise ValueError(
            "Two consecutive `vertices` are the same. The last is joined to the first, "
            "which is not to be repeated."
        )
    wrong = _meet(start, end)
    if np.any(wrong):
        i, j = np.argwhere(wrong)[0]
        raise ValueError(
            f"`vertices` are those of a polygon that meets itself: edges {i} and {j}, "
            "counted from zero, have more in common than a vertex between them. (A "
            "polygon with a hole is a difference, `outer - inner`.)"
        )


# Which pairs of edges have more in common than the vertex between them.
def _meet(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    # The ends of each are on different sides of the other, or in line with it.
    first, last = (_side(start[:, None], end[:, None], p[None]) for p in (start, end))
    across = first * last <= 0
    # Edges that are in line may still be apart.
    lower, upper = np.minimum(start, end), np.maximum(start, end)
    apart = np.any(lower[:, None] > upper[None], axis=2)
    meet = across & across.T & ~(apart | apart.T)
    # Neighbours do meet; what they must not do is turn back.
    i = np.arange(len(start))
    after = (i + 1) % len(start)
    meet[i, i] = meet[i, after] = meet[after, i] = False
    backwards = np.sum((end - start) * (end - start)[after], axis=1) < 0
    meet[i, after] = (_side(start, end, end[after]) == 0) & backwards
    return meet


# Positive if a point is to the left of the line from `start` to `end`.
def _side(start: np.ndarray, end: np.ndarray, x: np.ndarray) -> np.ndarray:
    (a, b), (c, d) = np.moveaxis(end - start, -1, 0), np.moveaxis(x - start, -1, 0)
    return np.sign(a * d - b * c)
