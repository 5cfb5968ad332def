"""The factor: each supernode's regression on its parents, one after the other.

With the parents p and columns c of a supernode, the approximation is

    x_c = W^T x_p + L e,    e ~ N(0, I),    W = K_pp^-1 K_pc,   L L^T = K_cc - W^T K_pc,

which among all densities with this sparsity is the closest to N(0, K), in the sense of
Kullback and Leibler (Schaefer, Katzfuss and Owhadi 2021, theorem 2.1). The rows of the
upper triangular U with K^-1 ~ U U^T are U_cc = L^-T and U_pc = -W L^-T. Keeping W and L
makes products and solves alike cheap.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import lineax as lx
from jaxtyping import Array, Float, Int

from .._gram import Block, covariance, Kernels, one_sides
from ._pattern import Supernodes
from ._regression import precision_product, regression


class Functionals(eqx.Module):
    # Of one unknown: its values at some points, and after them one combination of
    # entries of its jet at each of some others.
    values: Block
    others: Block

    @property
    def size(self) -> int:
        return len(self.values.points) + len(self.others.points)

    def with_sides(self, kernels: Kernels) -> "Functionals":
        # What kernels compute of each point, only once.
        sides = lambda b: one_sides(kernels, b.jets, b.points)
        where = lambda f: (f.values.sides, f.others.sides)
        new = sides(self.values), sides(self.others)
        return eqx.tree_at(where, self, new, is_leaf=lambda x: x is None)

    def at(self, values: Int[Array, " v"], others: Int[Array, " o"]) -> list[Block]:
        # Some of them.
        take = lambda block, i: jax.tree.map(lambda x: x[i], block)
        parts = take(self.values, values), take(self.others, others)
        return [part for part in parts if part.size > 0]


class Pattern(eqx.Module):
    # Supernodes of similar sizes, on a device. `rows` are parents, then columns,
    # counted over all functionals; rows are filled up with their number.
    value_parents: Int[Array, "s v"]
    other_parents: Int[Array, "s o"]
    columns: Int[Array, "s c"]
    num_values: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    of_values: bool = eqx.field(static=True)

    @staticmethod
    def of(nodes: Supernodes, num_values: int, num_others: int) -> "Pattern":
        size = num_values + num_others
        values = lambda x: jnp.where(x < num_values, x, size)
        others = lambda x: x + num_values
        columns, above, inside, of_values = nodes
        columns, above, inside = map(jnp.asarray, (columns, above, inside))
        columns = values(columns) if of_values else others(columns)
        parents = values(above), others(inside)
        return Pattern(*parents, columns, num_values, size, of_values)

    @property
    def nodes(self):
        return self.value_parents, self.other_parents, self.columns

    @property
    def parents(self) -> Int[Array, "s p"]:
        return jnp.concatenate([self.value_parents, self.other_parents], axis=1)

    @property
    def num_columns(self) -> int:
        return self.columns.shape[1]


class _Part(eqx.Module):
    # The factor's part for supernodes of similar sizes.
    parents: Int[Array, "s p"]
    columns: Int[Array, "s c"]
    weights: Float[Array, "s p c"]
    cholesky: Float[Array, "s c c"]
    # Not solved with when needed: JAX 0.10 can hang where several batches of small
    # triangular systems are solved at the same time, since on CPUs each waits for the
    # threads of the others.
    inverse: Float[Array, "s c c"]


class Prior(eqx.Module):
    # Of some functionals: K plus a diagonal, with variances of `noise`, and a `nugget`
    # relative to the variance of each functional.
    kernels: Kernels
    functionals: Functionals
    nugget: Float[Array, ""]
    noise: Float[Array, " n"]

    def __init__(self, kernels, functionals: Functionals, nugget, noise=None):
        if noise is None:
            noise = jnp.zeros(functionals.size, functionals.values.points.dtype)
        self.kernels = kernels
        self.functionals = functionals.with_sides(kernels)
        self.nugget = jnp.asarray(nugget, noise.dtype)
        self.noise = noise

    def matrix(
        self, values: Int[Array, " v"], others: Int[Array, " o"]
    ) -> Float[Array, "m m"]:
        # Of some of them.
        blocks = self.functionals.at(values, others)
        matrix = covariance(self.kernels, blocks, blocks)
        index = jnp.concatenate([values, others + len(self.functionals.values.points)])
        added = self.nugget * jnp.diagonal(matrix) + self.noise[index]
        return matrix + jnp.diag(added)

    def of_node(self, pattern: Pattern, node):
        # The covariance of a supernode's functionals, and which of them fill it up.
        n = pattern.num_values
        values, others, columns = node
        fill = jnp.concatenate([values, others, columns]) == pattern.size
        if pattern.of_values:
            values = jnp.concatenate([values, columns])
        else:
            others = jnp.concatenate([others, columns])
        values = jnp.minimum(values, max(n - 1, 0))
        others = jnp.clip(others - n, 0, max(pattern.size - n - 1, 0))
        return self.matrix(values, others), fill


class SparseFactor(eqx.Module):
    # $K^{-1} \approx U U^\top$ for the covariance matrix of functionals.
    parts: tuple[_Part, ...]
    size: int = eqx.field(static=True)

    def multiply(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U v
        out = _extended(vector)
        total = jnp.zeros_like(out)
        for part in self.parts:
            v = jnp.einsum("sdc,sd->sc", part.inverse, out[part.columns])
            total = total.at[part.columns].add(v)
            total = total.at[part.parents].add(
                -jnp.einsum("spc,sc->sp", part.weights, v)
            )
        return total[:-1]

    def multiply_transposed(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U^T v
        given = _extended(vector)
        out = given
        for part in self.parts:
            predicted = jnp.einsum("spc,sp->sc", part.weights, given[part.parents])
            v = given[part.columns] - predicted
            v = jnp.einsum("sdc,sc->sd", part.inverse, v)
            out = out.at[part.columns].set(v)
        return out[:-1]

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U^-1 v: the transpose of `solve_transposed`, step by step.
        def step(x, node):
            v = x[node.columns]
            x = x.at[node.parents].add(node.weights @ v)
            return x.at[node.columns].set(node.cholesky.T @ v), None

        out = _extended(vector)
        for part in reversed(self.parts):
            out, _ = jax.lax.scan(step, out, part, reverse=True)
            out = out.at[-1].set(0)
        return out[:-1]

    def solve_transposed(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U^-T v: what a draw of independent standard normal numbers becomes.
        def step(x, node):
            v = node.cholesky @ x[node.columns] + x[node.parents] @ node.weights
            return x.at[node.columns].set(v), None

        out = _extended(vector)
        for part in self.parts:
            out, _ = jax.lax.scan(step, out, part)
            out = out.at[-1].set(0)
        return out[:-1]

    def covariance(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # K v
        return self.solve_transposed(self.solve(vector))

    def precision(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # K^-1 v
        return self.multiply(self.multiply_transposed(vector))

    def log_determinant(self) -> Float[Array, ""]:
        # Of K.
        diagonal = lambda part: jnp.diagonal(part.cholesky, axis1=1, axis2=2)
        used = lambda part: part.columns < self.size
        logs = [
            jnp.sum(jnp.where(used(part), jnp.log(diagonal(part)), 0))
            for part in self.parts
        ]
        return 2 * jnp.sum(jnp.stack(logs))


# The last entry stands for what is filled up.
def _extended(vector):
    return jnp.concatenate([vector, jnp.zeros_like(vector[:1])])


def factorise(prior: Prior, pattern: Sequence[Pattern]) -> SparseFactor:
    parts = []
    for part in pattern:

        def one(node, part=part):
            n = part.num_columns
            weights, root = regression(*prior.of_node(part, node), n)
            identity = jnp.eye(n, dtype=root.dtype)
            return weights, root, jsl.solve_triangular(root, identity, lower=True)

        found = jax.lax.map(one, part.nodes)
        parts.append(_Part(part.parents, part.columns, *found))
    return SparseFactor(tuple(parts), prior.functionals.size)


#
# Derivatives
#


def covariance_product(
    prior: Prior,
    pattern: Sequence[Pattern],
    factor: SparseFactor,
    vector: Float[Array, " n"],
) -> Float[Array, " n"]:
    # The factor's K v, as a differentiable function of the prior: the solution of
    # K^-1 x = v, where K^-1 is a sum over supernodes that are computed anew. In reverse
    # mode too nothing but their results is kept, and nothing is solved one after the
    # other.
    operator = lx.FunctionLinearOperator(
        lambda v: _precision_product(prior, pattern, v),
        jax.ShapeDtypeStruct(vector.shape, vector.dtype),
        lx.positive_semidefinite_tag,
    )
    solver, state = _Factorised(), jax.lax.stop_gradient(factor)
    return lx.linear_solve(operator, vector, solver, state=state, throw=False).value


def _precision_product(prior: Prior, pattern: Sequence[Pattern], vector):
    given = _extended(vector)
    out = jnp.zeros_like(given)
    for part in pattern:

        @jax.checkpoint
        def one(node, part=part):
            at_node = given[jnp.concatenate(node)]
            return precision_product(
                *prior.of_node(part, node), at_node, part.num_columns
            )

        added = jax.lax.map(one, part.nodes)
        out = out.at[jnp.concatenate(part.nodes, axis=1)].add(added)
    return out[:-1]


class _Factorised(lx.AbstractLinearSolver):
    # Of K^-1, given the factor.
    def init(self, operator, options):
        raise NotImplementedError("The factor is given.")

    def compute(self, state: SparseFactor, vector, options):
        return state.covariance(vector), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state, options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True
