"""Linear systems of a linearised problem by preconditioned conjugate gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ._gram import Noise, variances
from ._linearised import Linearised, noise, prior_z
from ._problem import Problem
from ._system import Regression, usable


class ConjugateGradients(NamedTuple):
    # For G = phi k phi^T + Gamma, in units of each condition's standard deviation: only
    # then does one tolerance mean the same for all.
    noise: Noise  # Gamma
    deviations: Float[Array, " M"]
    precondition: Callable[[Array], Array]
    rtol: float
    max_steps: int

    @staticmethod
    def of(
        problem: Problem,
        linearised: Linearised,
        jitter: Float[Array, ""],
        precondition: Callable[[Array], Array],
        rtol: float,
        max_steps: int,
    ) -> "ConjugateGradients":
        added = noise(problem, jitter)
        prior = variances(problem.kernels, linearised.functionals)
        deviations = jnp.sqrt(jax.lax.stop_gradient(prior + added.diagonal))
        return ConjugateGradients(added, deviations, precondition, rtol, max_steps)

    def solve(
        self, product: Callable, rhs: Float[Array, " M"], start: Float[Array, " M"]
    ):
        # G^-1 v and the number of steps. `product` is that with G less Gamma.
        size = jax.lax.stop_gradient(rhs) / self.deviations
        size = jnp.sqrt(jnp.mean(size**2))
        size = jnp.where(size > 0, size, 1)
        unit = self.deviations * size
        # Lineax also demands that weights change little, in absolute terms. They may be
        # large, and only the residual counts; so they are counted in large units.
        weight_unit = size / self.deviations / _WEIGHT_UNIT

        def scaled(w):
            w = w * weight_unit
            return (product(w) + self.noise.mv(w)) / unit

        inner = lambda r: self.precondition(r * unit) / weight_unit
        options: dict[str, Any] = dict(
            preconditioner=_operator(inner, rhs), y0=start / weight_unit
        )
        rms = lambda x: jnp.sqrt(jnp.mean(x**2))
        # Residuals that are computed anew every few steps would have rounding in them
        # to which the preconditioner, about the inverse of a nugget, is very large.
        solver = lx.CG(
            0.0, self.rtol, rms, stabilise_every=None, max_steps=self.max_steps
        )
        solution = lx.linear_solve(
            _operator(scaled, rhs), rhs / unit, solver, options=options, throw=False
        )
        num_steps = jnp.asarray(solution.stats["num_steps"])
        return solution.value * weight_unit, num_steps

    def regress(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        changes: Callable[[Array], tuple[Array, Array]],
        product: Callable[[Array], Array],
        start: Float[Array, " M"],
    ) -> Regression:
        # `changes` is that of the system: products with G less Gamma, and z. `product`
        # is the first of them, if it can be had for less.
        rhs = linearised.rhs
        weights, num_steps = self.solve(product, rhs, start)
        applied, z = changes(weights)
        remainder = rhs - applied - self.noise.mv(weights)
        _, rounding = changes(self.precondition(remainder))
        small_and_large = remainder / self.deviations, rhs / self.deviations
        good = usable(weights, z, small_and_large, (rounding, z))
        good = good & (num_steps < self.max_steps)
        z = prior_z(problem) + z
        return Regression(factor, weights, self.noise, z, rounding, good, num_steps)


_WEIGHT_UNIT = 1e-12


def _operator(product: Callable, like: Array) -> lx.FunctionLinearOperator:
    structure = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return lx.FunctionLinearOperator(product, structure, lx.positive_semidefinite_tag)
