"""Linear algebra with a Gram matrix whose factorisation is at hand."""

from typing import Any

import equinox as eqx
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ._gram import Block, covariance, GramOperator, Kernels
from ._problem import Linearised, noise_variances, Problem, z_functionals


class GramInverse(eqx.Module):
    # Multiplies with G^-1. Not differentiable in G.
    kernels: Kernels
    functionals: tuple[Block, ...]
    linear_solver: lx.AbstractLinearSolver
    factor: PyTree  # what `linear_solver` made of G

    def __call__(self, vector: Float[Array, " M"]) -> Float[Array, " M"]:
        # That this operator is another one plays no role: there is its factor.
        operator = GramOperator(self.kernels, self.functionals, vector)
        return lx.linear_solve(
            operator, vector, self.linear_solver, state=self.factor, throw=False
        ).value


class PosteriorCovariance(eqx.Module):
    # Multiplies with the posterior covariance of z. Not differentiable.
    prior: Float[Array, "N N"]
    rows: Float[Array, "N M"]  # prior covariances of z with the conditions
    gram_inverse: GramInverse

    def __init__(self, problem: Problem, gram_inverse: GramInverse):
        read = z_functionals(problem)
        self.prior = covariance(problem.kernels, read, read)
        self.rows = covariance(problem.kernels, read, gram_inverse.functionals)
        self.gram_inverse = gram_inverse

    def __call__(self, dz: Float[Array, " N"]) -> Float[Array, " N"]:
        return self.prior @ dz - self.rows @ self.gram_inverse(self.rows.T @ dz)


def representer_weights(
    problem: Problem,
    linearised: Linearised,
    jitter: Float[Array, ""],
    linear_solver: lx.AbstractLinearSolver,
    factor: Any,
) -> Float[Array, " M"]:
    # w with u = m + k phi^T w. Differentiable in `problem` by the rule for linear
    # solves and never through the factorisation, which is given.
    gamma = noise_variances(problem, jitter)
    operator = GramOperator(problem.kernels, linearised.functionals, gamma)
    return lx.linear_solve(
        operator, linearised.rhs, linear_solver, state=factor, throw=False
    ).value
