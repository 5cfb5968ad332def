"""The functionals that all linearisations of a problem are made of, and how.

They do not depend on where conditions are linearised, so that a factor of their
covariance serves for all steps. They are, for each unknown, its values at
all points, its derivatives that enter a condition nonlinearly, and of the others the
combinations that conditions have. J, which has few entries in each row, changes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._gram import Block
from .._jets import Index, Trace
from .._linearised import flat, split_weights
from .._problem import Problem
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


class Use(NamedTuple):
    # Some functionals at the points of a condition: combinations of entries of its jet.
    row: int
    unknown: str
    entry: int | None
    component: int | None
    entries: tuple[int, ...]


class Layout(eqx.Module):
    # All functionals of a problem, by unknown, and how the conditions use them.
    values: dict[str, Float[Array, "v d"]]  # where
    terms: tuple[Term, ...]
    uses: tuple[Use, ...] = eqx.field(static=True)
    sizes: tuple[tuple[str, int], ...] = eqx.field(static=True)

    def functionals(self, problem: Problem, jacobians) -> dict[str, Functionals]:
        out = {}
        for name, points in self.values.items():
            value = ((name, (0,) * points.shape[1]),)
            uses = [use for use in self.uses if use.unknown == name]
            others = _others(problem, jacobians, uses, points[:0])
            out[name] = Functionals(Block(points, None, value), others)
        return out

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
        adds = []
        for t in self.terms:
            if t.entry is None:
                adds.append(parts[t.row][:, t.component])
            else:
                here = jacobians[t.row][:, :, t.entry]
                adds.append(jnp.sum(here * parts[t.row], axis=1))
        return self._collect(adds, self.terms)

    def read_z(self, problem: Problem, vectors: Vectors) -> Float[Array, " N"]:
        # The entries that enter nonlinearly.
        parts = []
        for i, row in enumerate(problem.rows):
            read = [vectors[t.unknown][t.index] for t in self._z_terms(i, row.trace)]
            parts.append(jnp.stack(read, axis=1) if read else row.mean[:, :0])
        return flat(parts)

    def read_z_transposed(self, problem: Problem, parts: Sequence[Array]) -> Vectors:
        # Of z, split over the conditions.
        adds, terms = [], []
        for i, (row, part) in enumerate(zip(problem.rows, parts)):
            new = self._z_terms(i, row.trace)
            adds.extend(part.T[: len(new)])
            terms.extend(new)
        return self._collect(adds, terms)

    def _z_terms(self, i: int, trace: Trace) -> list[Term]:
        index = {t.entry: t for t in self.terms if t.row == i}
        return [index[entry] for entry in trace.nonlinear]

    def _collect(self, adds: Sequence[Array], terms: Sequence[Term]) -> Vectors:
        dtype = next(iter(self.values.values())).dtype
        out = {name: jnp.zeros(n, dtype) for name, n in self.sizes}
        for add, t in zip(adds, terms):
            out[t.unknown] = out[t.unknown].at[t.index].add(add)
        return out


def _others(problem: Problem, jacobians, uses: Sequence[Use], nowhere) -> Block:
    # One block of them all, with one functional at each point.
    jet = lambda use, e: problem.rows[use.row].trace.jets[e]
    jets = tuple(dict.fromkeys(jet(use, e) for use in uses for e in use.entries))
    points, parts = [nowhere], [jnp.zeros((0, 1, len(jets)), nowhere.dtype)]
    for use in uses:
        row, jacobian = problem.rows[use.row], jacobians[use.row]
        n = len(row.points)
        where = jnp.array([jets.index(jet(use, e)) for e in use.entries])
        if use.component is None:
            given = jnp.ones((n, 1), nowhere.dtype)
        else:
            given = jacobian[:, use.component, jnp.array(use.entries)]
        full = jnp.zeros((n, 1, len(jets)), nowhere.dtype)
        points.append(row.points)
        parts.append(full.at[:, 0, where].set(given))
    return Block(jnp.concatenate(points), jnp.concatenate(parts), jets)


class Row(NamedTuple):
    # What is known of a condition before anything is computed.
    points: Float[np.ndarray, "n d"]
    trace: Trace
    entries: tuple[frozenset[int], ...]  # on which each component depends


def _is_value(jet: tuple[str, Index]) -> bool:
    return not any(jet[1])


def _uses(i: int, row: Row) -> list[Use]:
    # What is needed besides values.
    jets, nonlinear = row.trace.jets, row.trace.nonlinear
    derivatives = [e for e, jet in enumerate(jets) if not _is_value(jet)]
    out = [Use(i, jets[e][0], e, None, (e,)) for e in derivatives if e in nonlinear]
    for q, entries in enumerate(row.entries):
        linear = [e for e in derivatives if e in entries and e not in nonlinear]
        for name in sorted({jets[e][0] for e in linear}):
            chosen = tuple(e for e in linear if jets[e][0] == name)
            out.append(Use(i, name, None, q, chosen))
    return out


class Places(NamedTuple):
    # All different points of conditions on an unknown, and which are whose.
    points: Float[np.ndarray, "v d"]
    where: dict[int, Int[np.ndarray, " n"]]


def layout(rows: Sequence[Row], places: Mapping[str, Places]) -> Layout:
    uses = [use for i, row in enumerate(rows) for use in _uses(i, row)]
    values, terms, sizes = {}, [], []
    # To the device not by `jnp.asarray`, which compiles a program for each shape.
    for name, (points, where) in places.items():
        values[name] = jax.device_put(points)
        for i, row in enumerate(rows):
            for e, jet in enumerate(row.trace.jets):
                if jet[0] == name and _is_value(jet):
                    terms.append(Term(jax.device_put(where[i]), i, name, e, None))
        start = len(points)
        for use in uses:
            if use.unknown == name:
                index = np.arange(start, start + len(rows[use.row].points))
                start += len(index)
                terms.append(
                    Term(jax.device_put(index), use.row, name, use.entry, use.component)
                )
        sizes.append((name, start))
    return Layout(values, tuple(terms), tuple(uses), tuple(sizes))


def value_places(rows: Sequence[Row]) -> dict[str, Places]:
    names = dict.fromkeys(name for row in rows for name, _ in row.trace.jets)
    return {name: _places(rows, name) for name in names}


def _places(rows: Sequence[Row], name: str) -> Places:
    used = {
        i: row.points
        for i, row in enumerate(rows)
        if name in {unknown for unknown, _ in row.trace.jets}
    }
    points, where = np.unique(
        np.concatenate(list(used.values())), axis=0, return_inverse=True
    )
    ends = np.cumsum([len(p) for p in used.values()])
    return Places(points, dict(zip(used, np.split(where.reshape(-1), ends[:-1]))))
