"""Derivatives of the inner solve."""

import functools as ft

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

from ._gauss_newton import posterior_product, read_z, representer_weights
from ._krylov import FixedPointGMRES
from ._problem import curvature_product, linearise


def without_gradient(tree: PyTree) -> PyTree:
    stop = lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x
    return jax.tree.map(stop, tree)


class FrozenAdjoint(optx.AbstractAdjoint):
    """The point of linearisation is held fixed: the solution depends on hyperparameters
    only as the last linearised problem does. This is the gradient of the paper
    ([arXiv:2510.05568](https://arxiv.org/abs/2510.05568)). It is exact for linear
    conditions, and otherwise wrong by about the spectral radius that
    [`eqx_bilevel.Solution`][] reports, relatively.
    """

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        inputs = inputs + (ft.partial(eqxi.while_loop, kind="lax"),)
        return primal_fn(without_gradient(inputs))


FrozenAdjoint.__init__.__doc__ = """**Arguments:** none."""


class FixedPointAdjoint(optx.AbstractAdjoint):
    """Exact derivatives of the converged solution, by the implicit function theorem for
    the fixed point $z = T(z, \\theta)$ of the undamped Gauss-Newton map. See
    [the method](../method.md#two-gradients).
    """

    linear_solver: lx.AbstractLinearSolver = FixedPointGMRES()

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        # Not Optimistix's rewrite: it is the gradient of |z - T(z)|^2 / 2, which
        # squares the condition number.
        inputs = inputs + (ft.partial(eqxi.while_loop, kind="lax"),)
        return optx.internal.implicit_jvp(
            primal_fn, _fixed_point, inputs, frozenset(), self.linear_solver
        )


FixedPointAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: A Lineax solver for the system with $I - \\partial T / \\partial z$.
    It should need only products with the matrix.
"""


def _fixed_point(root, residual, inputs):
    _, solver, _, problem, *_ = inputs
    _, result, _, _, _, stats = residual
    state = stats["state"]
    z = jax.lax.stop_gradient(root)
    linearised = linearise(problem, z)
    weights = representer_weights(
        problem, linearised, state.jitter, solver.linear_solver, state.factor
    )
    new_z = read_z(problem, linearised, weights)
    # dT/dz = C_post blockdiag(w . R''), as a term whose value is zero.
    fixed = without_gradient(problem)
    posterior = posterior_product(
        fixed, without_gradient(linearised), solver.linear_solver, state.factor
    )
    change = posterior(curvature_product(fixed, z, state.weights, root - z))
    # After a failure there is nothing to differentiate: the derivative is zero.
    ok = (result != optx.RESULTS.singular) & jnp.isfinite(state.change)
    return jnp.where(ok, root - new_z - change, root - z)


# Optimistix asks for functions without closure, and jaxtyping's import hook adds one.
if _fixed_point.__globals__["__name__"].startswith("jaxtyping"):
    _fixed_point = _fixed_point.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
