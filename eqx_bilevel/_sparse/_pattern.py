"""Which functionals are conditioned on which: the sparsity of the factor.

There are two groups of functionals, each with an order from coarse to fine: values, and
others (derivatives, say), all of which come after the values. Functionals of about the
same lengthscale and close to each other make up a supernode, whose parents are the
functionals before it within a few lengthscales. Everything here is NumPy.
"""

import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.spatial import KDTree

from ._ordering import maximin, neighbour_distances, num_in_ball


class Group(NamedTuple):
    # Functionals at points, with the lengthscale of each. They are ordered by that, and
    # where it is the same by `rank`. Those of the `net` with a separation of at least r
    # are at least so far apart and cover everything.
    points: Float[ndarray, "n d"]
    lengthscales: Float[ndarray, " n"]
    rank: Int[ndarray, " n"]
    net: Float[ndarray, "m d"]
    separations: Float[ndarray, " m"]


def ordered(
    points: Float[ndarray, "n d"], before: Float[ndarray, "m d"] | None = None
) -> Group:
    # From coarse to fine, in a maximin ordering. Several functionals at the same point
    # have the same place.
    unique, where = np.unique(points, axis=0, return_inverse=True)
    where = where.reshape(-1)
    order, distances = maximin(unique, before)
    rank, lengthscales = np.empty(len(order), int), np.empty(len(order))
    rank[order], lengthscales[order] = np.arange(len(order)), distances
    smallest = np.min(distances[distances > 0], initial=np.inf)
    lengthscales = np.maximum(lengthscales, smallest)
    return Group(points, lengthscales[where], rank[where], unique[order], distances)


def following(points: Float[ndarray, "n d"], values: Group) -> Group:
    # All of them at the finest scale, that of the values around each: which is the
    # ordering of Chen, Owhadi and Schaefer (arXiv:2304.01294, section 3.3).
    tree, (_, dim) = KDTree(values.points), points.shape
    spacing = neighbour_distances(tree, points, 2 * dim + 1)
    rank = values.rank[tree.query(points)[1]]
    return Group(points, spacing, rank, values.net, values.separations)


class Supernodes(NamedTuple):
    # `s` supernodes of similar sizes. `parents` and `columns` are counted over all
    # functionals, values first, and filled up with their number. `values` and `others`
    # are those in each group, and `packed` which of them, one after the other, are the
    # parents and columns: all, or fewer. `number` is that in an order in which parents
    # come first.
    values: Int[Any, "s v"]
    others: Int[Any, "s o"]
    packed: Int[Any, "s p+c"]
    parents: Int[Any, "s p"]
    columns: Int[Any, "s c"]
    number: Int[Any, " s"]


def supernodes(
    values: Group,
    others: Group,
    rho: tuple[float, float],
    spread: float = 1.5,
) -> tuple[Supernodes, ...]:
    # `rho` is how many lengthscales away parents are, for each group. `spread` is the
    # factor between the lengthscales in one supernode.
    size, finest = (len(values.points), len(others.points)), _Level.all_of(values)
    first = _of_group(values, None, rho[0], spread)
    second = _of_group(others, finest, rho[1], spread)
    out = [_packed(first, rows, size, True) for rows in _similar(first)]
    for rows in _similar(second):
        part = _packed(second, rows, size, False)
        out.append(part._replace(number=part.number + first.number))
    return tuple(out)


class _Ragged(NamedTuple):
    # Rows of different lengths, as sorted pairs.
    row: Int[ndarray, " k"]
    entry: Int[ndarray, " k"]

    @staticmethod
    def join(parts: list["_Ragged"]) -> "_Ragged":
        parts = [_Ragged(np.empty(0, int), np.empty(0, int)), *parts]
        return _Ragged(*(np.concatenate(columns) for columns in zip(*parts)))

    def lengths(self, num_rows: int) -> Int[ndarray, " r"]:
        return np.bincount(self.row, minlength=num_rows)

    def padded(self, rows: Int[ndarray, " s"]) -> Int[ndarray, "s width"]:
        # Some of the rows, filled up with -1.
        first, end = (np.searchsorted(self.row, rows + i) for i in (0, 1))
        index = first[:, None] + np.arange(np.max(end - first, initial=0))
        entries = np.append(self.entry, -1)
        return entries[np.where(index < end[:, None], index, -1)]


