"""Disks, balls."""

import functools as ft
from collections.abc import Sequence
from math import gamma, pi

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._domain import AbstractDomain, at_each_point, interior_by_rejection, length
from ._sampling import (
    as_count,
    as_floats,
    check_method,
    numbers_of,
    SEQUENCES,
    unit_points,
)


class Ball(AbstractDomain):
    """A disk in two dimensions, a ball in three or more, an interval in one.

    !!! example

        ```python
        disk = Ball(centre=[0.0, 0.0], radius=1.0)
        key1, key2 = jax.random.split(jax.random.key(0))
        inside = disk.interior(300, key=key1)
        around = disk.boundary(60, key=key2)
        normals = disk.normal(around)
        ```
    """

    centre: Float[Array, " d"]
    radius: Float[Array, ""]

    def __init__(self, centre: ArrayLike | Sequence[ArrayLike], radius: ArrayLike):
        middle, size = as_floats(centre=centre, radius=radius)
        middle = jnp.atleast_1d(middle)
        if middle.ndim != 1 or middle.size == 0 or size.ndim != 0:
            raise ValueError(
                "`centre` must have one number for each dimension and `radius` must be "
                f"a number, got shapes {middle.shape} and {size.shape}."
            )
        numbers = numbers_of(centre), numbers_of(radius)
        if numbers[0] is not None and not np.all(np.isfinite(numbers[0])):
            raise ValueError(f"`centre` must be finite, got {numbers[0].tolist()}.")
        if numbers[1] is not None and not 0 < numbers[1] < np.inf:
            raise ValueError(f"`radius` must be positive and finite, got {numbers[1]}.")
        self.centre, self.radius = middle, size

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of the smallest box around the ball."""
        return self.centre - self.radius, self.centre + self.radius

    @property
    def volume(self) -> Float[Array, ""]:
        """The length, area or volume of the ball."""
        unit = pi ** (self.dim / 2) / gamma(self.dim / 2 + 1)
        return unit * self.radius**self.dim

    @property
    def boundary_measure(self) -> Float[Array, ""]:
        """The length of the circle, the area of the sphere."""
        return self.dim * self.volume / self.radius

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The distance to the sphere, negative inside.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of shape `(...)`.
        """
        return at_each_point(self, self._distance, x)

    def interior(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside the ball: those of a sequence in the box around it
        that lie in the ball, which become few in many dimensions.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`, not traced.
        - `method`: `"sobol"`, `"halton"` or `"random"`.

        **Returns:**

        An array of shape `(n, d)`.
        """
        return interior_by_rejection(self, n, key, method)

    def boundary(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points on the sphere, uniformly distributed. A sequence in the unit cube is
        mapped there so that areas keep their proportions: by arc length on a circle;
        and by longitude and height in three dimensions.

        **Arguments:**

        - `n`: how many. In one dimension there are two points, which are returned
            whatever `n` is.
        - `key`: a `jax.random.key`; not needed in one dimension.
        - `method`: `"sobol"`, `"halton"` or `"random"`. The first two need a `key` that
            is not traced.

        **Returns:**

        An array of shape `(n, d)`.
        """
        check_method(method, SEQUENCES)
        if self.dim == 1:
            as_count(n)
            directions = jnp.array([[-1], [1]], self.centre.dtype)
        else:
            # A sphere of dimension d - 1, except that normal numbers are needed in
            # more than three dimensions.
            num = self.dim - 1 if self.dim <= 3 else self.dim
            unit = unit_points(n, num, key, method, 1)
            directions = _directions(jnp.asarray(unit, self.centre.dtype), self.dim)
        return self.centre[None] + self.radius * directions

    def _distance(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        return length(x - self.centre) - self.radius


@ft.partial(jax.jit, static_argnums=1)
def _directions(unit: Float[Array, "n k"], dim: int) -> Float[Array, "n d"]:
    if dim > 3:
        tiny = jnp.finfo(unit.dtype).eps
        normal = jsp.ndtri(jnp.clip(unit, tiny, 1 - tiny))
        return normal / length(normal)[:, None]
    angle = 2 * pi * unit[:, 0]
    circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    if dim == 2:
        return circle
    # Archimedes: the area between two heights is proportional to their difference.
    height = 2 * unit[:, 1:] - 1
    return jnp.concatenate([jnp.sqrt(1 - height**2) * circle, height], axis=1)


Ball.__init__.__doc__ = """**Arguments:**

- `centre`: one number for each dimension.
- `radius`: a positive number.

Numbers become arrays of the default floating-point dtype; floating-point arrays keep
theirs.

**Raises:**

A `ValueError` if the shapes are wrong, or if the radius is not positive. The latter is
not checked if it is traced.
"""
