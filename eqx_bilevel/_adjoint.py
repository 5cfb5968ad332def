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
from jaxtyping import Array, Bool, Float, PyTree

from ._gauss_newton import Root
from ._krylov import FixedPointGMRES
from ._linearised import (
    block_product,
    curvatures,
    join,
    linearise,
    Linearised,
    noise,
    prior_z,
    separate,
)
from ._problem import Problem
from ._system import AbstractPosterior, AbstractSystem


def without_gradient(tree: PyTree) -> PyTree:
    stop = lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x
    return jax.tree.map(stop, tree)


class FrozenAdjoint(optx.AbstractAdjoint):
    """The point of linearisation is held fixed: the solution depends on hyperparameters
    only as the last linearised problem does. This is the gradient of the paper
    ([arXiv:2510.05568](https://arxiv.org/abs/2510.05568)). It is exact for linear
    conditions, and otherwise wrong by at most about the spectral radius that
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
    It should need only products with the matrix. Default: GMRES with a relative
    tolerance of 1e-10 and at most 100 products, without restarts. If more than 1e-4 of
    the right-hand side is left then the derivative raises a runtime error, or is nan
    with the environment variable `EQX_ON_ERROR=nan`.
"""


#
# What vanishes at the solution
#


def _optimality(root: Root, residual, inputs) -> Root:
    # With u = m + k phi(z)^T w:  z = S u,  phi(z) (u - m) + Gamma w = rhs(z).
    problem, state = _problem(inputs), _state(residual)
    z, weights = root
    linearised = linearise(problem, z)
    system = _system(inputs)
    applied, changes = system.changes(problem, linearised, state.factor, weights)
    added = noise(problem, state.jitter).mv(weights)
    misfit = applied + added - linearised.rhs
    return Root(z - prior_z(problem) - changes, misfit)


def _linearised_optimality(root: Root, residual, inputs) -> Root:
    # What is only read depends on hyperparameters all the same.
    problem, fixed = _problem(inputs), jax.lax.stop_gradient(root.z)
    left, misfit = _optimality(Root(fixed, root.weights), residual, inputs)
    z, read = separate(problem, left)
    return Root(root.z - fixed + join(problem, jnp.zeros_like(z), read), misfit)


# Optimistix asks for functions without closure, and jaxtyping's import hook adds one.
def _unhooked(fn):
    hooked = fn.__globals__["__name__"].startswith("jaxtyping")
    return fn.__wrapped__ if hooked else fn


_optimality = _unhooked(_optimality)
_linearised_optimality = _unhooked(_linearised_optimality)


# These know how Optimistix passes its arguments on.
def _problem(inputs) -> Problem:
    return inputs[3]


def _system(inputs) -> AbstractSystem:
    return inputs[1].system


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
# Entries of z that are only read have H = 0 too, and just follow from the others.
#


class _System(eqx.Module):
    problem: Problem
    linearised: Linearised  # its conditions
    system: AbstractSystem
    factor: PyTree
    jitter: Float[Array, ""]
    posterior: AbstractPosterior | None
    hessian: list[Array] | None
    ok: Bool[Array, ""]
    transposed: bool = eqx.field(static=True)

    def inverse(self, vector: Float[Array, " M"]) -> Float[Array, " M"]:
        at = self.problem.conditions, self.linearised, self.jitter, self.factor
        return self.system.solve(*at, vector)


class _Elimination(lx.AbstractLinearSolver):
    # For Jacobians of the two functions above, and nothing else.
    linear_solver: lx.AbstractLinearSolver | None  # for z, if it is not fixed

    def init(self, operator: Any, options):
        del options
        root, (_, residual, inputs) = operator.x, operator.args
        problem, system, state = _problem(inputs), _system(inputs), _state(residual)
        conditions = problem.conditions
        z, _ = separate(problem, root.z)
        linearised = linearise(conditions, z)
        if self.linear_solver is None:
            posterior = hessian = None
        else:
            at = conditions, linearised, state.jitter, state.factor
            posterior = system.posterior(*at)
            hessian = curvatures(conditions, z, root.weights)
        return _System(
            problem=problem,
            linearised=linearised,
            system=system,
            factor=state.factor,
            jitter=state.jitter,
            posterior=posterior,
            hessian=hessian,
            ok=_ok(residual),
            transposed=False,
        )

    def compute(self, state: _System, vector: Root, options):
        del options
        # After a failure there is nothing to differentiate, and nan would raise.
        clean = lambda x: jnp.where(state.ok, x, jnp.zeros_like(x))
        vector = jax.tree.map(clean, vector)
        z, read = separate(state.problem, vector.z)
        if state.transposed:
            bent, more = _read_transposed(state, read)
            right = z, bent, vector.weights + more
            z, weights, result = self._eliminate(state, *right)
        else:
            right = z, jnp.zeros_like(z), vector.weights
            z, weights, result = self._eliminate(state, *right)
            read = read + _read(state, z, weights)
        root = Root(join(state.problem, z, read), weights)
        return jax.tree.map(clean, root), result, {}

    def _eliminate(self, state: _System, z, bent, weights):
        # For right-hand sides z + H bent, in the transposed system, and w.
        inverse, posterior = state.inverse, state.posterior
        if self.linear_solver is None or posterior is None:
            return z, inverse(weights), lx.RESULTS.successful
        hessian = ft.partial(_hessian_product, state)
        from_weights, to_conditions = posterior.from_weights, posterior.to_conditions
        if state.transposed:
            reduced = z + hessian(bent - from_weights(inverse(weights)))
            product = lambda dz: dz - hessian(posterior.covariance(dz))
        else:
            reduced = z + from_weights(inverse(weights))
            product = lambda dz: dz - posterior.covariance(hessian(dz))
        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: reduced))
        sol = lx.linear_solve(operator, reduced, self.linear_solver, throw=False)
        z = sol.value
        change = to_conditions(z if state.transposed else -hessian(z))
        result = lx.RESULTS.where(state.ok, sol.result, lx.RESULTS.successful)
        return z, inverse(weights + change), result

    def transpose(self, state: _System, options):
        return dataclasses.replace(state, transposed=not state.transposed), options

    def conj(self, state: _System, options):
        return state, options

    def assume_full_rank(self):
        return True


def _hessian_product(state: _System, dz):
    assert state.hessian is not None
    return block_product(state.problem.conditions, state.hessian, dz)


def _read(state: _System, z, weights) -> Array:
    # By how much what is only read changes with z and w: the rest of the first row.
    if state.problem.readings.z_size == 0:
        return z[:0]
    bent = None if state.hessian is None else _hessian_product(state, z)
    at = state.problem, state.linearised, state.factor
    return state.system.read(*at, weights, bent)


def _read_transposed(state: _System, read) -> tuple[Array, Array]:
    # The transpose of that, less the factor H.
    conditions = state.problem.conditions
    if state.problem.readings.z_size == 0:
        zero = lambda size: jnp.zeros(size, state.problem.dtype)
        return zero(conditions.z_size), zero(conditions.size)
    at = state.problem, state.linearised, state.factor
    return state.system.read_transposed(*at, read)