class _Nodes(NamedTuple):
    # All supernodes of one group, in an order in which parents come first: their
    # columns, and parents in the same group and in that before it.
    columns: _Ragged
    inside: _Ragged
    above: _Ragged
    number: int


def _packed(
    nodes: _Nodes, rows: Int[ndarray, " s"], size: tuple[int, int], of_values: bool
) -> Supernodes:
    num_values, total = size[0], sum(size)
    own = 0 if of_values else num_values
    inside, columns = (
        np.where(x < 0, total, x + own)
        for x in (nodes.inside.padded(rows), nodes.columns.padded(rows))
    )
    above = nodes.above.padded(rows)
    parents = np.concatenate([np.where(above < 0, total, above), inside], axis=1)
    # Those that are used first, and as many as are used anywhere.
    order = np.argsort(parents == total, axis=1, kind="stable")
    order = order[:, : np.max(np.sum(parents < total, axis=1), initial=0)]
    if order.shape == parents.shape:  # Nothing is gained.
        order = np.broadcast_to(np.arange(order.shape[1]), order.shape)
    last = np.arange(columns.shape[1]) + parents.shape[1]
    packed = np.concatenate([order, np.broadcast_to(last, columns.shape)], axis=1)
    every = np.concatenate([parents, columns], axis=1)
    split = every.shape[1] if of_values else above.shape[1]
    # What fills up may be any functional.
    values, others = (
        np.where(x == total, 0, x - start)
        for x, start in ((every[:, :split], 0), (every[:, split:], num_values))
    )
    parents = np.take_along_axis(parents, order, axis=1)
    return Supernodes(values, others, packed, parents, columns, rows)


class _Level(NamedTuple):
    # What has come so far, for searches.
    tree: KDTree | None
    members: Int[ndarray, " n"]

    @staticmethod
    def all_of(group: Group) -> "_Level":
        return _Level.of(group, np.arange(len(group.points)))

    @staticmethod
    def of(group: Group, index: ndarray) -> "_Level":
        tree = KDTree(group.points[index]) if len(index) > 0 else None
        return _Level(tree, index)

    def near(self, points: ndarray, radii: ndarray) -> tuple[ndarray, ndarray]:
        # Which points, and what is near them.
        if self.tree is None:
            return np.empty(0, int), np.empty(0, int)
        lists = self.tree.query_ball_point(
            points, radii, return_sorted=False, workers=-1
        )
        lengths = np.fromiter(map(len, lists), int, len(lists))
        found = np.fromiter(chain.from_iterable(lists), int, lengths.sum())
        return np.repeat(np.arange(len(points)), lengths), self.members[found]


def _of_group(group: Group, values: _Level | None, rho: float, spread: float) -> _Nodes:
    join = _Ragged.join
    if len(group.points) == 0:
        return _Nodes(join([]), join([]), join([]), 0)
    count, columns, inside, above = 0, [], [], []
    group = group._replace(lengthscales=_usual(group, values, rho))
    order = np.lexsort((group.rank, -group.lengthscales))
    levels = _levels(group.lengthscales[order], spread)
    number = np.full(len(order), np.iinfo(int).max)  # of the supernode of each
    for start, stop in zip(levels[:-1], levels[1:]):
        members = order[start:stop]
        scale = float(group.lengthscales[members[-1]])
        clusters = _clusters(group, members, rho * scale)
        number[members] = count + clusters
        sort = np.argsort(clusters, kind="stable")
        columns.append(_Ragged(number[members[sort]], members[sort]))
        level = _Level.of(group, order[:stop])
        radii = _radii(group, members, level, values, rho)
        points, near = group.points[members], level.near
        inside.append(_parents(number[members], *near(points, radii), number))
        if values is not None:
            above.append(_parents(number[members], *values.near(points, radii), None))
        count += int(clusters.max()) + 1
    return _Nodes(join(columns), join(inside), join(above), count)


def _usual(group: Group, values: _Level | None, rho: float) -> Float[ndarray, " n"]:
    # Lengthscales, but none far below the spacing around: a few of many random points
    # are very close, and would each be a supernode.
    enough = _enough(group.points, (values, _Level.all_of(group)), rho)
    return np.maximum(group.lengthscales, enough / rho)


