"""A step of Gauss-Newton by conjugate gradients."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Int

from .._gram import variances
from .._linearised import Linearised, noise_variances, prior_z
from .._problem import Problem
from ._factor import SparseFactor
from ._plan import Plan


class SparseRegression(NamedTuple):
    # The minimiser of the linearised problem.
    weights: Float[Array, " M"]
    z: Float[Array, " N"]
    num_steps: Int[Array, ""]
    residual: Float[Array, ""]  # relative


def conditions_operator(
    problem: Problem,
    plan: Plan,
    factors: Mapping[str, SparseFactor],
    linearised: Linearised,
    gamma: Float[Array, " M"],
) -> lx.FunctionLinearOperator:
    # J K J^T + Gamma.
    layout, jacobians = plan.layout, linearised.jacobians

    def product(weights):
        vectors = layout.apply_transposed(problem, jacobians, weights)
        vectors = {name: factors[name].covariance(v) for name, v in vectors.items()}
        return layout.apply(problem, jacobians, vectors) + gamma * weights

    return _operator(product, gamma)


def _operator(product, like) -> lx.FunctionLinearOperator:
    structure = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return lx.FunctionLinearOperator(product, structure, lx.positive_semidefinite_tag)


_WEIGHT_UNIT = 1e-12


def regress(
    problem: Problem,
    plan: Plan,
    factors: Mapping[str, SparseFactor],
    linearised: Linearised,
    jitter: Float[Array, ""],
    start: Float[Array, " M"] | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 200,
) -> SparseRegression:
    # Conjugate gradients, preconditioned by a sparse factor of the same matrix (Chen,
    # Owhadi and Schaefer, arXiv:2304.01294, section 4.2). `start` are weights from an
    # earlier step.
    gamma = noise_variances(problem, jitter)
    operator = conditions_operator(problem, plan, factors, linearised, gamma)
    small = plan.conditions.factorise(problem, linearised, gamma)
    order, inverse = plan.conditions.order, plan.conditions.inverse
    approximate = lambda v: small.precision(v[order])[inverse]
    # In units of each condition's standard deviation, and of the right-hand side: only
    # then does one tolerance mean the same for all.
    deviation = jnp.sqrt(variances(problem.kernels, linearised.functionals) + gamma)
    rhs = linearised.rhs
    size = jnp.sqrt(jnp.mean((rhs / deviation) ** 2))
    size = jnp.where(size > 0, size, 1)
    unit = deviation * size
    # Lineax also demands that weights change little, in absolute terms. They may be
    # large, and only the residual counts; so they are counted in large units.
    weight_unit = size / deviation / _WEIGHT_UNIT
    scaled = _operator(lambda w: operator.mv(w * weight_unit) / unit, rhs)
    inner = _operator(lambda r: approximate(r * unit) / weight_unit, rhs)
    first = approximate(rhs) if start is None else start
    options: dict[str, Any] = dict(preconditioner=inner, y0=first / weight_unit)
    rms = lambda x: jnp.sqrt(jnp.mean(x**2))
    solver = lx.CG(0.0, tolerance, norm=rms, max_steps=max_steps)
    solution = lx.linear_solve(scaled, rhs / unit, solver, options=options, throw=False)
    weights = solution.value * weight_unit
    residual = rms((rhs - operator.mv(weights)) / unit)
    layout = plan.layout
    vectors = layout.apply_transposed(problem, linearised.jacobians, weights)
    vectors = {name: factors[name].covariance(v) for name, v in vectors.items()}
    z = prior_z(problem) + layout.read_z(problem, vectors)
    num_steps = jnp.asarray(solution.stats["num_steps"])
    return SparseRegression(weights, z, num_steps, residual)
