"""Where functions are evaluated for a plot."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Grid(NamedTuple):
    axes: tuple[int, ...]  # which coordinates vary
    ticks: tuple[np.ndarray, ...]  # their values
    names: tuple[str, ...]  # of all coordinates
    points: Array
    outside: np.ndarray

    def masked(self, values: np.ndarray) -> np.ma.MaskedArray:
        # One axis for each coordinate that varies.
        shape = [len(t) for t in self.ticks]
        values = np.reshape(values, shape)
        hidden = np.reshape(self.outside, shape) | ~np.isfinite(values)
        return np.ma.array(values, mask=hidden)


def bounding_box(domain: Any) -> tuple[np.ndarray, np.ndarray]:
    bounds = getattr(domain, "bounds", None)
    if bounds is None or not hasattr(domain, "contains"):
        raise ValueError(
            "`domain` must be an `eqx_bilevel.Box` or another domain with `bounds` and "
            f"`contains`, got a {type(domain).__name__}."
        )
    # Floating-point numbers, of a dtype that JAX has.
    lower, upper = (np.atleast_1d(np.asarray(1.0 * jnp.asarray(x))) for x in bounds)
    return lower, upper


def coordinate_names(names: Sequence[str] | None, dim: int) -> tuple[str, ...]:
    if names is None:
        # Numbered as in `u.d(0)`.
        return ("x",) if dim == 1 else tuple(f"x_{i}" for i in range(dim))
    if isinstance(names, str) or len(names) != dim:
        raise ValueError(
            f"`names` must be {dim} strings, one for each coordinate, got {names!r}."
        )
    return tuple(names)


def _checked_fix(fix: Mapping[int, Any] | None, dim: int) -> dict[int, float]:
    fix = {} if fix is None else dict(fix)
    for axis in fix:
        if not isinstance(axis, int) or not 0 <= axis < dim:
            raise ValueError(
                f"`fix` must have integers from 0 to {dim - 1} as keys, the axes of "
                f"coordinates that are held, got {axis!r}."
            )
    return {axis: float(value) for axis, value in fix.items()}


def _checked_resolution(resolution: int | None, default: int) -> int:
    found = default if resolution is None else operator.index(resolution)
    if found < 2:
        raise ValueError(f"`resolution` must be at least 2, got {resolution}.")
    return found


def _check_free(axes, most: int, lower, upper) -> None:
    if len(axes) == 0:
        raise ValueError("`fix` holds all coordinates: leave one out, which varies.")
    if len(axes) > most:
        middle = {i: float(lower[i] + upper[i]) / 2 for i in axes[most:]}
        raise ValueError(
            f"At most {most} of the coordinates can vary here, but {len(axes)} do. "
            f"Hold the others by `fix`, for example fix={middle}."
        )


# Points for each coordinate, by how many coordinates vary.
RESOLUTION = (400, 100)


def make_grid(
    domain: Any,
    fix: Mapping[int, Any] | None,
    names: Sequence[str] | None,
    resolution: int | None,
    *,
    defaults: tuple[int, int] = RESOLUTION,
    most_axes: int = 2,
) -> Grid:
    lower, upper = bounding_box(domain)
    dim = len(lower)
    fixed = _checked_fix(fix, dim)
    axes = tuple(i for i in range(dim) if i not in fixed)
    _check_free(axes, most_axes, lower, upper)
    num = _checked_resolution(resolution, defaults[len(axes) - 1])
    all_names = coordinate_names(names, len(lower))
    ticks, points, outside = _lattice(domain, lower, upper, fixed, num)
    if resolution is None and np.any(outside):  # A rim that is not straight needs more.
        ticks, points, outside = _lattice(domain, lower, upper, fixed, 2 * num)
    if np.all(outside):
        held = f" with fix={fixed}" if fixed else ""
        raise ValueError(f"No point of the plot{held} is in `domain`.")
    return Grid(axes, ticks, all_names, points, outside)


def _lattice(domain, lower, upper, fixed: dict[int, float], num: int):
    axes = [i for i in range(len(lower)) if i not in fixed]
    ticks = tuple(np.linspace(lower[i], upper[i], num) for i in axes)
    columns = dict(zip(axes, np.meshgrid(*ticks, indexing="ij")))
    columns |= {i: np.full(columns[axes[0]].shape, x) for i, x in fixed.items()}
    ravelled = [columns[i].ravel() for i in range(len(lower))]
    points = jnp.asarray(np.stack(ravelled, axis=1), lower.dtype)
    return ticks, points, ~np.asarray(domain.contains(points), bool)
