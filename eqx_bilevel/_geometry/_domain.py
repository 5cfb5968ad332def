"""What a domain is, and what follows from its signed distance."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from .._parameters import is_traced
from ._sampling import as_count, between, check_method, SEQUENCES, unit_points


_MAX_TRIED = 2**20


class AbstractDomain(eqx.Module):
    """A region of space, which knows how to put points into itself and where its
    boundary is.

    Domains are combined by `a | b` (what is in either), `a & b` (in both) and `a - b`
    (in the first but not in the second).

    Nothing else in the library depends on the kind of domain: a condition is given
    points, not a domain.

    For a geometry of your own, subclass this class and define the properties `bounds`
    and `boundary_measure` and the methods `signed_distance`, `interior` and `boundary`;
    the rest follows from these. If points are all that is needed,
    [`eqx_bilevel.PointCloud`][] makes a domain of them, or of a mesh.
    """

    @property
    @abc.abstractmethod
    def bounds(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The lower and the upper corner of a box that holds the domain."""

    @property
    @abc.abstractmethod
    def boundary_measure(self) -> Float[Array, ""]:
        """The length of the boundary in two dimensions, its area in three, and so on.
        In one dimension, of how many points it consists.
        """

    @abc.abstractmethod
    def signed_distance(
        self, x: Float[ArrayLike, "*batch d"]
    ) -> Float[Array, "*batch"]:
        """The distance to the boundary, negative inside the domain. Differentiable
        almost everywhere.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of shape `(...)`.
        """

    @abc.abstractmethod
    def interior(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside the domain.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`.
        - `method`: how to choose them: `"sobol"`, `"halton"` or `"random"`. Only a box
            has `"grid"`.

        **Returns:**

        An array of shape `(n, d)`.
        """

    @abc.abstractmethod
    def boundary(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points on the boundary of the domain.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`.
        - `method`: how to choose them: `"sobol"`, `"halton"` or `"random"`. Only a box
            has `"grid"`.

        **Returns:**

        An array of shape `(n, d)`.
        """

    @property
    def dim(self) -> int:
        """The number of dimensions."""
        return self.bounds[0].shape[0]

    def contains(self, x: Float[ArrayLike, "*batch d"]) -> Bool[Array, "*batch"]:
        """Whether points lie in the domain, its boundary included, up to rounding.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of booleans of shape `(...)`.
        """
        return self.signed_distance(x) <= rounding(self)

    def normal(self, x: Float[ArrayLike, "*batch d"]) -> Float[Array, "*batch d"]:
        """The unit vectors that point out of the domain, at points of its boundary. In
        a corner, it is one of those beside it or halfway between them.

        It can be called inside an operator, for a normal derivative:

        ```python
        def flux(u, x):
            return u.grad @ domain.normal(x)
        ```

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.
            For points that are not on the boundary, the result is the gradient of the
            signed distance.

        **Returns:**

        An array of the shape of `x`.
        """
        return _normal(self, as_batch(self, x))

    def __or__(self, other: Any) -> "AbstractDomain":
        if not isinstance(other, AbstractDomain):
            return NotImplemented
        from ._combination import Union  # It imports this file.

        return Union(self, other)

    def __and__(self, other: Any) -> "AbstractDomain":
        if not isinstance(other, AbstractDomain):
            return NotImplemented
        from ._combination import Intersection

        return Intersection(self, other)

    def __sub__(self, other: Any) -> "AbstractDomain":
        if not isinstance(other, AbstractDomain):
            return NotImplemented
        from ._combination import Difference

        return Difference(self, other)


def as_batch(domain: AbstractDomain, x: Any) -> Float[Array, "*batch d"]:
    x = jnp.asarray(x, dtype=domain.bounds[0].dtype)
    if x.ndim == 0 or x.shape[-1] != domain.dim:
        raise ValueError(
            f"`x` must have shape (..., {domain.dim}) for a domain in {domain.dim} "
            f"dimension(s), got {x.shape}."
        )
    return x


# A method that is a function of one point, at each. Compiled, which is much faster than
# one operation after the other.
def at_each_point(domain: AbstractDomain, fn: Callable, x: Any) -> Array:
    return _vectorised(fn, as_batch(domain, x))


@eqx.filter_jit
def _vectorised(fn: Callable, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    return jnp.vectorize(fn, signature="(d)->()")(x)


@eqx.filter_jit
def _normal(
    domain: AbstractDomain, x: Float[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    gradient = jax.grad(lambda x: jnp.sum(domain.signed_distance(x)))(x)
    # Of length one already, except where two distances are equal.
    return gradient / length(gradient)[..., None]


# Its derivative at zero is zero and not NaN.
def length(x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    square = jnp.sum(x**2, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


# How far from the boundary a point of the boundary may seem to be.
def rounding(domain: AbstractDomain) -> Float[Array, ""]:
    lower, upper = domain.bounds
    scale = jnp.maximum(jnp.max(jnp.abs(lower)), jnp.max(jnp.abs(upper)))
    return 16 * jnp.finfo(lower.dtype).eps * scale


def check_concrete(domain: AbstractDomain, key: PRNGKeyArray | None) -> None:
    if is_traced((domain, key)):
        raise ValueError(
            f"How many points have to be tried depends on the values in a "
            f"`{type(domain).__name__}` and on the `key`, but these are traced by "
            "`jax.jit`, `jax.vmap` or the like. Choose the points outside that "
            "function."
        )


# The first `n` points of a sequence in the bounding box that lie inside.
def interior_by_rejection(
    domain: AbstractDomain, n: int, key: PRNGKeyArray | None, method: str
) -> Float[Array, "n d"]:
    check_method(method, SEQUENCES)
    n = as_count(n)
    check_concrete(domain, key)
    tried, inside = max(64, 1 << n.bit_length()), np.zeros(0)
    with jax.ensure_compile_time_eval():
        while tried <= max(_MAX_TRIED, 64 * n):
            unit = unit_points(tried, domain.dim, key, method, 0)
            points = between(*domain.bounds, unit)
            (inside,) = np.nonzero(np.asarray(_strictly_inside(domain, points)))
            if len(inside) >= n:
                return points[inside[:n]]
            tried *= 4
    raise ValueError(
        f"Of {tried // 4} points of its bounding box, only {len(inside)} lie inside "
        f"the `{type(domain).__name__}`, and {n} were asked for. Is it empty, or much "
        "smaller than the box?"
    )


@eqx.filter_jit
def _strictly_inside(domain: AbstractDomain, x: Array) -> Array:
    return domain.signed_distance(x) < -rounding(domain)
