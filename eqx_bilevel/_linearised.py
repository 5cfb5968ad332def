"""What a problem is used for: vectors that are stacked over its rows, linearisations at
some `z`, and what follows from the representer weights of a function.
"""

import functools as ft
import itertools as it
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._gram import Block, covariance_product, Noise, symmetric_product
from ._jets import linearise as linearise_operator, nonlinear_part
from ._problem import Problem, Rows


def flat(parts: Iterable[Array]) -> Array:
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _split(vector: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    parts = jnp.split(vector, np.cumsum([math.prod(s) for s in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def split(problem: Problem, z: Float[Array, " N"]) -> list[Array]:
    return _split(z, [(len(r.points), len(r.trace.nonlinear)) for r in problem.rows])


def split_jets(problem: Problem, jets: Array) -> list[Array]:
    return _split(jets, [r.mean.shape for r in problem.rows])


def split_weights(problem: Problem, weights: Float[Array, " M"]) -> list[Array]:
    return _split(weights, [r.target.shape for r in problem.rows])


def separate(
    problem: Problem, z: Float[Array, " N"]
) -> tuple[Float[Array, " A"], Float[Array, " B"]]:
    # The entries of `z` that belong to conditions, and those that are only read.
    parts = list(zip(problem.rows, split(problem, z)))
    of = lambda read: flat([z[:0], *[p for r, p in parts if r.only_read == read]])
    return of(False), of(True)


def join(
    problem: Problem, z: Float[Array, " A"], read: Float[Array, " B"]
) -> Float[Array, " N"]:
    parts = {
        False: iter(split(problem.conditions, z)),
        True: iter(split(problem.readings, read)),
    }
    return flat(next(parts[r.only_read]) for r in problem.rows)


def select(problem: Problem, jets: Sequence[Array]) -> Float[Array, " N"]:
    # The entries of jets that make up z.
    return flat(jet[:, r.z_entries] for r, jet in zip(problem.rows, jets))


def embed(problem: Problem, z: Float[Array, " N"]) -> list[Array]:
    # The transpose of `select`.
    return [
        jnp.zeros_like(r.mean).at[:, r.z_entries].set(part)
        for r, part in zip(problem.rows, split(problem, z))
    ]


def jacobian_product(
    problem: Problem, jacobians: Sequence[Array], jets: Sequence[Array]
) -> Float[Array, " M"]:
    each = map(ft.partial(jnp.einsum, "nqp,np->nq"), jacobians, jets)
    return flat(r.sums(values) for r, values in zip(problem.rows, each))


def transposed_jacobian_product(
    problem: Problem, jacobians: Sequence[Array], weights: Float[Array, " M"]
) -> list[Array]:
    parts = _weights_at_points(problem, weights)
    return list(map(ft.partial(jnp.einsum, "nqp,nq->np"), jacobians, parts))


def _weights_at_points(problem: Problem, weights: Float[Array, " M"]) -> list[Array]:
    parts = split_weights(problem, weights)
    return [r.at_points(part) for r, part in zip(problem.rows, parts)]


def prior_z(problem: Problem) -> Float[Array, " N"]:
    return select(problem, [r.mean for r in problem.rows])


#
# At some z
#


class Linearised(NamedTuple):
    # All conditions, linearised at `z`: `functionals v = rhs`, up to noise.
    functionals: tuple[Block, ...]
    jacobians: tuple[Float[Array, "n q p"], ...]  # of each condition, by the jet
    rhs: Float[Array, " M"]


def linearise(problem: Problem, z: Float[Array, " N"]) -> Linearised:
    jacobians, rhs = [], []
    for r, z_r in zip(problem.rows, split(problem, z)):
        at = lambda z, x, r=r: linearise_operator(r.operator, r.unknowns, r.trace, z, x)
        jacobian, offset = jax.vmap(at)(z_r, r.points)
        jacobians.append(jacobian)
        rhs.append(r.sums(offset) + r.target)
    means = jacobian_product(problem, jacobians, [r.mean for r in problem.rows])
    blocks = [r.block(jacobian) for r, jacobian in zip(problem.rows, jacobians)]
    functionals = _merge([block for block in blocks if block.size > 0])
    return Linearised(functionals, tuple(jacobians), flat(rhs) - means)


def _merge(blocks: Sequence[Block]) -> tuple[Block, ...]:
    # Neighbours with the same derivatives become one block: fewer loops to compile.
    out: list[Block] = []
    for block in blocks:
        last = out[-1] if out else None
        kind = lambda b: (b.jets, b.at_each, b.sum_over)
        if last is not None and kind(last) == kind(block):
            out[-1] = jax.tree.map(lambda *x: jnp.concatenate(x), last, block)
        else:
            out.append(block)
    return tuple(out)


def z_functionals(problem: Problem) -> tuple[Block, ...]:
    # Those that read z off a function.
    blocks = []
    for r in problem.rows:
        jets = tuple(r.trace.jets[i] for i in r.trace.nonlinear)
        if jets:
            blocks.append(Block(r.points, None, jets, r.sides))
    return _merge(blocks)


def jet_changes(
    problem: Problem, jacobians: Sequence[Array], weights: Float[Array, " M"]
) -> list[Array]:
    # By how much the jets of `m + k functionals^T weights` differ from those of the
    # mean, at the points of each condition.
    at_points = transposed_jacobian_product(problem, jacobians, weights)
    return own_jet_products(problem, at_points)


def own_jet_products(problem: Problem, weights: Sequence[Array]) -> list[Array]:
    # Jets of `k` times weights for the jets, which are zero where they are only read.
    rows = problem.rows
    parts = [w[:0] if r.only_read else w for r, w in zip(rows, weights)]
    # Row by row as `_jets` has them in blocks.
    by_block = it.groupby(zip(rows, parts), lambda given: given[0].trace.jets)
    joined = [jnp.concatenate([w for _, w in alike]) for _, alike in by_block]
    products = symmetric_product(problem.kernels, _jets(problem), joined)
    return split_jets(problem, flat(products))


def jet_products(
    left: Problem, right: Problem, weights: Sequence[Array]
) -> list[Array]:
    # Jets at the points on the left of `k` times weights for the jets on the right.
    product = covariance_product(left.kernels, _jets(left), _jets(right), flat(weights))
    return split_jets(left, product)


def _jets(problem: Problem) -> tuple[Block, ...]:
    return _merge([r.jets for r in problem.rows])


def noise(problem: Problem, jitter: Float[Array, ""]) -> Noise:
    # Gamma
    return Noise(tuple(_noise(r, jitter * r.scale) for r in problem.rows))


def _noise(r: Rows, added: Float[Array, ""]) -> Array:
    if r.variance.ndim == 2:
        return r.variance + added * jnp.eye(r.target.size, dtype=added.dtype)
    each = r.variance[:, None] if r.variance.ndim == 1 else r.variance
    return jnp.broadcast_to(each + added, r.target.shape).reshape(-1)


def noise_variances(problem: Problem, jitter: Float[Array, ""]) -> Float[Array, " M"]:
    # Its diagonal.
    return noise(problem, jitter).diagonal


def slope_product(problem: Problem, linearised: Linearised, dz: Float[Array, " N"]):
    # The derivative of the conditions with respect to z, times `dz`.
    return jacobian_product(problem, linearised.jacobians, embed(problem, dz))


def residuals(
    problem: Problem, z: Float[Array, " N"], linear: Float[Array, " M"]
) -> Float[Array, " M"]:
    # Operator minus target for the function with nonlinear entries `z`. What the others
    # contribute is linear in them and does not depend on z: it is given for `v`.
    out = []
    for r, block_z in zip(problem.rows, split(problem, z)):
        at = lambda z, x, r=r: nonlinear_part(r.operator, r.unknowns, r.trace, z, x)
        out.append(r.sums(jax.vmap(at)(block_z, r.points)) - r.target)
    mean = _linear_mean(problem)
    return flat(out) + mean + linear


def _linear_mean(problem: Problem) -> Float[Array, " M"]:
    # The contribution of the prior mean's linear entries.
    out = []
    for r in problem.rows:
        at = lambda z, x, r=r: linearise_operator(r.operator, r.unknowns, r.trace, z, x)
        jacobian = jax.vmap(at)(r.mean[:, r.z_entries], r.points)[0]
        linear = [i for i in range(len(r.trace.jets)) if i not in r.trace.nonlinear]
        keep = jnp.array(linear, int)
        mean = jnp.einsum("nqp,np->nq", jacobian[:, :, keep], r.mean[:, keep])
        out.append(r.sums(mean))
    return flat(out)


def curvatures(
    problem: Problem, z: Float[Array, " N"], weights: Float[Array, " M"]
) -> list[Array]:
    # The (n, k, k) blocks of blockdiag(w . R''): second derivatives, weighted.
    out = []
    parts = split(problem, z), _weights_at_points(problem, weights)
    for r, z_r, w in zip(problem.rows, *parts):

        def at(z, w, x, r=r):
            fn = lambda z: w @ nonlinear_part(r.operator, r.unknowns, r.trace, z, x)
            return jax.hessian(fn)(z)

        out.append(jax.vmap(at)(z_r, w, r.points))
    return out


def block_product(
    problem: Problem, blocks: Sequence[Array], dz: Float[Array, " N"]
) -> Float[Array, " N"]:
    parts = split(problem, dz)
    return flat(map(ft.partial(jnp.einsum, "nij,nj->ni"), blocks, parts))
