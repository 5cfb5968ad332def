"""Derivatives of the inner solve."""

import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from ._gauss_newton import Root
from ._krylov import FixedPointGMRES
from ._problem import (
    block_product,
    curvatures,
    jet_changes,
    linearise,
    noise_variances,
    Problem,
)
from ._representer import GramInverse, PosteriorCovariance


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
        return optx.internal.implicit_jvp(
            primal_fn, _linearised_optimality, inputs, frozenset(), _Elimination(None)
        )


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
        solver = _Elimination(self.linear_solver)
        return optx.internal.implicit_jvp(
            primal_fn, _optimality, inputs, frozenset(), solver
        )


FixedPointAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: A Lineax solver for the system with $I - \\partial T / \\partial z$.
    It should need only products with the matrix.
"""


#
# What vanishes at the solution
#


def _optimality(root: Root, residual, inputs) -> Root:
    # With u = m + k phi(z)^T w:  z = S u,  phi(z) (u - m) + Gamma w = rhs(z).
    problem, state = _problem(inputs), _state(residual)
    z, weights = root
    linearised = linearise(problem, z)
    changes = jet_changes(problem, linearised.functionals, weights)
    read, applied = [], []
    for r, jacobian, change in zip(problem.rows, linearised.jacobians, changes):
        nonlinear = jnp.array(r.trace.nonlinear, int)
        read.append((r.mean + change)[:, nonlinear].reshape(-1))
        applied.append(jnp.einsum("nqp,np->nq", jacobian, change).reshape(-1))
    gamma = noise_variances(problem, state.jitter)
    misfit = jnp.concatenate(applied) + gamma * weights - linearised.rhs
    return Root(z - jnp.concatenate(read), misfit)


def _linearised_optimality(root: Root, residual, inputs) -> Root:
    fixed = jax.lax.stop_gradient(root.z)
    _, misfit = _optimality(Root(fixed, root.weights), residual, inputs)
    return Root(root.z - fixed, misfit)


# Optimistix asks for functions without closure, and jaxtyping's import hook adds one.
def _unhooked(fn):
    hooked = fn.__globals__["__name__"].startswith("jaxtyping")
    return fn.__wrapped__ if hooked else fn


_optimality = _unhooked(_optimality)
_linearised_optimality = _unhooked(_linearised_optimality)


# These know how Optimistix passes its arguments on.
def _problem(inputs) -> Problem:
    return inputs[3]


def _inner_solver(inputs) -> lx.AbstractLinearSolver:
    return inputs[1].linear_solver


def _state(residual):
    return residual[5]["state"]


def _ok(residual) -> Bool[Array, ""]:
    solved = residual[1] != optx.RESULTS.singular
    return solved & jnp.isfinite(_state(residual).change)


#
# Its linear system: in terms of (z, w), with H = blockdiag(w . R''),
#
#   [ I - S k S^T H    -S k phi^T ]
#   [   phi k S^T H        G      ]
#
# of which w is eliminated with the factor of G that is at hand. That leaves I - C H,
# where C is the posterior covariance of z. `FrozenAdjoint` has H = 0 and no S k phi^T.
#


class _System(eqx.Module):
    gram_inverse: GramInverse
    posterior: PosteriorCovariance | None
    hessian: list[Array] | None
    problem: Problem
    ok: Bool[Array, ""]
    transposed: bool = eqx.field(static=True)


class _Elimination(lx.AbstractLinearSolver):
    # For Jacobians of the two functions above, and nothing else.
    linear_solver: lx.AbstractLinearSolver | None  # for z, if it is not fixed

    def init(self, operator: Any, options):
        del options
        (z, weights), (_, residual, inputs) = operator.x, operator.args
        problem, factor = _problem(inputs), _state(residual).factor
        functionals = linearise(problem, z).functionals
        inverse = GramInverse(
            problem.kernels, functionals, _inner_solver(inputs), factor
        )
        ok = _ok(residual)
        if self.linear_solver is None:
            posterior = hessian = None
        else:
            posterior = PosteriorCovariance(problem, inverse)
            hessian = curvatures(problem, z, weights)
        return _System(inverse, posterior, hessian, problem, ok, False)

    def compute(self, state: _System, vector: Root, options):
        del options
        # After a failure there is nothing to differentiate, and nan would raise.
        clean = lambda x: jnp.where(state.ok, x, jnp.zeros_like(x))
        vector = jax.tree.map(clean, vector)
        result = lx.RESULTS.successful
        if state.posterior is None:
            root = Root(vector.z, state.gram_inverse(vector.weights))
        else:
            root, result = self._eliminate(state, vector)
        result = lx.RESULTS.where(state.ok, result, lx.RESULTS.successful)
        return jax.tree.map(clean, root), result, {}

    def _eliminate(self, state: _System, vector: Root):
        assert self.linear_solver is not None
        assert state.posterior is not None and state.hessian is not None
        inverse, posterior, rows = (
            state.gram_inverse,
            state.posterior,
            state.posterior.rows,
        )
        hessian = ft.partial(block_product, state.problem, state.hessian)
        if state.transposed:
            reduced = vector.z - hessian(rows @ inverse(vector.weights))
            product = lambda dz: dz - hessian(posterior(dz))
        else:
            reduced = vector.z + rows @ inverse(vector.weights)
            product = lambda dz: dz - posterior(hessian(dz))
        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: reduced))
        sol = lx.linear_solve(operator, reduced, self.linear_solver, throw=False)
        z = sol.value
        if state.transposed:
            weights = inverse(vector.weights + rows.T @ z)
        else:
            weights = inverse(vector.weights - rows.T @ hessian(z))
        return Root(z, weights), sol.result

    def transpose(self, state: _System, options):
        return dataclasses.replace(state, transposed=not state.transposed), options

    def conj(self, state: _System, options):
        return state, options

    def assume_full_rank(self):
        return True
