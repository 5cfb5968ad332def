"""Numbers of points, points of the unit cube, and what becomes of them."""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._parameters import is_traced


Count: TypeAlias = int | tuple[int, ...]
SEQUENCES = ("sobol", "halton", "random")
METHODS = (*SEQUENCES, "grid")


_NO_GRID = (
    " Only a box has regular grids. To get one inside another domain, take the points "
    "of `Box(*domain.bounds).grid(n)` at which `domain.contains` is true."
)


def check_method(method: str, methods: tuple[str, ...]) -> None:
    if method not in methods:
        legal = ", ".join(repr(m) for m in methods)
        hint = _NO_GRID if method == "grid" else ""
        raise ValueError(f"`method` must be one of {legal}, got {method!r}.{hint}")


def required_key(key: PRNGKeyArray | None, method: str) -> PRNGKeyArray:
    if key is None:
        raise ValueError(
            f"`key` is needed for `method={method!r}`: pass for example "
            "`key=jax.random.key(0)`."
        )
    return as_key(key)


def as_key(key: Any) -> PRNGKeyArray:
    # Old keys, of integers, are keys as well.
    dtype = getattr(key, "dtype", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (new or dtype == jnp.uint32):
        raise ValueError(
            f"`key` must be a JAX random key, such as `jax.random.key(0)`, got {key!r}."
        )
    return key


def as_count(n: Count, minimum: int = 1) -> int:
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


def as_counts(n: Count, dim: int, minimum: int = 1) -> tuple[int, ...]:
    per_dim = n if isinstance(n, tuple) else (n,) * dim
    if len(per_dim) != dim:
        raise ValueError(
            f"`n` must be one number or a tuple of {dim} numbers here, got {n}."
        )
    return tuple(as_count(m, minimum) for m in per_dim)


# The last coordinate changes fastest.
def lattice(axes: list[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


# Points in the unit cube. `stream` separates the interior and the faces, so that they
# are independent even if they were all given the same key.
def unit_points(
    n: Count, dim: int, key: PRNGKeyArray | None, method: str, stream: int
) -> np.ndarray | Float[Array, "n d"]:
    check_method(method, METHODS)
    if method == "grid":
        counts = as_counts(n, dim)
        return lattice([np.arange(1, m + 1) / (m + 1) for m in counts])
    count = as_count(n)
    key = required_key(key, method)
    if method == "random":
        return jr.uniform(jr.fold_in(key, stream), (count, dim))
    if is_traced(key):
        raise ValueError(
            f"`method={method!r}` needs a `key` with a value, since it is computed by "
            "SciPy, but this one is traced by `jax.jit`, `jax.vmap` or the like. "
            "Choose the points outside that function, or use `method='random'`."
        )
    # Under a trace even what is done to a constant key would be traced.
    with jax.ensure_compile_time_eval():
        seed = [*np.asarray(jr.key_data(key)).tolist(), stream]
    rng = np.random.default_rng(seed)
    # Importing it takes 0.3 s and 40 MB, which not all need.
    import scipy.stats.qmc as qmc

    if method == "halton":
        return qmc.Halton(dim, scramble=True, rng=rng).random(count)
    # The start of a longer sequence, since SciPy warns about any number of points but a
    # power of two. They are the same points.
    log2 = (count - 1).bit_length()
    return qmc.Sobol(dim, scramble=True, rng=rng).random_base2(log2)[:count]


# JAX compiles each operation for each shape, which takes longer than all else that
# makes points. NumPy does not, if there are numbers.
def numpy_of(*arrays: Any) -> tuple[Any, ...]:
    xp = jnp if is_traced(arrays) else np
    return xp, *map(xp.asarray, arrays)


# This form is exact at both ends: there is no rounding out of the box.
def between(lower, upper, unit) -> Float[Array, "n d"]:
    _, lower, upper, unit = numpy_of(lower, upper, unit)
    unit = unit.astype(lower.dtype)
    return jnp.asarray(lower[None] * (1 - unit) + upper[None] * unit)


# A point of a sequence may be zero, or be rounded to one of the ends.
def strictly_between(lower, upper, unit) -> Float[Array, "n d"]:
    xp, lower, upper, points = numpy_of(lower, upper, between(lower, upper, unit))
    scale = xp.maximum(xp.maximum(abs(lower), abs(upper)), upper - lower)
    margin = float(jnp.finfo(lower.dtype).eps) * scale
    inside = xp.clip(points, (lower + margin)[None], (upper - margin)[None])
    return jnp.asarray(inside)


# Numbers that belong together, as arrays. A list beside a float32 array is meant to be
# float32; two arrays must agree.
def as_floats(**given: Any) -> list[Array]:
    arrays = [jnp.asarray(x) for x in given.values()]
    dtypes = {
        a.dtype
        for a, x in zip(arrays, given.values())
        if hasattr(x, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)
    }
    if len(dtypes) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        got = " and ".join(str(a.dtype) for a in arrays)
        raise ValueError(f"{names} must have the same dtype, got {got}.")
    dtype = dtypes.pop() if dtypes else jnp.result_type(float)
    return [jnp.asarray(a, dtype=dtype) for a in arrays]


# As numbers, or nothing if there are none yet. NumPy and not JAX, since under a trace
# JAX operations on constants are traced.
def numbers_of(x: Any) -> np.ndarray | None:
    return None if is_traced(x) else np.asarray(x, float)


# Which of some candidates are chosen if each is as far as possible from those before,
# in units of how far apart points should be there. `distance` is how far all are from
# what there is already, and `apart` how far they are from one of them.
def farthest_first(
    distance: Float[Array, " m"],
    apart: Callable[[Int[Array, ""]], Float[Array, " m"]],
    n: int,
    density: Float[Array, " m"] | float = 1.0,
) -> Int[Array, " n"]:
    def choose(distance, _):
        i = jnp.argmax(density * distance)
        return jnp.minimum(distance, apart(i)).at[i].set(-jnp.inf), i

    _, chosen = jax.lax.scan(choose, distance, length=n)
    return chosen


# The first one is the first.
@ft.partial(jax.jit, static_argnums=1)
def farthest(points: Float[Array, "m d"], n: int) -> Int[Array, " n"]:
    apart = lambda i: jnp.sum((points - points[i][None]) ** 2, axis=1)
    return farthest_first(jnp.full(len(points), jnp.inf, points.dtype), apart, n)
