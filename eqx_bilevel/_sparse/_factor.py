"""The factor: each supernode's regression on its parents, one after the other.

With the parents p and columns c of a supernode, the approximation is

    x_c = W^T x_p + L e,    e ~ N(0, I),    W = K_pp^-1 K_pc,   L L^T = K_cc - W^T K_pc,

which among all densities with this sparsity is the closest to N(0, K), in the sense of
Kullback and Leibler (Schaefer, Katzfuss and Owhadi 2021, theorem 2.1). The rows of the
upper triangular U with K^-1 ~ U U^T are U_cc = L^-T and U_pc = -W L^-T. Keeping W, and
L or its inverse, makes products with K or its inverse cheap.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    # Supernodes on a device, by their sizes; and the order in which parents come first:
    # which part, and which row of it.
    parts: tuple[Supernodes, ...]
    order: tuple[Int[Array, " n"], Int[Array, " n"]]
    size: int = eqx.field(static=True)

    @staticmethod
    def of(parts: tuple[Supernodes, ...], size: int) -> "Pattern":
        lengths = [len(part.number) for part in parts]
        number = np.concatenate([np.empty(0, int), *(part.number for part in parts)])
        order = np.argsort(number)
        part = np.repeat(np.arange(len(parts)), lengths)
        row = np.concatenate([np.empty(0, int), *map(np.arange, lengths)])
        # Not by `jnp.asarray`, which compiles a program for each shape.
        to_device = lambda x: jax.device_put(x.astype(np.int32))
        where = to_device(part[order]), to_device(row[order])
        return Pattern(jax.tree.map(to_device, parts), where, size)


class _Part(eqx.Module):
    # The factor's part for supernodes of similar sizes.
    parents: Int[Array, "s p"]
    columns: Int[Array, "s c"]
    weights: Float[Array, "s p c"]
    triangle: Float[Array, "s c c"]  # L, or its inverse


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

    def of_node(self, node: Supernodes):
        # The covariance of a supernode's functionals, and which of them fill it up.
        every = jnp.concatenate([node.parents, node.columns])
        matrix = self.matrix(node.values, node.others)
        if len(every) < len(matrix):
            matrix = matrix[node.packed][:, node.packed]
        return matrix, every == self.functionals.size


_F = TypeVar("_F", bound="AbstractSparseFactor")


class AbstractSparseFactor(eqx.Module):
    # $K^{-1} \approx U U^\top$ for the covariance matrix of functionals.
    parts: tuple[_Part, ...]
    order: tuple[Int[Array, " n"], Int[Array, " n"]]
    size: int = eqx.field(static=True)

    @property
    @abc.abstractmethod
    def inverted(self) -> bool:
        """Whether it keeps the inverse of L."""

    @classmethod
    def none(cls: type[_F], pattern: Pattern, dtype) -> _F:
        # In place of one.
        def part(p: Supernodes):
            (s, q), c = p.parents.shape, p.columns.shape[1]
            zeros = (jnp.zeros(shape, dtype) for shape in ((s, q, c), (s, c, c)))
            return _Part(p.parents, p.columns, *zeros)

        return cls(tuple(map(part, pattern.parts)), pattern.order, pattern.size)

    def log_determinant(self) -> Float[Array, ""]:
        # Of K.
        diagonal = lambda part: jnp.diagonal(part.triangle, axis1=1, axis2=2)
        used = lambda part: part.columns < self.size
        logs = [
            jnp.sum(jnp.where(used(part), jnp.log(diagonal(part)), 0))
            for part in self.parts
        ]
        return (-2 if self.inverted else 2) * jnp.sum(jnp.stack(logs))


class CovarianceFactor(AbstractSparseFactor):
    # For products with K: one supernode after the other.
    @property
    def inverted(self):
        return False

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U^-1 v: the transpose of `solve_transposed`, step by step.
        def change(node: _Part, x):
            v = x[node.columns]
            added = node.weights @ v, node.triangle.T @ v - v
            index = node.parents, node.columns
            return jnp.concatenate(index), jnp.concatenate(added)

        width = max(sum(p.weights.shape[1:]) for p in self.parts)
        return self._one_by_one(change, width, vector, reverse=True)

    def solve_transposed(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U^-T v: what a draw of independent standard normal numbers becomes.
        def change(node: _Part, x):
            v = x[node.columns]
            added = node.triangle @ v + x[node.parents] @ node.weights - v
            return node.columns, added

        width = max(p.weights.shape[2] for p in self.parts)
        return self._one_by_one(change, width, vector)

    def _one_by_one(self, change: Callable, width: int, vector, reverse: bool = False):
        # Where and what each supernode adds, in their order: filled up to one width.
        def of(part: _Part):
            def branch(row, x):
                index, added = change(jax.tree.map(lambda a: a[row], part), x)
                more = 0, width - len(index)
                index = jnp.pad(index, more, constant_values=self.size)
                return index, jnp.pad(added, more)

            return branch

        branches = [of(part) for part in self.parts]

        def step(x, at):
            index, added = jax.lax.switch(at[0], branches, at[1], x)
            return x.at[index].add(added), None

        x = _extended(vector)
        return jax.lax.scan(step, x, self.order, reverse=reverse)[0][:-1]

    def covariance(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # K v
        return self.solve_transposed(self.solve(vector))


class PrecisionFactor(AbstractSparseFactor):
    # For products with K^-1: all supernodes at once. Their triangles are not solved
    # with when needed: JAX 0.10 can hang where several batches of small triangular
    # systems are solved at the same time, since on CPUs each waits for the threads of
    # the others.
    @property
    def inverted(self):
        return True

    def multiply(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # U v
        out = _extended(vector)
        total = jnp.zeros_like(out)
        for part in self.parts:
            v = jnp.einsum("sdc,sd->sc", part.triangle, out[part.columns])
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
            v = jnp.einsum("sdc,sc->sd", part.triangle, v)
            out = out.at[part.columns].set(v)
        return out[:-1]

    def precision(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # K^-1 v
        return self.multiply(self.multiply_transposed(vector))


# The last entry stands for what is filled up.
def _extended(vector):
    return jnp.concatenate([vector, jnp.zeros_like(vector[:1])])


def factorise(prior: Prior, pattern: Pattern, before: _F, anew: Bool[Array, ""]) -> _F:
    # In the place of the factor before, which is kept unless a new one is needed. With
    # `jax.lax.cond` there would be two for a while.
    def one(node: Supernodes):
        n = len(node.columns)
        weights, root = regression(*prior.of_node(node), n)
        if before.inverted:
            root = jsl.solve_triangular(root, jnp.eye(n, dtype=root.dtype), lower=True)
        return weights, root

    def of_part(nodes: Supernodes, part: _Part):
        def body(i, arrays):
            new = one(jax.tree.map(lambda x: x[i], nodes))
            return tuple(a.at[i].set(x) for a, x in zip(arrays, new))

        num = jnp.where(anew, len(nodes.number), 0)
        arrays = jax.lax.fori_loop(0, num, body, (part.weights, part.triangle))
        return _Part(part.parents, part.columns, *arrays)

    parts = tuple(map(of_part, pattern.parts, before.parts))
    return dataclasses.replace(before, parts=parts)


#
# Derivatives
#


def covariance_product(
    prior: Prior,
    pattern: Pattern,
    factor: CovarianceFactor,
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


def _precision_product(prior: Prior, pattern: Pattern, vector):
    given = _extended(vector)

    @jax.checkpoint
    def one(node: Supernodes):
        every = jnp.concatenate([node.parents, node.columns])
        product = precision_product(
            *prior.of_node(node), given[every], len(node.columns)
        )
        return every, product

    out = jnp.zeros_like(given)
    for part in pattern.parts:
        index, added = jax.lax.map(one, part)
        out = out.at[index].add(added)
    return out[:-1]


class _Factorised(lx.AbstractLinearSolver):
    # Of K^-1, given the factor.
    def init(self, operator, options):
        raise NotImplementedError("The factor is given.")

    def compute(self, state: CovarianceFactor, vector, options):
        return state.covariance(vector), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state, options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True
