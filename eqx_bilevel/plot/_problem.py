"""Plots of what a problem is made of: its points and its lengthscales."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .._condition import Condition
from .._kernels import (
    AbstractKernel,
    Gibbs,
    Product,
    Scaled,
    Stretched,
    Subspace,
    Sum,
    Warped,
)
from .._parameters import unwrap
from .._problem import condition_name, names_of, priors_of
from .._uncertainty import HyperparameterPosterior
from ._draw import draw
from ._grid import coordinate_names, Grid, make_grid
from ._style import legend, mathematical, one_or_all, panels


def points(
    conditions: Any,
    *,
    names: Sequence[str] | None = None,
    axes: tuple[int, int] = (0, 1),
    ax: Any = None,
) -> Any:
    """Draws the points of conditions, each in a colour of its own.

    **Arguments:**

    - `conditions`: A list of [`eqx_bilevel.Condition`][]s, or something that has them:
        what [`eqx_bilevel.solve`][] or [`eqx_bilevel.learn`][] returns.

    The remaining arguments are keyword-only.

    - `names`: The names of all coordinates, as in `names=("t", "x")`.
    - `axes`: The two coordinates that are drawn, if there are more.
    - `ax`: The Matplotlib `Axes` to draw into. Default: a new figure.

    **Returns:**

    The `Axes`.

    **Raises:**

    A `ValueError` for wrong arguments.
    """
    conditions = getattr(conditions, "conditions", conditions)
    conditions = [conditions] if isinstance(conditions, Condition) else conditions
    wrong = [type(c).__name__ for c in conditions if not isinstance(c, Condition)]
    if wrong or len(conditions) == 0:
        raise ValueError(
            "`conditions` must be a list of `eqx_bilevel.Condition`s, got "
            f"{', '.join(wrong) or 'an empty one'}."
        )
    dim = conditions[0].points.shape[1]
    coordinates = [mathematical(name) for name in coordinate_names(names, dim)]
    labels = [condition_name(c, i) for i, c in enumerate(conditions)]
    if dim == 1:
        size = (4.8, 1.0 + 0.4 * len(labels))
        (ax,) = panels(1, ax, "for all points", figsize=size)
        _draw_rows(ax, conditions, labels)
        _label(ax, coordinates)
        return ax
    first, second = _checked_axes(axes, dim)
    (ax,) = panels(1, ax, "for all points")
    # Of a colour map they stand out by their edges.
    edges = dict(_DOTS, mew=0.7, mec="white", ms=4.5) if ax.images else _DOTS
    for condition, label in zip(conditions, labels):
        found = np.asarray(condition.points)
        style = dict(edges, label=label, clip_on=False)
        ax.plot(found[:, first], found[:, second], **style)
    _label(ax, [coordinates[first], coordinates[second]])
    ax.grid(False)
    above = dict(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(4, len(labels)))
    legend(ax, columnspacing=1.2, handletextpad=0.1, **above)
    return ax


def _draw_rows(ax: Any, conditions: Sequence[Condition], labels: list[str]) -> None:
    for height, condition in enumerate(conditions):
        x = np.asarray(condition.points[:, 0])
        ax.plot(x, np.full(len(x), height), clip_on=False, **_DOTS)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def _label(ax: Any, coordinates: list[str]) -> None:
    # Those of a plot that points are drawn into are right already.
    for axis, label in zip((ax.xaxis, ax.yaxis), coordinates):
        if axis.get_label_text() == "":
            axis.set_label_text(label)


_DOTS = dict(ls="none", marker="o", ms=3.5, mew=0)


def _checked_axes(axes: tuple[int, int], dim: int) -> tuple[int, int]:
    if len(set(axes)) != 2 or not all(axis in range(dim) for axis in axes):
        raise ValueError(
            f"`axes` must be two different coordinates from 0 to {dim - 1}, got {axes}."
        )
    return axes


def lengthscales(
    prior: Any,
    domain: Any,
    *,
    fix: Mapping[int, ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    resolution: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws how lengthscales vary from point to point: those of all
    [`eqx_bilevel.Gibbs`][] kernels in a prior, also inside sums, products and the like.
    There is a panel for each of them, and for each dimension if it has one for each.

    **Arguments:**

    - `prior`: A kernel; an [`eqx_bilevel.GaussianProcess`][], or a dictionary of them;
        or something that has a prior: what [`eqx_bilevel.solve`][] or
        [`eqx_bilevel.learn`][] returns.
    - `domain`: As for [`eqx_bilevel.plot.solution`][].

    The remaining arguments are keyword-only: as for [`eqx_bilevel.plot.solution`][].

    **Returns:**

    The `Axes`, or a NumPy array of them if there are several panels.

    **Raises:**

    A `ValueError` for wrong arguments, and if no lengthscale varies.
    """
    kernels = _kernels_of(prior)
    grid = make_grid(domain, fix, names, resolution)
    dim = grid.points.shape[1]
    fields = []
    for name, kernel in kernels.items():
        found = list(_fields(unwrap(kernel), lambda x: x, tuple(range(dim))))
        for number, field in enumerate(found, start=1):
            label = "lengthscale" if len(found) == 1 else f"lengthscale {number}"
            label = f"{label} of {mathematical(name)}" if len(kernels) > 1 else label
            fields.extend(_components(field, grid, label))
    if len(fields) == 0:
        raise ValueError(
            "No lengthscale in `prior` varies from point to point: there is no "
            "`eqx_bilevel.Gibbs` kernel in it."
        )
    axes = panels(len(fields), ax, "one for each lengthscale")
    for panel, (label, values) in zip(axes, fields):
        draw(panel, grid, values, label)
    return one_or_all(axes)


