"""The functionals that all linearisations of a problem are made of, and how.

They do not depend on where conditions are linearised, so that a factor of their
covariance serves for all steps. They are, for each unknown, its values at
all points, its derivatives that enter a condition nonlinearly, and of the others the
combinations that conditions have. J, which has few entries in each row, changes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._gram import Block
from .._linearised import flat, linearise, prior_z, split_weights
from .._problem import Problem, Rows
from ._factor import Functionals


Vectors = Mapping[str, Float[Array, " f"]]  # by unknown, one entry for each functional


class Term(eqx.Module):
    # Where a condition reads its functionals: `entry` of its jets, or what `component`
    # of it has of the entries that enter linearly.
    index: Int[Array, " n"]
    row: int = eqx.field(static=True)
    unknown: str = eqx.field(static=True)
    entry: int | None = eqx.field(static=True)
    component: int | None = eqx.field(static=True)


class Layout(eqx.Module):
    # All functionals of a problem, by unknown, and how the conditions use them.
    functionals: dict[str, Functionals]
    terms: tuple[Term, ...]

    def apply(self, problem: Problem, jacobians, vectors: Vectors):
        # J v
        out = [jnp.zeros(j.shape[:2], j.dtype) for j in jacobians]
        for t in self.terms:
            read = vectors[t.unknown][t.index]
            if t.entry is None:
                out[t.row] = out[t.row].at[:, t.component].add(read)
            else:
                here = jacobians[t.row][:, :, t.entry]
                out[t.row] = out[t.row] + here * read[:, None]
        return flat(r.sums(part) for r, part in zip(problem.rows, out))

    def apply_transposed(self, problem: Problem, jacobians, weights) -> Vectors:
        # J^T w
        parts = split_weights(problem, weights)
        parts = [r.at_points(part) for r, part in zip(problem.rows, parts)]
        new = lambda f: jnp.zeros(f.size, weights.dtype)
        out = {name: new(f) for name, f in self.functionals.items()}
        for t in self.terms:
            if t.entry is None:
                add = parts[t.row][:, t.component]
            else:
                add = jnp.sum(jacobians[t.row][:, :, t.entry] * parts[t.row], axis=1)
            out[t.unknown] = out[t.unknown].at[t.index].add(add)
        return out

    def read_z(self, problem: Problem, vectors: Vectors) -> Float[Array, " N"]:
        # The entries that enter nonlinearly.
        index = {(t.row, t.entry): t for t in self.terms}
        parts = []
        for i, row in enumerate(problem.rows):
            terms = [index[i, entry] for entry in row.trace.nonlinear]
            read = [vectors[t.unknown][t.index] for t in terms]
            parts.append(jnp.stack(read, axis=1) if read else row.mean[:, :0])
        return flat(parts)


class _Use(NamedTuple):
    # Some functionals at the points of a condition.
    row: int
    unknown: str
    entry: int | None
    component: int | None
    coefficients: np.ndarray  # (n, p), by jet
    jets: tuple


def _uses(i: int, row: Rows, jacobian: np.ndarray) -> list[_Use]:
    # What is needed besides values.
    jets, nonlinear = row.trace.jets, row.trace.nonlinear
    derivative = [e for e, (_, index) in enumerate(jets) if any(index)]
    n, out = len(row.points), []
    for e in derivative:
        if e in nonlinear:
            out.append(_Use(i, jets[e][0], e, None, np.ones((n, 1)), (jets[e],)))
    for name in sorted({jets[e][0] for e in derivative}):
        linear = [e for e in derivative if e not in nonlinear and jets[e][0] == name]
        for q in range(jacobian.shape[1]):
            used = [e for e in linear if np.any(jacobian[:, q, e] != 0)]
            if used:
                chosen = tuple(jets[e] for e in used)
                coefficients = jacobian[:, q][:, used]
                out.append(_Use(i, name, None, q, coefficients, chosen))
    return out


def layout(problem: Problem) -> Layout:
    jacobians = linearise(problem, prior_z(problem)).jacobians
    functionals, terms = {}, []
    uses = [
        use
        for i, (row, jacobian) in enumerate(zip(problem.rows, jacobians))
        for use in _uses(i, row, np.asarray(jacobian))
    ]
    for name in problem.kernels:
        points, where = _value_points(problem, name)
        for i, row in enumerate(problem.rows):
            for e, (unknown, index) in enumerate(row.trace.jets):
                if unknown == name and not any(index):
                    terms.append(Term(jnp.asarray(where[i]), i, name, e, None))
        others, new = _others(
            problem, len(points), [u for u in uses if u.unknown == name]
        )
        value = ((name, (0,) * points.shape[1]),)
        functionals[name] = Functionals(Block(jnp.asarray(points), None, value), others)
        terms.extend(new)
    return Layout(functionals, tuple(terms))


def _value_points(problem: Problem, name: str) -> tuple[np.ndarray, dict]:
    # All different points of conditions on an unknown, and which are whose.
    rows = {
        i: np.asarray(row.points)
        for i, row in enumerate(problem.rows)
        if name in {unknown for unknown, _ in row.trace.jets}
    }
    points, where = np.unique(
        np.concatenate(list(rows.values())), axis=0, return_inverse=True
    )
    ends = np.cumsum([len(p) for p in rows.values()])
    return points, dict(zip(rows, np.split(where.reshape(-1), ends[:-1])))


def _others(problem: Problem, start: int, uses: Sequence[_Use]):
    # One block of them all, with one functional at each point.
    jets = tuple(dict.fromkeys(jet for use in uses for jet in use.jets))
    dim, dtype = problem.rows[0].points.shape[1], problem.dtype
    points, coefficients, terms = [np.zeros((0, dim))], [np.zeros((0, len(jets)))], []
    for use in uses:
        at = np.asarray(problem.rows[use.row].points)
        full = np.zeros((len(at), len(jets)))
        full[:, [jets.index(jet) for jet in use.jets]] = use.coefficients
        index = jnp.arange(start, start + len(at))
        start += len(at)
        points.append(at)
        coefficients.append(full)
        terms.append(Term(index, use.row, use.unknown, use.entry, use.component))
    join = lambda parts: jnp.asarray(np.concatenate(parts), dtype)
    return Block(join(points), join(coefficients)[:, None, :], jets), terms
