"""The inner problem in other unknowns, for any Optimistix least-squares solver."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Float

from ._adjoint import without_gradient
from ._checks import checked, sanitised
from ._condition import Condition, GaussianProcess
from ._gauss_newton import Root
from ._gram import covariance, dense, GramOperator, Noise
from ._jets import residual
from ._linearised import linearise, noise, select, split_jets
from ._parameters import unwrap
from ._problem import Problem
from ._results import RESULTS
from ._solution import Solution
from ._solve import initial_jitter, solution_at
from ._system import DenseSystem, gram_factor, gram_solve


def solve_whitened(
    prior: GaussianProcess | Mapping[str, GaussianProcess],
    conditions: Sequence[Condition],
    solver: optx.AbstractLeastSquaresSolver = optx.LevenbergMarquardt(1e-10, 1e-10),
    *,
    adjoint: optx.AbstractAdjoint = optx.ImplicitAdjoint(),
    max_steps: int = 256,
    throw: bool = True,
) -> Solution:
    """Solves the same problem as [`eqx_bilevel.solve`][] by another route, with any
    Optimistix least-squares solver and with Optimistix's own derivatives.

    The unknowns are whitened coefficients: all derivatives of $u$ that the operators
    use, at all points, are $m + L v$ with $L L^\\top$ their prior covariance, and the
    sum of squares of $v$ and of the weighted residuals is minimised. There are several
    times more unknowns than in [`eqx_bilevel.solve`][] and the problem is worse
    conditioned, so it is for small problems: to try out other solvers, and to check.

    **Arguments:**

    - `prior`, `conditions`: As for [`eqx_bilevel.solve`][].
    - `solver`: An Optimistix least-squares solver.

    The remaining arguments are keyword-only.

    - `adjoint`: An Optimistix adjoint.
    - `max_steps`: The largest number of the solver's steps.
    - `throw`: As for [`eqx_bilevel.solve`][].

    **Returns:**

    An [`eqx_bilevel.Solution`][].

    **Raises:**

    As [`eqx_bilevel.solve`][]; and a `ValueError` if `solver` is not an Optimistix
    least-squares solver.
    """
    if not isinstance(solver, optx.AbstractLeastSquaresSolver):
        raise ValueError(
            "`solver` must be an Optimistix least-squares solver, got a "
            f"{type(solver).__name__}."
        )
    prior, conditions = checked(prior, conditions)
    return _solve_whitened(prior, conditions, solver, adjoint, max_steps, throw)


class _Args(eqx.Module):
    problem: Problem
    root: Float[Array, "P P"]
    noise: Noise


def _jets(v, args: _Args) -> list[Float[Array, "n p"]]:
    changes = split_jets(args.problem, args.root @ v)
    return [r.mean + change for r, change in zip(args.problem.rows, changes)]


def _whitened_residual(v, args: _Args):
    misfits = []
    for r, values in zip(args.problem.rows, _jets(v, args)):
        at = lambda values, x, r=r: residual(
            r.operator, r.unknowns, r.trace.jets, list(values), x
        )
        found = r.sums(jax.vmap(at)(values, r.points))
        misfits.append((found - r.target).reshape(-1))
    return v, args.noise.whiten(jnp.concatenate(misfits))


def _root(covariance: Float[Array, "P P"]) -> Float[Array, "P P"]:
    # L with L L^T = covariance, less what is below rounding. An eigendecomposition has
    # no usable derivative where eigenvalues are close, so it is held fixed and only
    # chooses a basis, in which the covariance is the identity up to its derivative.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(covariance))
    kept = values > 10 * jnp.finfo(values.dtype).eps * values[-1]
    scale = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    basis = vectors * scale[None, :]
    inner = basis.T @ covariance @ basis + jnp.diag(jnp.where(kept, 0.0, 1.0))
    triangular = jnp.linalg.cholesky(0.5 * (inner + inner.T))
    mapped = (covariance @ basis).T
    return jax.scipy.linalg.solve_triangular(triangular, mapped, lower=True).T


@eqx.filter_jit
def _solve_whitened(prior, conditions, solver, adjoint, max_steps, throw):
    problem, fault = sanitised(*unwrap((prior, conditions)))
    linear_solver = lx.Cholesky()
    jitter = initial_jitter(problem, DenseSystem(linear_solver))
    blocks = [r.jets for r in problem.rows]
    root = _root(covariance(problem.kernels, blocks, blocks))
    args = _Args(problem, root, noise(problem, jitter))
    start = jnp.zeros(root.shape[1], problem.dtype)
    sol = optx.least_squares(
        _whitened_residual,
        solver,
        start,
        args,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    z = select(problem, _jets(sol.value, args))
    fixed = without_gradient((problem, z, jitter))
    factor = _factor(fixed[0], fixed[1], fixed[2], linear_solver)
    linearised, gamma = linearise(problem, z), noise(problem, jitter)
    operator = GramOperator(problem.kernels, linearised.functionals, gamma)
    weights = gram_solve(operator, linearised.rhs, linear_solver, factor)
    result = RESULTS.promote(sol.result)
    result = RESULTS.where(fault != RESULTS.successful, fault, result)
    nothing = jnp.full((), jnp.nan, problem.dtype)
    stats = {
        "num_steps": sol.stats["num_steps"],
        "max_steps": max_steps,
        "change": nothing,
        "rounding": nothing,
        "num_products": jnp.array(0),
    }
    solution = solution_at(
        prior,
        conditions,
        problem,
        Root(z, weights),
        z,
        factor,
        jitter,
        DenseSystem(linear_solver),
        result,
        stats,
    )
    if throw:
        solution = solution.result.error_if(
            solution, solution.result != RESULTS.successful
        )
    return solution


def _factor(problem: Problem, z, jitter, linear_solver) -> Any:
    functionals = linearise(problem, z).functionals
    gamma = noise(problem, jitter)
    operator = dense(GramOperator(problem.kernels, functionals, gamma))
    return gram_factor(operator, linear_solver)