def _levels(lengthscales: ndarray, spread: float) -> list[int]:
    # Where the levels start, in each of which lengthscales differ by at most a factor.
    # The first lengthscales may be infinite.
    finite = lengthscales[np.isfinite(lengthscales)]
    if len(finite) == 0:
        return [0, len(lengthscales)]
    largest = finite[0]
    depth = np.log(largest / np.minimum(lengthscales, largest)) / math.log(spread)
    changes = np.flatnonzero(np.diff(np.floor(depth + 1e-9)))
    return [0, *(changes + 1).tolist(), len(lengthscales)]


def _clusters(group: Group, members, radius: float) -> Int[ndarray, " m"]:
    # The nearest of points that are at least so far apart. Clusters come in the order
    # of these, so that one after the other is far away, and not a neighbour.
    coarse = group.net[group.separations >= radius]
    if len(coarse) == 0:
        return np.zeros(len(members), int)
    nearest = KDTree(coarse).query(group.points[members])[1]
    return np.unique(nearest, return_inverse=True)[1]


def _radii(group: Group, members, level: _Level, values: _Level | None, rho: float):
    # Some lengthscales, or as far as is enough: the lengthscale of one of two very
    # close points is no measure of how far others are.
    enough = _enough(group.points[members], (values, level), rho)
    radii = np.maximum(rho * group.lengthscales[members], enough)
    diameter = np.linalg.norm(np.ptp(group.points, axis=0))
    return np.minimum(radii, 2 * diameter + 1) * (1 + 1e-9)


def _enough(points: ndarray, levels, rho: float) -> Float[ndarray, " m"]:
    # As far as there are as many points as would be in half a ball on a regular grid.
    count = math.ceil(0.5 * num_in_ball(points.shape[1], rho))
    trees = [v.tree for v in levels if v is not None and v.tree is not None]
    return np.min([neighbour_distances(t, points, count) for t in trees], axis=0)


def _parents(numbers, member, near, number_of) -> _Ragged:
    # The union over the members of each supernode; only what comes before it.
    row = numbers[member]
    if number_of is not None:
        before = number_of[near] < row
        row, near = row[before], near[before]
    size = int(near.max(initial=0)) + 1
    keys = np.unique(row * size + near)
    return _Ragged(keys // size, keys % size)


# Seconds that factorising a supernode takes for each pair of its functionals, and for
# each three; and how many are worth another shape, which has to be compiled.
_PAIR, _TRIPLE, _SHAPE = 5e-9, 7e-11, 1.0


def _similar(nodes: _Nodes) -> list[Int[ndarray, " s"]]:
    # Which supernodes are filled up to the same sizes: first those that are about
    # equal, and then always those for which it costs least.
    if nodes.number == 0:
        return []
    ragged = nodes.columns, nodes.inside, nodes.above
    sizes = np.stack([x.lengths(nodes.number) for x in ragged], axis=1)
    sizes = np.concatenate([sizes, sizes[:, 1:].sum(axis=1, keepdims=True)], axis=1)

    def seconds(count, sizes):
        padded = sizes[..., :3].sum(axis=-1)
        packed = sizes[..., 0] + sizes[..., 3]
        return count * (_PAIR * padded**2 + _TRIPLE * packed**3)

    classes = np.ceil(np.log(np.maximum(sizes, 1)) / math.log(1.2))
    classes = np.unique(classes, axis=0, return_inverse=True)[1].reshape(-1)
    groups = [np.flatnonzero(classes == i) for i in range(classes.max() + 1)]
    count = np.array([float(len(g)) for g in groups])
    largest = np.stack([sizes[g].max(axis=0) for g in groups]).astype(float)
    while len(groups) > 1:
        alone = seconds(count, largest)
        together = np.maximum(largest[:, None], largest[None])
        extra = seconds(count[:, None] + count, together) - alone[:, None] - alone
        np.fill_diagonal(extra, np.inf)
        i, j = sorted(np.unravel_index(np.argmin(extra), extra.shape))
        if extra[i, j] > _SHAPE:
            break
        groups[i] = np.concatenate([groups[i], groups.pop(j)])
        largest[i], count[i] = together[i, j], count[i] + count[j]
        largest, count = np.delete(largest, j, axis=0), np.delete(count, j)
    return [np.sort(g) for g in groups]
