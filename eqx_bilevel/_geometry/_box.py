"""Intervals, rectangles, cuboids."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._domain import AbstractDomain, at_each_point, length
from ._faces import as_faces, check_face, corners, counts_per_face, SIDES
from ._sampling import (
    as_count,
    as_counts,
    between,
    check_method,
    Count,
    lattice,
    METHODS,
    numpy_of,
    strictly_between,
    unit_points,
)


class Box(AbstractDomain):
    """An interval, a rectangle, a cuboid, or the like in more dimensions.

    !!! example

        ```python
        domain = Box(lower=[0.0, -1.0], upper=[1.0, 1.0])
        key1, key2 = jax.random.split(jax.random.key(0))
        inside = domain.interior(900, key=key1)
        around = domain.boundary(300, key=key2)
        ```

    Points are chosen by one of these methods:

    - `"sobol"`, the default: a scrambled Sobol sequence, which covers the domain much
        more evenly than random points do;
    - `"halton"`: a scrambled Halton sequence;
    - `"random"`: independent and uniform;
    - `"grid"`: a regular grid. `n` is then the number of points *per dimension*, or a
        tuple with one number for each, and no key is needed.

    All need a `key`, except for `"grid"`. The same key gives the same points.

    !!! warning

        `"sobol"` and `"halton"` are computed by SciPy, and so do not work if the key is
        traced, that is, if it is an argument of a function under `jax.jit` or
        `jax.vmap`. Choose the points outside that function, or use `"random"`.
    """

    lower: Float[Array, " d"]
    upper: Float[Array, " d"]

    def __init__(
        self,
        lower: ArrayLike | Sequence[ArrayLike],
        upper: ArrayLike | Sequence[ArrayLike],
    ):
        self.lower, self.upper = corners(lower, upper)

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner."""
        return self.lower, self.upper

    @property
    def size(self) -> Float[Array, " d"]:
        """The lengths of the edges."""
        return self.upper - self.lower

    @property
    def volume(self) -> Float[Array, ""]:
        """The product of the lengths of the edges."""
        return jnp.prod(self.size)

    @property
    def boundary_measure(self) -> Float[Array, ""]:
        """The sum of the areas of the faces."""
        return 2 * jnp.sum(self.volume / self.size)

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The distance to the boundary, negative inside the box.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of shape `(...)`.
        """
        return at_each_point(self, self._distance, x)

    def interior(
        self, n: Count, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside the box.

        **Arguments:**

        - `n`: how many. If `method="grid"`, how many per dimension, or a tuple with one
            number for each dimension.
        - `key`: a `jax.random.key`; not needed if `method="grid"`.
        - `method`: one of `"sobol"`, `"halton"`, `"random"`, `"grid"`. The first two
            need a `key` that is not traced, and so work under `jax.jit` only if the key
            is a constant there. The grid consists of the inner nodes of a regular one.

        **Returns:**

        An array of shape `(n, d)`.
        """
        unit = unit_points(n, self.dim, key, method, 0)
        return strictly_between(self.lower, self.upper, unit)

    def face(
        self,
        axis: int,
        side: str,
        n: Count,
        *,
        key: PRNGKeyArray | None = None,
        method: str = "sobol",
    ) -> Float[Array, "n d"]:
        """Points exactly on one face of the box, strictly inside its edges.

        Even with the same `key`, different faces have independent points.

        **Arguments:**

        - `axis`: the dimension, counted from zero, in which the face bounds the box.
        - `side`: `"lower"` or `"upper"`.
        - `n`: how many. If `method="grid"`, how many per dimension of the face, or a
            tuple with one number for each of them. In one dimension a face is a single
            point, which is returned once, whatever `n` is.
        - `key`: a `jax.random.key`; not needed if `method="grid"` or in one dimension.
        - `method`: as in [`eqx_bilevel.Box.interior`][].

        **Returns:**

        An array of shape `(n, d)`.
        """
        check_face(self.dim, axis, side)
        check_method(method, METHODS)
        xp, lower, upper = numpy_of(self.lower, self.upper)
        end = lower[axis] if side == "lower" else upper[axis]
        if self.dim == 1:
            if not isinstance(n, tuple):
                as_count(n)
            return jnp.asarray(end[None, None])
        # A sequence of its own for each face: dealing one sequence out to the faces of
        # a square covers only a quarter of each of them.
        stream = 1 + 2 * axis + SIDES.index(side)
        unit = unit_points(n, self.dim - 1, key, method, stream)
        lower, upper = (xp.delete(x, axis) for x in (lower, upper))
        xp, end, rest = numpy_of(end, strictly_between(lower, upper, unit))
        return jnp.asarray(xp.insert(rest, axis, end, axis=1))

    def boundary(
        self,
        n: Count,
        *,
        key: PRNGKeyArray | None = None,
        method: str = "sobol",
        faces: Sequence[tuple[int, str]] | None = None,
    ) -> Float[Array, "n d"]:
        """Points on the boundary of the box, face by face.

        Every face gets the same number of points, whatever its area is, and the
        remainder goes to the first faces, one each. The points of a face are those of
        [`eqx_bilevel.Box.face`][].

        **Arguments:**

        - `n`: how many in all. If `method="grid"`, how many per dimension on each face,
            or a tuple with one number for each dimension of the box. In one dimension
            the boundary has no more than two points, which are returned whatever `n`
            is.
        - `key`: a `jax.random.key`; not needed if `method="grid"` or in one dimension.
        - `method`: as in [`eqx_bilevel.Box.interior`][].
        - `faces`: pairs `(axis, side)`, as in `[(0, "lower"), (1, "upper")]`, if only
            some of the faces are wanted. The default is all of them, in the order
            `(0, "lower"), (0, "upper"), (1, "lower"), ...`.

        **Returns:**

        An array of shape `(n, d)`.
        """
        faces = as_faces(self.dim, faces)
        check_method(method, METHODS)
        counts = counts_per_face(self.dim, n, method, faces)
        points = [
            self.face(axis, side, count, key=key, method=method)
            for (axis, side), count in zip(faces, counts, strict=True)
            if count != 0
        ]
        xp, *points = numpy_of(*points)
        return jnp.asarray(xp.concatenate(points))

    def grid(self, n: Count) -> Float[Array, "n d"]:
        """A regular grid that includes the boundary, for example to compare with an
        exact solution.

        **Arguments:**

        - `n`: the number of points per dimension, or a tuple with one number for each;
            at least two.

        **Returns:**

        An array of shape `(n, d)` with all points of the grid, of which the last
        coordinate changes fastest: for `n=(3, 4)`, values at the points are reshaped
        to `(3, 4)` for a plot.
        """
        counts = as_counts(n, self.dim, minimum=2)
        unit = lattice([np.linspace(0.0, 1.0, count) for count in counts])
        return between(self.lower, self.upper, unit)

    def face_normal(self, axis: int, side: str) -> Float[Array, " d"]:
        """The unit vector that points out of the box through a face.

        **Arguments:**

        - `axis`: the dimension, counted from zero, in which the face bounds the box.
        - `side`: `"lower"` or `"upper"`.

        **Returns:**

        An array of shape `(d,)`.
        """
        check_face(self.dim, axis, side)
        sign = -1.0 if side == "lower" else 1.0
        return jnp.zeros_like(self.lower).at[axis].set(sign)

    def _distance(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        beyond = jnp.maximum(self.lower - x, x - self.upper)
        largest = jnp.max(beyond)
        # From outside, the nearest point may be on an edge or in a corner.
        return jnp.where(largest > 0, length(jnp.maximum(beyond, 0)), largest)


Box.__init__.__doc__ = """**Arguments:**

- `lower`: the lower bounds, one for each dimension; a number for an interval.
- `upper`: the upper bounds, likewise.

Numbers become arrays of the default floating-point dtype; floating-point arrays keep
theirs. The points have the dtype of the box.

**Raises:**

A `ValueError` if the shapes differ, or if not `lower < upper` in every dimension. The
latter is not checked if the bounds are traced.
"""
