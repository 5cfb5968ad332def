"""Linear algebra with a Gram matrix whose factorisation is at hand."""

import equinox as eqx
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ._gram import Block, covariance, GramOperator, Kernels
from ._linearised import z_functionals
from ._problem import Problem


def gram_solve(
    operator: GramOperator,
    vector: Float[Array, " M"],
    linear_solver: lx.AbstractLinearSolver,
    factor: PyTree,
) -> Float[Array, " M"]:
    # Differentiable in both by the rule for linear solves, and never through the
    # factorisation, which is given: `factor` is what `linear_solver` made of it.
    return lx.linear_solve(
        operator, vector, linear_solver, state=factor, throw=False
    ).value


class GramInverse(eqx.Module):
    # Multiplies with G^-1. Not differentiable in G.
    kernels: Kernels
    functionals: tuple[Block, ...]
    linear_solver: lx.AbstractLinearSolver
    factor: PyTree

    def __call__(self, vector: Float[Array, " M"]) -> Float[Array, " M"]:
        # That this operator is another one plays no role: there is its factor.
        operator = GramOperator(self.kernels, self.functionals, vector)
        return gram_solve(operator, vector, self.linear_solver, self.factor)


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
