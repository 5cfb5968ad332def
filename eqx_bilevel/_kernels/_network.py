from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._geometry import as_key
from .._parameters import AbstractParameter, value_of
from ._fields import ParameterLike, positive_field


class LengthscaleNetwork(eqx.Module):
    r"""A neural network for the lengthscale of [`eqx_bilevel.Gibbs`][]: a multilayer
    perceptron with $\tanh$, followed by `scale` times a softplus function, so that what
    it returns is positive.
    """

    mlp: eqx.nn.MLP
    scale: AbstractParameter

    def __init__(
        self,
        in_size: int,
        out_size: int | Literal["scalar"] = "scalar",
        width_size: int = 50,
        depth: int = 2,
        scale: ParameterLike = 1.0,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_size`: the dimension $d$ of the points.
        - `out_size`: `"scalar"` for one lengthscale that serves for all dimensions, or
            $d$ for one lengthscale per dimension.
        - `width_size`: the number of units of each hidden layer.
        - `depth`: the number of hidden layers.
        - `scale`: a positive number that multiplies the output, or one for each
            dimension. It is learned, unless it is in [`eqx_bilevel.Frozen`][]. A new
            network returns about 0.7 times it.
        - `key`: a `jax.random.key` for the initial weights. Keyword only argument.
        """
        if out_size != "scalar" and out_size != in_size:
            raise ValueError(
                "`out_size` must be 'scalar' or equal to `in_size`, one lengthscale "
                f"per dimension; got out_size={out_size!r} and in_size={in_size}."
            )
        if out_size != "scalar" and not isinstance(scale, AbstractParameter):
            # As many as a search for the scale of each dimension finds.
            scale = jnp.broadcast_to(jnp.asarray(scale, float), (out_size,))
        key = as_key(key)
        self.scale = positive_field("scale", 1)(scale)
        self.mlp = eqx.nn.MLP(
            in_size, out_size, width_size, depth, activation=jnp.tanh, key=key
        )

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: a point.

        **Returns:**

        Its lengthscale: a scalar, or an array with one entry for each dimension.
        """
        if x.shape != (self.mlp.in_size,):
            raise ValueError(
                f"The network was made with in_size={self.mlp.in_size}, but is called "
                f"with a point of shape {x.shape}."
            )
        z = self.mlp(x)
        # The softplus of a large negative number is exactly zero.
        positive = jax.nn.softplus(z) + float(jnp.finfo(z.dtype).eps)
        return jnp.asarray(value_of(self.scale), z.dtype) * positive
