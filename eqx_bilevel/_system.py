"""What needs the kernel at all points at once, above all the linear systems of a
linearised problem. How this is computed depends on how the Gram matrix is kept; nothing
else does.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._determinant import Whitening
from ._gram import (
    Block,
    covariance,
    covariance_product,
    dense,
    GramOperator,
    Jets,
    Noise,
    variances,
)
from ._linearised import (
    embed,
    flat,
    jacobian_product,
    jet_changes,
    jet_products,
    Linearised,
    noise,
    prior_z,
    select,
    split,
    transposed_jacobian_product,
    z_functionals,
)
from ._problem import Problem


class Regression(NamedTuple):
    # The minimiser of a linearised problem, and how well it could be computed.
    factor: PyTree[Array]
    weights: Float[Array, " M"]
    noise: Noise
    z: Float[Array, " N"]
    rounding: Float[Array, " N"]
    usable: Bool[Array, ""]
    num_products: Int[Array, ""]  # of an iterative solve


# A linear solve whose residual is larger than this, relatively, is of no use.
_USABLE = 1e-3


def usable(weights, z, *small_and_large) -> Bool[Array, ""]:
    # Whether all is finite, and what should be small is, relatively.
    good = jnp.all(jnp.isfinite(weights)) & jnp.all(jnp.isfinite(z))
    for small, large in small_and_large:
        size = jnp.max(jnp.abs(large), initial=0)
        good = good & (jnp.max(jnp.abs(small), initial=0) <= _USABLE * size)
    return good


def rounding_of_sums(problem: Problem) -> float:
    # Of so many numbers, relatively.
    return problem.size * float(jnp.finfo(problem.dtype).eps)


class AbstractPosterior(eqx.Module):
    # Of z, given the conditions of a linearised problem. Not differentiable.

    @abc.abstractmethod
    def from_weights(self, weights: Float[Array, " M"]) -> Float[Array, " N"]:
        # S k phi^T w
        pass

    @abc.abstractmethod
    def to_conditions(self, dz: Float[Array, " N"]) -> Float[Array, " M"]:
        # The transpose of that.
        pass

    @abc.abstractmethod
    def covariance(self, dz: Float[Array, " N"]) -> Float[Array, " N"]:
        # S (k - k phi^T G^-1 phi k) S^T dz
        pass


class AbstractSystem(eqx.Module):
    # With functionals phi and G = phi k phi^T + Gamma. What belongs to one
    # linearisation is its `factor`. A problem can have readings; their functionals are
    # not among phi.

    @property
    @abc.abstractmethod
    def cheap_to_compile(self) -> bool:
        # Whether programs with it are to compile within less time and memory, even if
        # they run slower.
        pass

    @abc.abstractmethod
    def smallest_nugget(self, problem: Problem) -> float:
        # Around this, relative to the diagonal, linear systems fail from rounding.
        pass

    @abc.abstractmethod
    def no_factor(self, problem: Problem) -> PyTree[Array]:
        # In place of one, before there is any.
        pass

    @abc.abstractmethod
    def regress(
        self,
        problem: Problem,
        linearised: Linearised,
        jitter: Float[Array, ""],
        last: tuple[PyTree[Array], Float[Array, " M"]],
    ) -> Regression:
        # `last`: the factor and the weights of the step before.
        pass

    @abc.abstractmethod
    def solve(
        self,
        problem: Problem,
        linearised: Linearised,
        jitter: Float[Array, ""],
        factor: PyTree[Array],
        vector: Float[Array, " M"],
    ) -> Float[Array, " M"]:
        # G^-1 v. Differentiable in everything but the factor.
        pass

    @abc.abstractmethod
    def changes(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        weights: Float[Array, " M"],
    ) -> tuple[Float[Array, " M"], Float[Array, " N"]]:
        # What k phi^T w contributes to the conditions and to z, also where z is only
        # read. Differentiable in everything but the factor.
        pass

    @abc.abstractmethod
    def posterior(
        self,
        problem: Problem,
        linearised: Linearised,
        jitter: Float[Array, ""],
        factor: PyTree[Array],
    ) -> AbstractPosterior:
        pass

    @abc.abstractmethod
    def read(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        weights: Float[Array, " M"],
        bent: Float[Array, " N"] | None,
    ) -> Float[Array, " R"]:
        # What is read of k (phi^T w + S^T b). The linearisation is of the conditions.
        pass

    @abc.abstractmethod
    def read_transposed(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        read: Float[Array, " R"],
    ) -> tuple[Float[Array, " N"], Float[Array, " M"]]:
        # The transpose of that, to `b` and w.
        pass

    @abc.abstractmethod
    def jets(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        weights: Float[Array, " M"],
        jets: Jets,
        points: Float[Array, "n d"],
    ) -> Float[Array, "n p"]:
        # Of k phi^T w. Differentiable.
        pass

    @abc.abstractmethod
    def covariances(
        self,
        problem: Problem,
        linearised: Linearised,
        factor: PyTree[Array],
        blocks: Sequence[Block],
        joint: bool,
    ) -> tuple[Array, Float[Array, "m M"]]:
        # Of other functionals: with each other, or only their variances, and with the
        # conditions.
        pass

    @abc.abstractmethod
    def whitening(self, factor: PyTree[Array]) -> Whitening:
        # About that of G; but only where there is no matrix.
        pass

    @abc.abstractmethod
    def gram(
        self, problem: Problem, linearised: Linearised, jitter: Float[Array, ""]
    ) -> GramOperator:
        # G, as something that can become a matrix.
        pass


class AbstractKernelSystem(AbstractSystem):
    # All but linear systems, by products with the kernel as it is: in blocks of rows.

    def changes(self, problem, linearised, factor, weights):
        del factor
        jets = jet_changes(problem, linearised.jacobians, weights)
        applied = jacobian_product(problem, linearised.jacobians, jets)
        return applied, select(problem, jets)

    def read(self, problem, linearised, factor, weights, bent):
        del factor
        conditions, jacobians = problem.conditions, linearised.jacobians
        jets = transposed_jacobian_product(conditions, jacobians, weights)
        if bent is not None:
            jets = [jet + b for jet, b in zip(jets, embed(conditions, bent))]
        return flat(jet_products(problem.readings, conditions, jets))

    def read_transposed(self, problem, linearised, factor, read):
        del factor
        conditions, readings = problem.conditions, problem.readings
        jets = jet_products(conditions, readings, split(readings, read))
        bent = select(conditions, jets)
        return bent, jacobian_product(conditions, linearised.jacobians, jets)

    def jets(self, problem, linearised, factor, weights, jets, points):
        del factor
        block, functionals = Block(points, None, jets), linearised.functionals
        product = covariance_product(problem.kernels, (block,), functionals, weights)
        return product.reshape(len(points), len(jets))

    def covariances(self, problem, linearised, factor, blocks, joint):
        del factor
        rows = covariance(problem.kernels, blocks, linearised.functionals)
        if joint:
            return covariance(problem.kernels, blocks, blocks), rows
        return variances(problem.kernels, blocks), rows

    def gram(self, problem, linearised, jitter):
        added = noise(problem, jitter)
        return GramOperator(problem.kernels, linearised.functionals, added)


#
# A dense matrix and its factorisation
#


class _DensePosterior(AbstractPosterior):
    prior: Float[Array, "N N"]
    rows: Float[Array, "N M"]
    gram: GramOperator
    linear_solver: lx.AbstractLinearSolver
    factor: PyTree[Array]

    def from_weights(self, weights):
        return self.rows @ weights

    def to_conditions(self, dz):
        return self.rows.T @ dz

    def covariance(self, dz):
        given = self.rows.T @ dz
        solved = gram_solve(self.gram, given, self.linear_solver, self.factor)
        return self.prior @ dz - self.rows @ solved


class DenseSystem(AbstractKernelSystem):
    linear_solver: lx.AbstractLinearSolver
    is_small: bool = eqx.field(static=True, default=False)

    @property
    def cheap_to_compile(self):
        return self.is_small

    def smallest_nugget(self, problem):
        return 0.125 * rounding_of_sums(problem)

    def no_factor(self, problem):
        # For triangular factors, for what comes of them to be finite if there never are
        # others. The identity would be kept as a matrix.
        def init(matrix):
            tags = lx.positive_semidefinite_tag
            return self.linear_solver.init(lx.MatrixLinearOperator(matrix, tags), {})

        def trivial(x):
            if x.shape == matrix.shape:
                return jnp.ones(x.shape, x.dtype)
            return jnp.zeros(x.shape, x.dtype)

        matrix = jax.ShapeDtypeStruct((problem.size, problem.size), problem.dtype)
        struct = eqx.filter_eval_shape(init, matrix)
        is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        return jax.tree.map(lambda x: trivial(x) if is_struct(x) else x, struct)

    def regress(self, problem, linearised, jitter, last):
        del last
        gram = self.gram(problem, linearised, jitter)
        operator = dense(gram)
        factor = gram_factor(operator, self.linear_solver)
        solve = lambda b: gram_solve(operator, b, self.linear_solver, factor)
        rhs = linearised.rhs
        weights = solve(rhs)
        # Solving once more for what is left is one step of iterative refinement. Its
        # size is what rounding does to the result.
        remainder = rhs - operator.mv(weights)
        correction = solve(remainder)
        if problem.z_size == 0:
            z = rounding = jnp.zeros(0, problem.dtype)
        else:
            # Without the matrix: its memory would cost more time than its entries do.
            read, functionals = z_functionals(problem), linearised.functionals
            product = lambda w: covariance_product(
                problem.kernels, read, functionals, w
            )
            both = jnp.stack([weights + correction, correction])
            z, rounding = jax.vmap(product)(both)
            z = prior_z(problem) + z
        weights = weights + correction
        good = usable(weights, z, (remainder, rhs), (rounding, z))
        none = jnp.array(0)
        return Regression(factor, weights, gram.noise, z, rounding, good, none)

    def solve(self, problem, linearised, jitter, factor, vector):
        operator = self.gram(problem, linearised, jitter)
        return gram_solve(operator, vector, self.linear_solver, factor)

    def whitening(self, factor):
        raise NotImplementedError("The matrix is known.")

    def posterior(self, problem, linearised, jitter, factor):
        read, functionals = z_functionals(problem), linearised.functionals
        prior = covariance(problem.kernels, read, read)
        rows = covariance(problem.kernels, read, functionals)
        gram = self.gram(problem, linearised, jitter)
        return _DensePosterior(prior, rows, gram, self.linear_solver, factor)


def gram_factor(
    operator: lx.AbstractLinearOperator, linear_solver: lx.AbstractLinearSolver
) -> PyTree:
    return _by_columns(linear_solver.init(operator, {}))


def gram_solve(
    operator: lx.AbstractLinearOperator,
    vector: Float[Array, " M"],
    linear_solver: lx.AbstractLinearSolver,
    factor: PyTree,
) -> Float[Array, " M"]:
    # Differentiable in both by the rule for linear solves, and never through the
    # factorisation, which is given: `gram_factor`.
    state = _by_columns(factor)
    return lx.linear_solve(
        operator, vector, linear_solver, state=state, throw=False
    ).value


def _by_columns(factor: PyTree[Array]) -> PyTree[Array]:
    # Transposed, or back again: LAPACK has matrices column by column, and XLA's loops
    # row by row. Without that factors would be copied on their way between these.
    is_matrix = lambda x: eqx.is_array(x) and x.ndim == 2
    return jax.tree.map(lambda x: x.T if is_matrix(x) else x, factor)
