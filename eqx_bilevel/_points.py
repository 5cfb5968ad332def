import abc
import operator
from collections.abc import Sequence
from typing import TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import scipy.stats.qmc as qmc
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray


_Count: TypeAlias = int | tuple[int, ...]
_METHODS = ("sobol", "halton", "random", "grid")
_SIDES = ("lower", "upper")


class AbstractDomain(eqx.Module):
    """A region of space, which knows how to put points into itself.

    Nothing else in the library depends on the kind of domain: a condition is given
    points, not a domain. For a geometry of your own, subclass this class.
    """

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """The number of dimensions."""

    @abc.abstractmethod
    def interior(
        self, n: int, *, key: PRNGKeyArray | None = None, method: str = "sobol"
    ) -> Float[Array, "n d"]:
        """Points strictly inside the domain.

        **Arguments:**

        - `n`: how many.
        - `key`: a `jax.random.key`.
        - `method`: how to choose them.

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
        - `method`: how to choose them.

        **Returns:**

        An array of shape `(n, d)`.
        """

    @abc.abstractmethod
    def contains(self, x: Float[ArrayLike, "*batch d"]) -> Bool[Array, "*batch"]:
        """Whether points lie in the domain, its boundary included.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of booleans of shape `(...)`.
        """


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
        self.lower, self.upper = _corners(lower, upper)

    @property
    def dim(self) -> int:
        """The number of dimensions."""
        return self.lower.shape[0]

    @property
    def size(self) -> Float[Array, " d"]:
        """The lengths of the edges."""
        return self.upper - self.lower

    @property
    def volume(self) -> Float[Array, ""]:
        """The product of the lengths of the edges."""
        return jnp.prod(self.size)

    def interior(
        self, n: _Count, *, key: PRNGKeyArray | None = None, method: str = "sobol"
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
        unit = _unit_points(n, self.dim, key, method, 0)
        return _strictly_between(self.lower, self.upper, unit)

    def face(
        self,
        axis: int,
        side: str,
        n: _Count,
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
        self._check_face(axis, side)
        _check_method(method)
        end = self.lower[axis] if side == "lower" else self.upper[axis]
        if self.dim == 1:
            if not isinstance(n, tuple):
                _count(n)
            return end[None, None]
        # A sequence of its own for each face: dealing one sequence out to the faces of
        # a square covers only a quarter of each of them.
        stream = 1 + 2 * axis + _SIDES.index(side)
        unit = _unit_points(n, self.dim - 1, key, method, stream)
        lower, upper = (jnp.delete(x, axis) for x in (self.lower, self.upper))
        rest = _strictly_between(lower, upper, unit)
        column = jnp.full((rest.shape[0], 1), end)
        return jnp.concatenate([rest[:, :axis], column, rest[:, axis:]], axis=1)

    def boundary(
        self,
        n: _Count,
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
        if faces is None:
            faces = [(axis, side) for axis in range(self.dim) for side in _SIDES]
        if len(faces) == 0 or len(set(faces)) != len(faces):
            raise ValueError(
                "`faces` must be different pairs `(axis, side)`, at least one of them, "
                f"got {faces}."
            )
        for axis, side in faces:
            self._check_face(axis, side)
        _check_method(method)
        counts = self._count_per_face(n, method, faces)
        points = [
            self.face(axis, side, count, key=key, method=method)
            for (axis, side), count in zip(faces, counts, strict=True)
            if count != 0
        ]
        return jnp.concatenate(points)

    def grid(self, n: _Count) -> Float[Array, "n d"]:
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
        counts = _counts(n, self.dim, minimum=2)
        unit = _lattice([np.linspace(0.0, 1.0, count) for count in counts])
        return _between(self.lower, self.upper, unit)

    def contains(self, x: Float[ArrayLike, "*batch d"]) -> Bool[Array, "*batch"]:
        """Whether points lie in the box, its boundary included.

        **Arguments:**

        - `x`: one point of shape `(d,)`, or several in an array of shape `(..., d)`.

        **Returns:**

        An array of booleans of shape `(...)`.
        """
        x = jnp.asarray(x, dtype=self.lower.dtype)
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"`x` must have shape (..., {self.dim}) for a box in {self.dim} "
                f"dimension(s), got {x.shape}."
            )
        lower, upper = (jnp.broadcast_to(y, x.shape) for y in (self.lower, self.upper))
        return jnp.all((lower <= x) & (x <= upper), axis=-1)

    def normal(self, axis: int, side: str) -> Float[Array, " d"]:
        """The unit vector that points out of the box through a face.

        **Arguments:**

        - `axis`: the dimension, counted from zero, in which the face bounds the box.
        - `side`: `"lower"` or `"upper"`.

        **Returns:**

        An array of shape `(d,)`.
        """
        self._check_face(axis, side)
        sign = -1.0 if side == "lower" else 1.0
        return jnp.zeros_like(self.lower).at[axis].set(sign)

    def _check_face(self, axis: int, side: str) -> None:
        if not 0 <= axis < self.dim:
            raise ValueError(
                f"`axis` must be at least 0 and less than {self.dim}, the dimension of "
                f"the box, got {axis}."
            )
        if side not in _SIDES:
            raise ValueError(f"`side` must be 'lower' or 'upper', got {side!r}.")

    def _count_per_face(
        self, n: _Count, method: str, faces: Sequence[tuple[int, str]]
    ) -> Sequence[_Count]:
        if self.dim == 1:
            _counts(n, self.dim)
            return [1] * len(faces)
        if method == "grid":
            counts = _counts(n, self.dim)
            return [counts[:axis] + counts[axis + 1 :] for axis, _ in faces]
        quotient, remainder = divmod(_count(n), len(faces))
        return [quotient + (i < remainder) for i in range(len(faces))]


Box.__init__.__doc__ = """**Arguments:**

- `lower`: the lower bounds, one for each dimension; a number for an interval.
- `upper`: the upper bounds, likewise.

Numbers become arrays of the default floating-point dtype; floating-point arrays keep
theirs. The points have the dtype of the box.

**Raises:**

A `ValueError` if the shapes differ, or if not `lower < upper` in every dimension. The
latter is not checked if the bounds are traced.
"""


def _is_traced(x: object) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves(x))


def _corners(
    lower: ArrayLike | Sequence[ArrayLike], upper: ArrayLike | Sequence[ArrayLike]
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    low, up = (jnp.atleast_1d(jnp.asarray(x)) for x in (lower, upper))
    if low.shape != up.shape or low.ndim != 1 or low.size == 0:
        raise ValueError(
            "`lower` and `upper` must have one number for each dimension, got shapes "
            f"{low.shape} and {up.shape}."
        )
    # A list beside a float32 array is meant to be float32; two arrays must agree.
    given = {
        a.dtype
        for a, x in [(low, lower), (up, upper)]
        if hasattr(x, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)
    }
    if len(given) > 1:
        raise ValueError(
            "`lower` and `upper` must have the same dtype, got "
            f"{low.dtype} and {up.dtype}."
        )
    dtype = given.pop() if given else jnp.result_type(float)
    # NumPy and not JAX, since under a trace JAX operations on constants are traced.
    if not _is_traced((lower, upper)):
        numbers = np.asarray(lower, dtype), np.asarray(upper, dtype)
        if not np.all((numbers[0] < numbers[1]) & np.isfinite(numbers).all()):
            raise ValueError(
                "`lower` must be less than `upper` in every dimension, and both must "
                f"be finite, got lower={numbers[0].tolist()} and "
                f"upper={numbers[1].tolist()}."
            )
    return jnp.asarray(low, dtype=dtype), jnp.asarray(up, dtype=dtype)


def _check_method(method: str) -> None:
    if method not in _METHODS:
        legal = ", ".join(repr(m) for m in _METHODS)
        raise ValueError(f"`method` must be one of {legal}, got {method!r}.")


def _count(n: _Count, minimum: int = 1) -> int:
    if isinstance(n, tuple):
        raise ValueError(
            f"`n` can be a tuple only with `method='grid'`, got {n}; pass one number."
        )
    try:
        count = operator.index(n)
    except TypeError as e:
        raise ValueError(f"`n` must be an integer, got {n!r}.") from e
    if count < minimum:
        raise ValueError(f"`n` must be at least {minimum}, got {count}.")
    return count


def _counts(n: _Count, dim: int, minimum: int = 1) -> tuple[int, ...]:
    per_dim = n if isinstance(n, tuple) else (n,) * dim
    if len(per_dim) != dim:
        raise ValueError(
            f"`n` must be one number or a tuple of {dim} numbers here, got {n}."
        )
    return tuple(_count(m, minimum) for m in per_dim)


# The last coordinate changes fastest.
def _lattice(axes: list[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


# Points in the unit cube. `stream` separates the interior and the faces, so that they
# are independent even if they were all given the same key.
def _unit_points(
    n: _Count, dim: int, key: PRNGKeyArray | None, method: str, stream: int
) -> np.ndarray | Float[Array, "n d"]:
    _check_method(method)
    if method == "grid":
        counts = _counts(n, dim)
        return _lattice([np.arange(1, m + 1) / (m + 1) for m in counts])
    count = _count(n)
    if key is None:
        raise ValueError(
            f"`key` is needed for `method={method!r}`: pass for example "
            "`key=jax.random.key(0)`."
        )
    if method == "random":
        return jr.uniform(jr.fold_in(key, stream), (count, dim))
    if _is_traced(key):
        raise ValueError(
            f"`method={method!r}` needs a `key` with a value, since it is computed by "
            "SciPy, but this one is traced by `jax.jit`, `jax.vmap` or the like. "
            "Choose the points outside that function, or use `method='random'`."
        )
    # Under a trace even what is done to a constant key would be traced.
    with jax.ensure_compile_time_eval():
        seed = [*np.asarray(jr.key_data(key)).tolist(), stream]
    rng = np.random.default_rng(seed)
    if method == "halton":
        return qmc.Halton(dim, scramble=True, rng=rng).random(count)
    # The start of a longer sequence, since SciPy warns about any number of points but a
    # power of two. They are the same points.
    log2 = (count - 1).bit_length()
    return qmc.Sobol(dim, scramble=True, rng=rng).random_base2(log2)[:count]


# This form is exact at both ends: there is no rounding out of the box.
def _between(lower, upper, unit) -> Float[Array, "n d"]:
    unit = jnp.asarray(unit, dtype=lower.dtype)
    return lower[None] * (1 - unit) + upper[None] * unit


# A point of a sequence may be zero, or be rounded to one of the ends.
def _strictly_between(lower, upper, unit) -> Float[Array, "n d"]:
    scale = jnp.maximum(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), upper - lower)
    margin = float(jnp.finfo(lower.dtype).eps) * scale
    points = _between(lower, upper, unit)
    return jnp.clip(points, (lower + margin)[None], (upper - margin)[None])