def _kernels_of(prior: Any) -> dict[str, AbstractKernel]:
    if isinstance(prior, AbstractKernel):
        return {"u": prior}
    prior = prior.solution if isinstance(prior, HyperparameterPosterior) else prior
    prior = getattr(prior, "prior", prior)
    names_of(prior)  # Raises if it is something else.
    return {name: p.kernel for name, p in priors_of(prior).items()}


class _Field(NamedTuple):
    # The lengthscale at a point of the domain, in its units.
    at: Callable[[Array], Array]
    # The coordinates that its entries are for, if they are coordinates of the domain.
    dims: tuple[int, ...] | None


def _fields(
    kernel: Any, to: Callable, dims: tuple[int, ...] | None, scale: Any = 1.0
) -> Iterator[_Field]:
    # Of an unwrapped kernel which is given `to(x)` in the place of a point x, and for
    # which a length is `scale` times what it is there.
    if isinstance(kernel, Gibbs):
        length: Any = kernel.lengthscale
        yield _Field(lambda x: scale * jnp.asarray(length(to(x))), dims)
    elif isinstance(kernel, Sum | Product):
        for each in kernel.kernels:
            yield from _fields(each, to, dims, scale)
    elif isinstance(kernel, Scaled):
        yield from _fields(kernel.kernel, to, dims, scale)
    elif isinstance(kernel, Stretched):
        factor = kernel.factor
        yield from _fields(
            kernel.kernel, lambda x: to(x) / factor, dims, scale * factor
        )
    elif isinstance(kernel, Subspace):
        kept = np.array(kernel.dims)
        dims = None if dims is None else tuple(dims[i] for i in kept)
        scale = scale[kept] if np.ndim(scale) == 1 else scale
        yield from _fields(kernel.kernel, lambda x: to(x)[kept], dims, scale)
    elif isinstance(kernel, Warped):
        warp: Any = kernel.warp
        yield from _fields(kernel.kernel, lambda x: warp(to(x)), None)


def _components(
    field: _Field, grid: Grid, label: str
) -> Iterator[tuple[str, np.ndarray]]:
    values = np.asarray(jax.vmap(field.at)(grid.points))
    if values.ndim == 1:
        yield label, values
        return
    dims = field.dims
    for i, column in enumerate(values.T):
        name = f"{i}" if dims is None else mathematical(grid.names[dims[i]])
        yield f"{label}, {name}", column
