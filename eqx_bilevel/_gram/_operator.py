import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ._blocks import Block, covariance, covariance_product, Kernels, variances


class GramOperator(lx.AbstractLinearOperator):
    # Covariances of functionals plus a diagonal, as a Lineax operator. Products, and
    # derivatives of products, are computed by blocks of rows in memory linear in the
    # number of functionals.
    kernels: Kernels
    blocks: tuple[Block, ...]
    diagonal: Float[Array, " m"]

    def mv(self, vector):
        product = covariance_product(self.kernels, self.blocks, self.blocks, vector)
        return product + self.diagonal * vector

    def as_matrix(self):
        matrix = covariance(self.kernels, self.blocks, self.blocks)
        return matrix + jnp.diag(self.diagonal)

    def transpose(self):
        return self

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.diagonal.shape, self.diagonal.dtype)

    def out_structure(self):
        return self.in_structure()


def dense(operator: GramOperator) -> lx.MatrixLinearOperator:
    return lx.MatrixLinearOperator(operator.as_matrix(), lx.positive_semidefinite_tag)


@lx.is_symmetric.register
def _(operator: GramOperator):
    return True


@lx.is_positive_semidefinite.register
def _(operator: GramOperator):
    return True


@lx.is_negative_semidefinite.register
@lx.is_diagonal.register
@lx.is_tridiagonal.register
@lx.is_lower_triangular.register
@lx.is_upper_triangular.register
@lx.has_unit_diagonal.register
def _(operator: GramOperator):
    return False


@lx.linearise.register
@lx.conj.register
def _(operator: GramOperator):
    return operator


@lx.materialise.register
def _(operator: GramOperator):
    return dense(operator)


@lx.diagonal.register
def _(operator: GramOperator):
    return variances(operator.kernels, operator.blocks) + operator.diagonal
