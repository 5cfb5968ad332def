"""Linear systems without a matrix, for kernels that are as they are."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._conjugate_gradients import ConjugateGradients
from ._gram import covariance_product
from ._linearised import (
    embed,
    jacobian_product,
    linearise,
    Linearised,
    noise_variances,
    own_jet_products,
    prior_z,
    select,
)
from ._low_rank import low_rank, LowRank
from ._problem import Problem
from ._system import AbstractKernelSystem, AbstractPosterior, rounding_of_sums


class MatrixFree(AbstractKernelSystem):
    """For smooth kernels and more points than a dense matrix has room for: conjugate
    gradients with products with the Gram matrix that compute it anew, in blocks of
    rows. Memory grows in proportion to the number of points, times `rank`; time with
    its square. See [many points](../scale.md).

    They are preconditioned with an approximation of that rank. For a smooth kernel few
    functionals determine all others, so that a few steps are enough.

    ??? cite "References"

        Y. Chen, E. N. Epperly, J. A. Tropp and R. J. Webber, *Randomly pivoted
        Cholesky*, [arXiv:2207.06503](https://arxiv.org/abs/2207.06503). As a
        preconditioner: M. Díaz et al., *Robust, randomized preconditioning for kernel
        ridge regression*, [arXiv:2304.12465](https://arxiv.org/abs/2304.12465).
    """

    rank: int = eqx.field(static=True, default=1000)
    rtol: float = eqx.field(static=True, default=1e-9)
    max_steps: int = eqx.field(static=True, default=100)

    def __check_init__(self):
        for name in ("rank", "max_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value}.")

    @property
    def cheap_to_compile(self):
        return True  # Very many operations on parts of matrices.

    def smallest_nugget(self, problem):
        # In the preconditioned system, rounding of products counts relatively to it:
        # with less, conjugate gradients take more steps.
        return 5 * rounding_of_sums(problem)

    def no_factor(self, problem):
        def factor():
            linearised = linearise(problem, prior_z(problem))
            return self._factor(problem, linearised, jnp.ones((), problem.dtype))

        struct = jax.eval_shape(factor)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), struct)

    def regress(self, problem, linearised, jitter, last):
        # Not from the last weights: they are large, and products with them have errors.
        del last
        factor = self._factor(problem, linearised, jitter)
        iteration = self._iteration(problem, linearised, jitter, factor)
        changes = lambda w: self.changes(problem, linearised, factor, w)
        product = self._product(problem, linearised)
        # It is known beforehand when this would take too many steps. With zero on the
        # right-hand side it takes none.
        enough = factor.rest <= (self.max_steps / 5) ** 2
        rhs = jnp.where(enough, linearised.rhs, 0)
        found = iteration.regress(
            problem, linearised._replace(rhs=rhs), factor, changes, product, 0 * rhs
        )
        return found._replace(usable=found.usable & enough)

    def solve(self, problem, linearised, jitter, factor, vector):
        iteration = self._iteration(problem, linearised, jitter, factor)
        product, start = self._product(problem, linearised), jnp.zeros_like(vector)
        return iteration.solve(product, vector, start)[0]

    def whitening(self, factor):
        return factor.whitening

    def posterior(self, problem, linearised, jitter, factor):
        return _Posterior(self, problem, linearised, jitter, factor)

    #
    # Private
    #

    def _factor(self, problem: Problem, linearised: Linearised, jitter) -> LowRank:
        gamma = noise_variances(problem, jitter)
        return low_rank(problem.kernels, linearised.functionals, gamma, self.rank)

    def _iteration(self, problem, linearised, jitter, factor) -> ConjugateGradients:
        at = problem, linearised, jitter, factor
        return ConjugateGradients.of(*at, self.rtol, self.max_steps)

    def _product(self, problem, linearised):
        functionals = linearised.functionals
        return ft.partial(covariance_product, problem.kernels, functionals, functionals)


MatrixFree.__init__.__doc__ = """**Arguments:**

- `rank`: The largest rank of the preconditioner. It takes as many numbers for each
    target. Fewer are used where they are enough.
- `rtol`: Relative tolerance of conjugate gradients.
- `max_steps`: The largest number of their steps.

**Raises:**

A `ValueError` if `rank` or `max_steps` is not a positive integer.
"""


class _Posterior(AbstractPosterior):
    system: MatrixFree
    problem: Problem
    linearised: Linearised
    jitter: Float[Array, ""]
    factor: LowRank

    def from_weights(self, weights):
        at = self.problem, self.linearised, self.factor
        return self.system.changes(*at, weights)[1]

    def to_conditions(self, dz):
        return self._of_z(dz)[0]

    def covariance(self, dz):
        given, z = self._of_z(dz)
        at = self.problem, self.linearised, self.jitter, self.factor
        return z - self.from_weights(self.system.solve(*at, given))

    def _of_z(self, dz):
        # Covariances with the conditions and with z.
        problem = self.problem
        jets = own_jet_products(problem, embed(problem, dz))
        applied = jacobian_product(problem, self.linearised.jacobians, jets)
        return applied, select(problem, jets)
