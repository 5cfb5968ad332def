import abc
import functools as ft
import math
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._parameters import AbstractParameter, value_of
from ._fields import common_factor, multiply_parameter, per_dimension, replace


_Kernel = TypeVar("_Kernel")


class AbstractKernel(eqx.Module):
    """Abstract base class for all kernels: symmetric positive semidefinite functions
    $k(x, y)$ of two points.

    A kernel of your own is a subclass with a `__call__`, written in plain `jax.numpy`.
    It must be possible to differentiate it with respect to either point as often as the
    conditions of the problem differentiate the unknown function, also at $x = y$.

    Kernels are combined by arithmetic:

    - `kernel + kernel` is a [`eqx_bilevel.Sum`][] and `kernel * kernel` is a
        [`eqx_bilevel.Product`][];
    - `variance * kernel`, with a number, a scalar array or a parameter, is a
        [`eqx_bilevel.Scaled`][]. The variance is learned, unless it is wrapped in
        [`eqx_bilevel.Frozen`][];
    - `kernel + number` adds a [`eqx_bilevel.Constant`][].
    """

    # Without this `np.float64(2.0) * kernel` would be attempted by NumPy, which makes
    # an array of objects of it.
    __array_ufunc__ = None

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `x`: a point.
        - `y`: a point.

        **Returns:**

        The kernel $k(x, y)$, a scalar.
        """

    def __add__(self, other: Any) -> "AbstractKernel":
        # The results' classes are kernels themselves, so their file imports this one;
        # hence the imports inside functions.
        from ._algebra import add

        return add(self, other)

    def __radd__(self, other: Any) -> "AbstractKernel":
        from ._algebra import add

        return add(other, self)

    def __mul__(self, other: Any) -> "AbstractKernel":
        from ._algebra import multiply

        return multiply(self, other)

    def __rmul__(self, other: Any) -> "AbstractKernel":
        from ._algebra import multiply

        return multiply(other, self)


class AbstractRadialKernel(AbstractKernel):
    r"""Abstract base class for kernels that depend on a scaled distance only,
    $k(x, y) = \varphi(s)$ with $s = \sum_d (x_d - y_d)^2 / \ell_d^2$.

    The derivatives of such a kernel need no automatic differentiation: they are
    derivatives of $\varphi$ multiplied by polynomials in $x - y$.
    """

    lengthscale: eqx.AbstractVar[AbstractParameter]

    @abc.abstractmethod
    def profile(self, s: Float[Array, ""], order: int) -> tuple[Float[Array, ""], ...]:
        r"""The function $\varphi$ and its derivatives with respect to $s$.

        A derivative that is singular at $s = 0$ must be finite there, and so must its
        gradients: it is multiplied by powers of $x - y$ which vanish.

        **Arguments:**

        - `s`: the squared distance, after division by the lengthscale.
        - `order`: how many derivatives to return. A Python integer.

        **Returns:**

        The tuple $(\varphi(s), \varphi'(s), \dots, \varphi^{(\text{order})}(s))$.
        """

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        lengthscale = per_dimension("lengthscale", self.lengthscale, x)
        z = (x - y) / lengthscale
        # From differences: |x|^2 + |y|^2 - 2 x.y would cancel the digits that a small
        # nugget needs.
        return self.profile(jnp.sum(z * z), 0)[0]


class AbstractFeatureKernel(AbstractKernel):
    r"""Abstract base class for kernels $k(x, y) = p(f(x), f(y))$.

    Whatever is costly (a neural network, say) belongs into the features $f$, which are
    evaluated and differentiated once per point. The function $p$ is evaluated once per
    pair of points.
    """

    @abc.abstractmethod
    def features(self, x: Float[Array, " d"]) -> PyTree[Array]:
        """**Arguments:**

        - `x`: a point.

        **Returns:**

        The features $f(x)$: any PyTree of arrays.
        """

    @abc.abstractmethod
    def pair(self, f: PyTree[Array], g: PyTree[Array]) -> Float[Array, ""]:
        """**Arguments:**

        - `f`: the features of one point.
        - `g`: the features of another point.

        **Returns:**

        The value of the kernel, a scalar.
        """

    def __call__(
        self, x: Float[Array, " d"], y: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return self.pair(self.features(x), self.features(y))


@ft.singledispatch
def smoothness(kernel: Any) -> int | float:
    """How often a function drawn from the prior with this kernel can be differentiated:
    the kernel has this many derivatives in each of its two arguments.

    This is a `functools.singledispatch` function. Register it for a kernel of your own
    that is not infinitely smooth, which is what is assumed otherwise:

    ```python
    @eqx_bilevel.smoothness.register(MyKernel)
    def _(kernel):
        return 1
    ```

    **Arguments:**

    - `kernel`: a kernel.

    **Returns:**

    A non-negative integer, or `math.inf`.
    """
    del kernel
    return math.inf


@smoothness.register(AbstractParameter)
def _(kernel: AbstractParameter) -> int | float:
    return smoothness(value_of(kernel))


@ft.singledispatch
def rescale(kernel: Any, factor: ArrayLike) -> Any:
    """Multiplies all lengthscales of a kernel by a common factor, or by one for each
    dimension.

    Parameters keep their wrappers: one in [`eqx_bilevel.Bounded`][] stays inside its
    bounds, and whatever is [`eqx_bilevel.Frozen`][] is left as it is. Kernels that have
    no lengthscale, such as [`eqx_bilevel.Polynomial`][], are not changed.

    This is a `functools.singledispatch` function. A kernel of your own for which it is
    not registered is wrapped into [`eqx_bilevel.Stretched`][]. Register it if the
    kernel has a length, a parameter `width` for instance:

    ```python
    @eqx_bilevel.rescale.register(MyKernel)
    def _(kernel, factor):
        factor = jnp.exp(jnp.mean(jnp.log(factor)))  # One for all dimensions.
        new = eqx_bilevel.with_value(kernel.width, factor * kernel.width.value)
        return eqx.tree_at(lambda k: k.width, kernel, new)
    ```

    **Arguments:**

    - `kernel`: a kernel.
    - `factor`: a positive number, or an array with one for each dimension. Of these,
        lengthscales that serve for several dimensions get the geometric mean. It may be
        traced.

    **Returns:**

    A kernel.
    """
    from ._algebra import Stretched  # It imports this file; see `AbstractKernel`.

    return Stretched(kernel, common_factor(factor))


@rescale.register(AbstractParameter)
def _(kernel: AbstractParameter, factor: ArrayLike) -> AbstractParameter:
    # Only `Frozen` can hold a whole kernel.
    del factor
    return kernel


@rescale.register(AbstractRadialKernel)
def _(kernel: AbstractRadialKernel, factor: ArrayLike) -> AbstractRadialKernel:
    return rescale_lengthscale(kernel, factor)


def rescale_lengthscale(kernel: Any, factor: ArrayLike) -> Any:
    new = multiply_parameter(kernel.lengthscale, factor)
    return replace(kernel, "lengthscale", new)


# Accepts kernels, also frozen ones.
def as_kernel(kernel: _Kernel) -> _Kernel:
    if not isinstance(value_of(kernel), AbstractKernel):
        raise ValueError(f"`kernel` must be an `AbstractKernel`; got {kernel!r}.")
    return kernel
