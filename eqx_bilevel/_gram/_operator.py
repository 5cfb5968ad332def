import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float

from ._blocks import covariance, variances
from ._functionals import Block, Kernels
from ._products import covariance_product


class Noise(eqx.Module):
    # The covariance of what is added to functionals: that of each condition is its
    # variances, or a matrix.
    parts: tuple[Float[Array, "..."], ...]

    def _split(self, vector: Float[Array, " m"]) -> list[Array]:
        return jnp.split(vector, np.cumsum([len(part) for part in self.parts])[:-1])

    def mv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        pairs = zip(self.parts, self._split(vector))
        return jnp.concatenate([p @ v if p.ndim == 2 else p * v for p, v in pairs])

    def whiten(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        # By a root of this matrix.
        pairs = zip(self.parts, self._split(vector))
        return jnp.concatenate([_whitened(p, v) for p, v in pairs])

    def if_usable(self, usable: Bool[Array, ""]) -> "Noise":
        # So that no matrix in it is factorised before it is known what for, and never
        # at the same time as another one: JAX 0.10 can hang where batches of matrices
        # are, since on CPUs each waits for the threads of the others.
        eye = lambda p: jnp.eye(len(p), dtype=p.dtype)
        keep = lambda p: jnp.where(usable, p, eye(p)) if p.ndim == 2 else p
        return Noise(tuple(map(keep, self.parts)))

    @property
    def diagonal(self) -> Float[Array, " m"]:
        each = [jnp.diagonal(p) if p.ndim == 2 else p for p in self.parts]
        return jnp.concatenate(each)

    def added_to(self, matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
        each = [p if p.ndim == 1 else jnp.zeros(len(p), p.dtype) for p in self.parts]
        matrix = matrix + jnp.diag(jnp.concatenate(each))
        start = 0
        for part in self.parts:
            own = slice(start, start + len(part))
            if part.ndim == 2:
                matrix = matrix.at[own, own].add(part)
            start += len(part)
        return matrix


def _whitened(part, vector):
    if part.ndim == 1:
        return vector / jnp.sqrt(part)
    root = jnp.linalg.cholesky(part)
    return jax.scipy.linalg.solve_triangular(root, vector, lower=True)


class GramOperator(lx.AbstractLinearOperator):
    # Covariances of functionals plus noise, as a Lineax operator. Products, and
    # derivatives of products, are computed by blocks of rows in memory linear in the
    # number of functionals.
    kernels: Kernels
    blocks: tuple[Block, ...]
    noise: Noise

    def mv(self, vector):
        product = covariance_product(self.kernels, self.blocks, self.blocks, vector)
        return product + self.noise.mv(vector)

    def as_matrix(self):
        matrix = covariance(self.kernels, self.blocks, self.blocks)
        return self.noise.added_to(matrix)

    def transpose(self):
        return self

    def in_structure(self):
        diagonal = self.noise.diagonal
        return jax.ShapeDtypeStruct(diagonal.shape, diagonal.dtype)

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
    return variances(operator.kernels, operator.blocks) + operator.noise.diagonal
