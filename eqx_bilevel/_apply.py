from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from ._jets import derivative, view


def apply(
    operator: Callable,
    fn: Callable | Mapping[str, Callable],
    x: Float[ArrayLike, "*n d"],
) -> PyTree[Array]:
    r"""What an operator makes of functions that are known, by automatic
    differentiation. Of a chosen solution, this gives the targets of the problem that it
    solves:

    !!! example

        ```python
        exact = lambda x: jnp.sin(x[0]) * jnp.cos(x[1])
        target = lambda x: eqx_bilevel.apply(operator, exact, x)
        eqx_bilevel.Condition(operator, points, target)
        ```

    **Arguments:**

    - `operator`: as for [`eqx_bilevel.Condition`][].
    - `fn`: a function of a point, of shape `(d,)`, that returns a scalar; or a
        dictionary of them, if there are several unknowns.
    - `x`: one point of shape `(d,)` or many of shape `(n, d)`.

    **Returns:**

    What the operator returns, for each point.

    **Raises:**

    A `ValueError` if `x` is not one point or many, or if a function does not return a
    scalar.
    """
    x = jnp.asarray(x)
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)
    if x.ndim not in (1, 2):
        raise ValueError(
            "`x` must be one point of shape (d,) or many of shape (n, d), got shape "
            f"{x.shape}."
        )
    single = not isinstance(fn, Mapping)
    functions = {"": fn} if single else dict(fn)

    def at(x):
        for name, function in functions.items():
            shape = jax.eval_shape(function, x).shape
            if shape != ():
                of = f" from {name!r}" if name else ""
                raise ValueError(
                    f"`fn` must return a scalar at each point, got shape {shape}{of}."
                )
        get = lambda name, index: derivative(functions[name], index)(x)
        return operator(view(tuple(functions), single, get, x.shape[0]), x)

    return at(x) if x.ndim == 1 else jax.vmap(at)(x)
