"""Where functions are evaluated for a plot."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._points import Box


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
    bounds = getattr(domain, "bounds", domain)
    bounds = bounds() if callable(bounds) else bounds
    if hasattr(bounds, "lower") and hasattr(bounds, "upper"):
        bounds = bounds.lower, bounds.upper
    if not isinstance(bounds, tuple | list) or not hasattr(domain, "contains"):
        raise ValueError(
            "`domain` must be an `eqx_bilevel.Box` or another domain with `bounds` and "
            f"`contains`, got a {type(domain).__name__}."
        )
    lower, upper = (np.atleast_1d(np.asarray(x)) for x in bounds)
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
    # A rim that is not straight needs more.
    default = defaults[len(axes) - 1] * (1 if isinstance(domain, Box) else 2)
    num = _checked_resolution(resolution, default)
    ticks = tuple(np.linspace(lower[i], upper[i], num) for i in axes)
    lattice = np.meshgrid(*ticks, indexing="ij")
    columns = [
        np.full(num ** len(axes), fixed[i])
        if i in fixed
        else lattice[axes.index(i)].ravel()
        for i in range(dim)
    ]
    points = jnp.asarray(np.stack(columns, axis=1), lower.dtype)
    # Rounding may put the last points of a box outside of it.
    if isinstance(domain, Box):
        inside = np.all([lower[i] <= fixed[i] <= upper[i] for i in fixed])
        outside = np.full(len(points), not inside)
    else:
        outside = ~np.asarray(domain.contains(points), bool)
    if np.all(outside):
        held = f" with fix={fixed}" if fixed else ""
        raise ValueError(f"No point of the plot{held} is in `domain`.")
    return Grid(axes, ticks, coordinate_names(names, dim), points, outside)
