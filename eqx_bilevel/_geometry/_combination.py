"""Unions, intersections and differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._domain import (
    AbstractDomain,
    as_batch,
    check_concrete,
    interior_by_rejection,
)
from ._pieces import boundary_of_parts, proportional
from ._point_cloud import PointCloud
from ._sampling import as_count, check_method, SEQUENCES


_MAX_TRIED = 2**16
_MEASURED = 2**12


class AbstractCombination(AbstractDomain):
    """Abstract base class for domains that are made of two others, `a` and `b`.

    The signed distance is the smaller or larger one of those of the parts. It has the
    right sign everywhere and is exact close to the boundary, except in corners. Away
    from it, it may be closer to zero than the distance is.
    """

    a: eqx.AbstractVar[AbstractDomain]
    b: eqx.AbstractVar[AbstractDomain]

    def __check_init__(self):
        for part in (self.a, self.b):
            if isinstance(part, PointCloud):
                raise ValueError(
                    "A `PointCloud` cannot be combined with other domains, since it "
                    "does not know where its boundary is between the points. Choose "
                    "among its points by `contains` of the other domain."
                )
        if self.a.dim != self.b.dim:
            raise ValueError(
                "Only domains of the same dimension can be combined, got "
                f"{self.a.dim} and {self.b.dim}."
            )
        dtypes = self.a.bounds[0].dtype, self.b.bounds[0].dtype
        if dtypes[0] != dtypes[1]:
            raise ValueError(
                "Only domains of the same dtype can be combined, got "
                f"{dtypes[0]} and {dtypes[1]}."
            )

    @property
    def boundary_measure(self) -> Float[Array, ""]:
        """The length of the boundary in two dimensions, its area in three, estimated
        to about one part in a thousand, from points on the boundaries of the parts.
        """
        check_concrete(self, None)
        with jax.ensure_compile_time_eval():
            _, measure = boundary_of_parts(
                self, _shapes(self), _MEASURED, jr.key(0), "sobol"
            )
            return jnp.asarray(measure, self.bounds[0].dtype)

    def interior(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside: those of a sequence in the bounding box that lie in
        the domain.

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
        """Points on the boundary, part by part: those on the boundaries of the parts
        that lie on the boundary of the whole. Every piece of it gets points in
        proportion to its length or area.

        **Arguments:**

        - `n`: how many. In one dimension there are only a few points, which are
            returned whatever `n` is.
        - `key`: a `jax.random.key`, not traced.
        - `method`: `"sobol"`, `"halton"` or `"random"`.

        **Returns:**

        An array of shape `(n, d)`.
        """
        check_method(method, SEQUENCES)
        n = as_count(n)
        check_concrete(self, key)
        tried, total = max(64, 2 * n), 0
        with jax.ensure_compile_time_eval():
            while tried <= max(_MAX_TRIED, 64 * n):
                found, _ = boundary_of_parts(self, _shapes(self), tried, key, method)
                total = sum(map(len, found))
                if self.dim == 1 and total > 0:
                    return jnp.concatenate(found)
                if total >= n:
                    counts = proportional(n, [len(x) for x in found])
                    chosen = [x[:m] for x, m in zip(found, counts, strict=True)]
                    return jnp.concatenate(chosen)
                tried *= 4
        raise ValueError(
            f"Hardly any of the boundaries of its parts is on the boundary of the "
            f"`{type(self).__name__}`: {total} of {tried // 4} points. Is it empty?"
        )


class Union(AbstractCombination):
    """What lies in either of two domains, written `a | b`."""

    a: AbstractDomain
    b: AbstractDomain

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of a box around both."""
        (lower, upper), (low, up) = self.a.bounds, self.b.bounds
        return jnp.minimum(lower, low), jnp.maximum(upper, up)

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The smaller of the two signed distances."""
        x = as_batch(self, x)
        return jnp.minimum(self.a.signed_distance(x), self.b.signed_distance(x))


class Intersection(AbstractCombination):
    """What lies in both of two domains, written `a & b`."""

    a: AbstractDomain
    b: AbstractDomain

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of what the two boxes have in common."""
        (lower, upper), (low, up) = self.a.bounds, self.b.bounds
        return jnp.maximum(lower, low), jnp.minimum(upper, up)

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The larger of the two signed distances."""
        x = as_batch(self, x)
        return jnp.maximum(self.a.signed_distance(x), self.b.signed_distance(x))


class Difference(AbstractCombination):
    """What lies in `a` but not inside `b`, written `a - b`. The boundary of `b`
    belongs to it.
    """

    a: AbstractDomain
    b: AbstractDomain

    @property
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of the box around `a`."""
        return self.a.bounds

    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The larger of that of `a` and minus that of `b`."""
        x = as_batch(self, x)
        return jnp.maximum(self.a.signed_distance(x), -self.b.signed_distance(x))


# The elementary ones.
def _shapes(domain: AbstractDomain) -> list[AbstractDomain]:
    if isinstance(domain, AbstractCombination):
        return _shapes(domain.a) + _shapes(domain.b)
    return [domain]
