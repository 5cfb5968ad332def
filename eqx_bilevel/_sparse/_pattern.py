"""Which functionals are conditioned on which: the sparsity of the factor.

There are two groups of functionals, each with an order from coarse to fine: values, and
others (derivatives, say), all of which come after the values. Functionals of about the
same lengthscale and close to each other make up a supernode, whose parents are the
functionals before it within a few lengthscales. Everything here is NumPy.
"""

import math
from typing import NamedTuple

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
    # `s` supernodes of similar sizes: the functionals in each, and their parents. Rows
    # are filled up with the number of functionals in the group.
    columns: Int[ndarray, "s c"]
    value_parents: Int[ndarray, "s v"]
    other_parents: Int[ndarray, "s o"]
    of_values: bool  # which group the columns are of


class _Ragged(NamedTuple):
    # Rows of different lengths, as sorted pairs.
    row: Int[ndarray, " k"]
    entry: Int[ndarray, " k"]

    def lengths(self, num_rows: int) -> Int[ndarray, " r"]:
        return np.bincount(self.row, minlength=num_rows)

    def padded(self, start: int, stop: int, fill: int) -> Int[ndarray, "s width"]:
        # Some of the rows.
        lo, hi = np.searchsorted(self.row, (start, stop))
        row, entry = self.row[lo:hi] - start, self.entry[lo:hi]
        lengths = np.bincount(row, minlength=stop - start)
        out = np.full((stop - start, int(lengths.max(initial=0))), fill)
        first = np.cumsum(lengths) - lengths
        out[row, np.arange(len(row)) - first[row]] = entry
        return out


def _empty() -> _Ragged:
    return _Ragged(np.empty(0, int), np.empty(0, int))


def _join(parts: list[_Ragged]) -> _Ragged:
    parts = [_empty(), *parts]
    return _Ragged(*(np.concatenate(columns) for columns in zip(*parts)))


def supernodes(
    values: Group,
    others: Group,
    rho: tuple[float, float],
    spread: float = 1.5,
) -> list[Supernodes]:
    # In an order in which parents come first. `rho` is how many lengthscales away
    # parents are, for each group. `spread` is the factor between the lengthscales in
    # one supernode.
    finest = _Level.all_of(values)
    out = _of_group(values, None, rho[0], spread)
    return out + _of_group(others, finest, rho[1], spread)


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
            return _empty()
        lists = self.tree.query_ball_point(points, radii, return_sorted=False)
        lengths = np.fromiter(map(len, lists), int, len(lists))
        found = np.fromiter((i for one in lists for i in one), int, lengths.sum())
        return np.repeat(np.arange(len(points)), lengths), self.members[found]


def _of_group(
    group: Group, values: _Level | None, rho: float, spread: float
) -> list[Supernodes]:
    if len(group.points) == 0:
        return []
    order = np.lexsort((group.rank, -group.lengthscales))
    levels = _levels(group.lengthscales[order], spread)
    number = np.full(len(order), np.iinfo(int).max)  # of the supernode of each
    count, bounds = 0, [0]
    columns, inside, above = [], [], []
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
        bounds.append(count)
    parts = _join(columns), _join(inside), _join(above)
    sizes = np.stack([part.lengths(count) for part in parts], axis=1)
    out = []
    for start, stop in _similar(bounds, sizes):
        fill = len(group.points), len(group.points), 0
        if values is not None:
            fill = len(group.points), len(group.points), len(values.members)
        c, i, a = (p.padded(start, stop, f) for p, f in zip(parts, fill))
        of_values = values is None
        out.append(Supernodes(c, *((i, a) if of_values else (a, i)), of_values))
    return out


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


def _radii(group: Group, members, level: _Level, values, rho: float):
    # Some lengthscales, or as far as there are as many points as would be in half a
    # ball on a regular grid: the lengthscale of one of two very close points is no
    # measure of how far others are.
    points, dim = group.points[members], group.points.shape[1]
    count = math.ceil(0.5 * num_in_ball(dim, rho))
    trees = [v.tree for v in (values, level) if v is not None and v.tree is not None]
    enough = np.min([neighbour_distances(t, points, count) for t in trees], axis=0)
    radii = np.maximum(rho * group.lengthscales[members], enough)
    diameter = np.linalg.norm(np.ptp(group.points, axis=0))
    return np.minimum(radii, 2 * diameter + 1) * (1 + 1e-9)


def _parents(numbers, member, near, number_of) -> _Ragged:
    # The union over the members of each supernode; only what comes before it.
    row = numbers[member]
    if number_of is not None:
        before = number_of[near] < row
        row, near = row[before], near[before]
    size = int(near.max(initial=0)) + 1
    keys = np.unique(row * size + near)
    return _Ragged(keys // size, keys % size)


# So many pairs of functionals take as long as compiling one more shape.
_PAIRS_PER_SHAPE = 3e7


def _similar(bounds: list[int], sizes: ndarray) -> list[tuple[int, int]]:
    # Neighbouring levels are put together, those first for which it costs least.
    def cost(start, stop):
        return (stop - start) * float(sizes[start:stop].max(axis=0).sum()) ** 2

    bounds = list(bounds)
    while len(bounds) > 2:
        triples = list(zip(bounds, bounds[1:], bounds[2:]))
        extra = [cost(a, c) - cost(a, b) - cost(b, c) for a, b, c in triples]
        if min(extra) > _PAIRS_PER_SHAPE:
            break
        del bounds[int(np.argmin(extra)) + 1]
    return list(zip(bounds[:-1], bounds[1:]))
