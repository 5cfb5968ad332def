"""What can be prepared for a problem before compiling: orderings and patterns."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from .._gram import Block
from .._linearised import Linearised
from .._problem import Problem, Rows
from ._factor import factorise, Functionals, Pattern, SparseFactor
from ._layout import Layout, layout
from ._pattern import following, ordered, supernodes


class Plan(eqx.Module):
    # Of the points, of which derivatives are used, and of the coefficients with which
    # some enter conditions linearly: the same for all kernels and all targets.
    layout: Layout
    patterns: dict[str, tuple[Pattern, ...]]  # of the functionals of each unknown
    conditions: "ConditionsPlan"

    def factorise(self, problem: Problem, nugget) -> dict[str, SparseFactor]:
        # For all steps: it does not depend on where conditions are linearised.
        return {
            name: factorise(problem.kernels, functionals, self.patterns[name], nugget)
            for name, functionals in self.layout.functionals.items()
        }


class ConditionsPlan(eqx.Module):
    # For a factor of the conditions' own covariance: those that read values only come
    # first, then those with derivatives.
    pattern: tuple[Pattern, ...]
    order: Int[Array, " M"]
    inverse: Int[Array, " M"]

    def factorise(
        self, problem: Problem, linearised: Linearised, gamma: Float[Array, " M"]
    ) -> SparseFactor:
        functionals = _functionals(problem, linearised)
        noise = gamma[self.order]
        return factorise(problem.kernels, functionals, self.pattern, 0.0, noise)


def plan(
    problem: Problem,
    *,
    rho: tuple[float, float] = (6.0, 3.0),
    rho_conditions: float = 4.0,
    scale: ArrayLike = 1.0,
) -> Plan:
    # Functionals are conditioned on others that are at most `rho` lengthscales away:
    # values, which need more, and all others. `rho_conditions` is that of the
    # preconditioner. Coordinates are divided by `scale`, which for kernels with a
    # lengthscale for each dimension should be these.
    scale = np.broadcast_to(scale, problem.rows[0].points.shape[1:])
    if any(row.sum_over > 1 for row in problem.rows):
        raise ValueError(
            "Conditions with `quadrature` have no sparse factor: solve this problem "
            "with a dense one."
        )
    if not (min(*rho, rho_conditions) > 1 and np.all(scale > 0)):
        raise ValueError(
            "`rho` and `rho_conditions` must be greater than 1 and `scale` positive, "
            f"got {rho}, {rho_conditions} and {scale}."
        )
    whole = layout(problem)
    patterns = {
        name: _pattern(functionals, rho, scale)
        for name, functionals in whole.functionals.items()
    }
    conditions = _of_conditions(problem, rho_conditions, scale)
    return Plan(whole, patterns, conditions)


def _pattern(functionals: Functionals, rho, scale) -> tuple[Pattern, ...]:
    values = ordered(np.asarray(functionals.values.points) / scale)
    others = following(np.asarray(functionals.others.points) / scale, values)
    return _patterns(values, others, rho)


def _patterns(values, others, rho) -> tuple[Pattern, ...]:
    sizes = len(values.points), len(others.points)
    nodes = supernodes(values, others, rho)
    return tuple(Pattern.of(part, *sizes) for part in nodes)


def _of_values(row: Rows) -> bool:
    return not any(any(index) for _, index in row.trace.jets)


def _groups(problem: Problem) -> tuple[list[int], list[int]]:
    used = [i for i, row in enumerate(problem.rows) if row.target.size > 0]
    values = [i for i in used if _of_values(problem.rows[i])]
    return values, [i for i in used if i not in values]


def _of_conditions(problem: Problem, rho, scale) -> ConditionsPlan:
    first, second = _groups(problem)
    rows = problem.rows

    def points(chosen):
        parts = [np.zeros((0, len(scale)))]
        parts += [np.repeat(rows[i].points, rows[i].target.shape[1], 0) for i in chosen]
        return np.concatenate(parts) / scale

    values = ordered(points(first))
    others = ordered(points(second), values.points)
    ends = np.cumsum([row.target.size for row in rows])
    index = np.split(np.arange(ends[-1]), ends[:-1])
    order = np.concatenate([index[i] for i in first + second])
    pattern = _patterns(values, others, (rho, rho))
    return ConditionsPlan(pattern, jnp.asarray(order), jnp.asarray(np.argsort(order)))


def _functionals(problem: Problem, linearised: Linearised) -> Functionals:
    first, second = _groups(problem)
    blocks = [
        (r.block(jacobian), i)
        for i, (r, jacobian) in enumerate(zip(problem.rows, linearised.jacobians))
    ]
    some = lambda chosen: [block for block, i in blocks if i in chosen]
    dim = problem.rows[0].points.shape[1]
    name = next(iter(problem.kernels))
    empty = Block(
        jnp.zeros((0, dim), problem.dtype),
        jnp.zeros((0, 1, 1), problem.dtype),
        ((name, (0,) * dim),),
    )
    return Functionals(_one_block(some(first), empty), _one_block(some(second), empty))


def _one_block(blocks: Sequence[Block], empty: Block) -> Block:
    # With one functional at each point.
    if len(blocks) == 0:
        return empty
    jets = tuple(dict.fromkeys(jet for block in blocks for jet in block.jets))
    points, coefficients = [], []
    for block in blocks:
        given = block.coefficients
        assert given is not None
        n, q, _ = given.shape
        full = jnp.zeros((n, q, len(jets)), given.dtype)
        where = jnp.array([jets.index(jet) for jet in block.jets])
        coefficients.append(full.at[:, :, where].set(given).reshape(n * q, 1, -1))
        points.append(jnp.repeat(block.points, q, axis=0))
    return Block(jnp.concatenate(points), jnp.concatenate(coefficients), jets)
