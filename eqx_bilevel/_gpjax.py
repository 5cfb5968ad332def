"""Kernels of GPJax, as kernels of this library."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._kernels import (
    AbstractKernel,
    Constant,
    Gaussian,
    Matern,
    Periodic,
    Polynomial,
    Product,
    RationalQuadratic,
    Scaled,
    smoothness,
    Subspace,
    Sum,
)
from ._parameters import AbstractParameter, Bounded, Frozen, Positive


def from_gpjax(kernel: Any) -> AbstractKernel:
    r"""A kernel of [GPJax](https://github.com/QuantClimate/GPJax), as a kernel of this
    library:

    ```python
    kernel = gpjax.kernels.RBF(lengthscale=0.3) * gpjax.kernels.Linear(active_dims=[0])
    prior = eqx_bilevel.GaussianProcess(eqx_bilevel.from_gpjax(kernel))
    ```

    GPJax's stationary kernels, its `Linear`, `Polynomial` and `Constant`, and sums and
    products of them become those of this library. They have the same values, and their
    derivatives are right also at $x = y$, where GPJax's own formula for the Matérn
    kernels has none. Any other kernel, such as one of your own, is called as it is, and
    has to be written so that it can be differentiated.

    What GPJax trains is learned: an array, or a parameter, which becomes an
    [`eqx_bilevel.Positive`][], or an [`eqx_bilevel.Bounded`][] if it is bounded. Plain
    numbers and whatever is marked by `paramax.non_trainable` are
    [`eqx_bilevel.Frozen`][]. This library's `Periodic` has twice the lengthscale.

    GPJax is an optional dependency: `pip install "eqx_bilevel[gpjax]"`.

    **Arguments:**

    - `kernel`: An instance of `gpjax.kernels.AbstractKernel`.

    **Returns:**

    An [`eqx_bilevel.AbstractKernel`][].

    **Raises:**

    A `ValueError` if `kernel` is not a kernel of GPJax, or not a function of two
    points, as kernels on graphs, of several outputs, or of random features are not. An
    `ImportError` if GPJax is not installed.
    """
    try:
        import gpjax.kernels as gk  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            '`from_gpjax` needs GPJax: `pip install "eqx_bilevel[gpjax]"`.'
        ) from error
    if not isinstance(kernel, gk.AbstractKernel):
        raise ValueError(
            "`kernel` must be an instance of `gpjax.kernels.AbstractKernel`, got "
            f"{kernel!r}."
        )
    return _translated(kernel)


def _translated(kernel: Any) -> AbstractKernel:
    formula = _formula(kernel)
    if formula in _NOT_OF_POINTS:
        raise ValueError(
            f"`kernel` contains a `{type(kernel).__name__}`, which is not a function "
            "of two points."
        )
    if formula in _TRANSLATIONS:
        return _TRANSLATIONS[formula](kernel)
    return _Called(_differentiable(kernel), 0 if formula in _ROUGH else math.inf)


def _formula(x: Any) -> str | None:
    # The kernel of GPJax by whose formula `x` is computed: a subclass may have another.
    for cls in type(x).__mro__:
        if not {"__call__", "_reduce"}.isdisjoint(vars(cls)):
            return cls.__name__ if cls.__module__.startswith("gpjax.") else None
    return None


#
# Kernels that exist here as well
#


def _parameter(x: Any, factor: float = 1.0) -> AbstractParameter:
    import gpjax.parameters  # pyright: ignore[reportMissingImports]
    import paramax  # pyright: ignore[reportMissingImports]

    value = factor * jnp.squeeze(jnp.asarray(paramax.unwrap(x)))
    value = jnp.asarray(value, value.dtype)  # A weak type would be compiled twice.
    if not _is_trained(x):
        return Frozen(value)
    if isinstance(x, gpjax.parameters.SigmoidBounded):
        return Bounded(value, factor * x.low, factor * x.high)
    return Positive(value)


def _is_trained(x: Any) -> bool:
    import paramax  # pyright: ignore[reportMissingImports]

    is_fixed = lambda x: isinstance(x, paramax.NonTrainable)
    return any(map(eqx.is_inexact_array, jax.tree.leaves(x, is_leaf=is_fixed)))


def _on_active_dims(kernel: Any, translated: AbstractKernel) -> AbstractKernel:
    dims = kernel.active_dims
    if dims == slice(None):
        return translated
    if isinstance(dims, slice):
        start, step = dims.start or 0, dims.step or 1
        # GPJax lets the end be open only if it knows the number of dimensions.
        stop = start + step * kernel.n_dims if dims.stop is None else dims.stop
        dims = range(start, stop, step)
    return Subspace(translated, tuple(dims))


def _stationary(kernel: Any, fn: Callable, *args: Any) -> AbstractKernel:
    unscaled = _on_active_dims(kernel, fn(_parameter(kernel.lengthscale), *args))
    return Scaled(unscaled, _parameter(kernel.variance))


def _periodic(kernel: Any) -> AbstractKernel:
    # There sin^2 is multiplied by 1/2, and here by 2.
    lengthscale = _parameter(kernel.lengthscale, 2.0)
    unscaled = Periodic(lengthscale, _parameter(kernel.period))
    return Scaled(_on_active_dims(kernel, unscaled), _parameter(kernel.variance))


def _polynomial(kernel: Any, degree: int, offset: Any) -> AbstractKernel:
    translated = Polynomial(degree, _parameter(kernel.variance), offset)
    return _on_active_dims(kernel, translated)


_MATERN: dict[str | None, Callable[[Any], AbstractKernel]] = {
    "Matern12": lambda k: _stationary(k, Matern, 0.5),
    "Matern32": lambda k: _stationary(k, Matern, 1.5),
    "Matern52": lambda k: _stationary(k, Matern, 2.5),
}
_TRANSLATIONS: dict[str | None, Callable[[Any], AbstractKernel]] = {
    **_MATERN,
    "RBF": lambda k: _stationary(k, Gaussian),
    "RationalQuadratic": lambda k: _stationary(
        k, RationalQuadratic, _parameter(k.alpha)
    ),
    "Periodic": _periodic,
    "Constant": lambda k: Constant(_parameter(k.constant)),
    "Linear": lambda k: _polynomial(k, 1, Frozen(0.0)),
    "Polynomial": lambda k: _polynomial(k, k.degree, _parameter(k.shift)),
    "SumKernel": lambda k: Sum(tuple(map(_translated, k.kernels))),
    "ProductKernel": lambda k: Product(tuple(map(_translated, k.kernels))),
}
_ROUGH = ("ArcCosine", "PoweredExponential", "White")
_NOT_OF_POINTS = ("GraphKernel", "MultiOutputKernel", "RFF")


#
# All others
#


class _Called(AbstractKernel):
    kernel: Any
    times: int | float = eqx.field(static=True)  # that it can be differentiated

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return self.kernel(x, y)


@smoothness.register(_Called)
def _(kernel: _Called) -> int | float:
    is_ours = lambda x: isinstance(x, AbstractKernel)
    nodes = jax.tree.leaves(kernel.kernel, is_leaf=is_ours)
    return min([kernel.times, *map(smoothness, filter(is_ours, nodes))])


def _differentiable(kernel: Any) -> Any:
    # With those kernels inside it replaced that have no derivatives at x = y, and with
    # what is not trained marked as it is here. GPJax takes plain arrays in the place of
    # parameters.
    import paramax  # pyright: ignore[reportMissingImports]

    def is_leaf(x):
        if isinstance(x, paramax.NonTrainable):
            return True
        return x is not kernel and _formula(x) in (*_MATERN, *_ROUGH, *_NOT_OF_POINTS)

    def replace(x):
        if isinstance(x, paramax.NonTrainable):
            return Frozen(x.tree)
        elif is_leaf(x):
            return _translated(x)
        elif eqx.is_inexact_array(x):
            return jnp.asarray(x, x.dtype)
        return x

    return jax.tree.map(replace, kernel, is_leaf=is_leaf)
