"""Points of one's own."""

from os import PathLike

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._domain import AbstractDomain, at_each_point, length
from ._mesh import boundary_vertices, read_mesh
from ._sampling import (
    as_count,
    as_floats,
    check_method,
    farthest,
    numbers_of,
    required_key,
)


_METHODS = ("farthest", "random")


class PointCloud(AbstractDomain):
    """A domain that is known by points in it and on its boundary, for example those of
    a mesh.

    !!! example

        ```python
        domain = PointCloud.from_mesh("wing.msh")
        inside = domain.interior(1000)
        around = domain.boundary(200)
        normals = domain.normal(around)
        ```

    Whatever is asked about the boundary is answered by the boundary point that is
    nearest, and by the plane through it. So there should be many of them.
    """

    interior_points: Float[Array, "n d"]
    boundary_points: Float[Array, "m d"]
    normals: Float[Array, "m d"] | None

    def __init__(
        self,
        interior: ArrayLike,
        boundary: ArrayLike,
        normals: ArrayLike | None = None,
    ):
        given = {"interior": interior, "boundary": boundary}
        if normals is not None:
            given["normals"] = normals
        arrays = dict(zip(given, as_floats(**given), strict=True))
        for name, x in arrays.items():
            if x.ndim != 2 or 0 in x.shape or x.shape[1] != arrays["boundary"].shape[1]:
                raise ValueError(
                    f"`{name}` must have shape `(n, d)`, with the same `d` as "
                    f"`boundary`, got {x.shape}."
                )
            numbers = numbers_of(given[name])
            if numbers is not None and not np.all(np.isfinite(numbers)):
                raise ValueError(f"`{name}` must be finite.")
        self.interior_points = arrays["interior"]
        self.boundary_points = arrays["boundary"]
        normals = arrays.get("normals")
        self.normals = None if normals is None else _unit(normals, boundary)

    @classmethod
    def from_mesh(cls, path: str | PathLike) -> "PointCloud":
        """The vertices of a mesh of triangles in the plane, or of tetrahedra.

        Boundary vertices are those of the edges that belong to one triangle only, or
        of the faces that belong to one tetrahedron only. Their normals are the means of
        those of these edges or faces, weighted by length or area.

        **Arguments:**

        - `path`: a file in any format that [meshio](https://github.com/nschloe/meshio)
            reads, which must be installed: `pip install "eqx_bilevel[mesh]"`.

        **Returns:**

        A `PointCloud`.

        **Raises:**

        An `ImportError` if meshio is not installed, and a `ValueError` if there are no
        such cells in the mesh.
        """
        points, cells = read_mesh(path)
        at_boundary, normals = boundary_vertices(points, cells)
        inside = np.setdiff1d(np.arange(len(points)), at_boundary)
        if len(inside) == 0:
            raise ValueError(f"All vertices of the mesh {path} are on its boundary.")
        return cls(points[inside], points[at_boundary], normals)

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of the smallest box around all points."""
        points = jnp.concatenate([self.interior_points, self.boundary_points])
        return jnp.min(points, axis=0), jnp.max(points, axis=0)

    @property
    def boundary_measure(self) -> Float[Array, ""]:
        """Not known: a `ValueError`."""
        raise ValueError("A `PointCloud` does not know the measure of its boundary.")

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """How far points are in front of the plane through the nearest boundary point:
        close to the boundary, nearly the distance, negative inside the domain.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of shape `(...)`.

        **Raises:**

        A `ValueError` if there are no normals. So does whatever depends on them,
        which are `contains` and `normal`.
        """
        if self.normals is None:
            raise ValueError(
                "This `PointCloud` has no normals, which say where the inside is. Pass "
                "`normals`, one for each boundary point."
            )
        return at_each_point(self, self._distance, x)

    def interior(
        self,
        n: int | None = None,
        *,
        key: PRNGKeyArray | None = None,
        method: str = "farthest",
    ) -> Float[Array, "n d"]:
        """Some of the points inside the domain.

        **Arguments:**

        - `n`: how many. Default: all of them.
        - `key`: a `jax.random.key`; not needed if `method="farthest"`.
        - `method`: `"farthest"` for points that are spread evenly, each one as far from
            those before it as possible; or `"random"`, for a draw without replacement.

        **Returns:**

        An array of shape `(n, d)`.
        """
        return _some(self.interior_points, n, key, method)

    def boundary(
        self,
        n: int | None = None,
        *,
        key: PRNGKeyArray | None = None,
        method: str = "farthest",
    ) -> Float[Array, "n d"]:
        """Some of the points on the boundary of the domain.

        **Arguments:**

        - `n`, `key`, `method`: as in [`eqx_bilevel.PointCloud.interior`][].

        **Returns:**

        An array of shape `(n, d)`.
        """
        return _some(self.boundary_points, n, key, method)

    def _distance(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        apart = x[None] - self.boundary_points
        i = jnp.argmin(jnp.sum(apart**2, axis=1))
        assert self.normals is not None
        return jnp.sum(apart[i] * self.normals[i])


PointCloud.__init__.__doc__ = """**Arguments:**

- `interior`: points inside the domain, an array of shape `(n, d)`.
- `boundary`: points on its boundary, of shape `(m, d)`.
- `normals`: vectors that point out of it, one for each boundary point, of any length.
    Without them there is no signed distance.

**Raises:**

A `ValueError` if shapes do not fit, or if a normal is zero.
"""


def _unit(normals: Float[Array, "m d"], boundary: ArrayLike) -> Float[Array, "m d"]:
    if normals.shape != jnp.shape(boundary):
        raise ValueError(
            "`normals` must have the shape of `boundary`, which is "
            f"{jnp.shape(boundary)}, got {normals.shape}."
        )
    numbers = numbers_of(normals)
    if numbers is not None and np.any(np.all(numbers == 0, axis=1)):
        raise ValueError("`normals` must not be zero.")
    return normals / length(normals)[:, None]


def _some(points: Array, n: int | None, key, method: str) -> Float[Array, "n d"]:
    check_method(method, _METHODS)
    if n is None:
        return points
    n = as_count(n)
    if n > len(points):
        raise ValueError(f"`n` must be at most {len(points)} here, got {n}.")
    if method == "farthest":
        return points[farthest(points, n)]
    key = required_key(key, method)
    return points[jr.permutation(key, len(points))[:n]]
