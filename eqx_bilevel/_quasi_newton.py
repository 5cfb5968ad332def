"""BFGS with steps of bounded length."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from equinox.internal import ω
from jaxtyping import Array, Bool, PyTree, Scalar


class _BoundedState(eqx.Module):
    newton: Any
    first: Bool[Array, ""]


class _BoundedNewtonDescent(optx.AbstractDescent):
    # The Newton direction, but no longer than `max_length`. The first step has just
    # that length, since before it nothing is known of the curvature.
    max_length: Array

    def init(self, y, f_info_struct):
        return _BoundedState(y, jnp.array(True))

    def query(self, y, f_info, state):
        newton = f_info.hessian_inv.mv(f_info.grad)
        length = optx.two_norm(newton)
        longest = self.max_length.astype(length.dtype)
        bounded = (length > longest) | state.first
        scale = jnp.where(bounded, longest / jnp.maximum(length, 1e-30), 1)
        return _BoundedState((scale * newton**ω).ω, jnp.array(False))

    def step(self, step_size, state):
        return (-step_size * state.newton**ω).ω, optx.RESULTS.successful


def _silent(**kwargs):
    del kwargs


class BoundedBFGS(optx.AbstractBFGS):
    """`optimistix.BFGS` with steps of bounded length. For hyperparameters on a
    logarithmic scale, such as [`eqx_bilevel.Positive`][] ones, a full step can be wrong
    by orders of magnitude as long as little is known of the curvature.
    """

    rtol: float
    atol: float
    norm: Callable[[PyTree], Scalar]
    use_inverse: bool
    descent: _BoundedNewtonDescent
    search: optx.BacktrackingArmijo
    verbose: Callable[..., None]

    def __init__(
        self,
        rtol: float,
        atol: float,
        norm: Callable[[PyTree], Scalar] = optx.max_norm,
        max_length: float = 0.7,
    ):
        self.rtol = rtol
        self.atol = atol
        self.norm = norm
        self.use_inverse = True
        self.descent = _BoundedNewtonDescent(jnp.asarray(max_length))
        self.search = optx.BacktrackingArmijo()
        self.verbose = _silent

    def with_max_length(self, max_length: float) -> "BoundedBFGS":
        return BoundedBFGS(self.rtol, self.atol, self.norm, max_length)


BoundedBFGS.__init__.__doc__ = """**Arguments:**

- `rtol`, `atol`, `norm`: As for `optimistix.BFGS`.
- `max_length`: The largest length of a step, which is also that of the first one. The
    default is a factor of two for one logarithm.
"""
