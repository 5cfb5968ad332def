"""Coarse to fine orderings of points."""

import heapq
import math

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.spatial import KDTree


def maximin(
    points: Float[ndarray, "n d"], before: Float[ndarray, "m d"] | None = None
) -> tuple[Int[ndarray, " n"], Float[ndarray, " n"]]:
    # The order in which each point is the one farthest from all before it, and from the
    # points `before` all, with that distance: the lengthscale at which the point adds
    # something. Ties are broken by position. The reverse is the ordering of Schaefer,
    # Katzfuss and Owhadi (2021, section 3.1).
    n = len(points)
    if before is None or len(before) == 0:
        nearest = np.full(n, np.inf)
    else:
        nearest = KDTree(before).query(points)[0]
    tree = KDTree(points)
    heap = [(-d, i) for i, d in enumerate(nearest.tolist())]
    heapq.heapify(heap)
    order, distances, left = np.empty(n, int), np.empty(n), np.ones(n, bool)
    for k in range(n):
        # Entries of the heap are not removed when a distance shrinks, so that some are
        # out of date.
        minus, i = heapq.heappop(heap)
        while not left[i] or -minus > nearest[i]:
            minus, i = heapq.heappop(heap)
        order[k], distances[k], left[i] = i, -minus, False
        # Only points as close as that can get closer.
        near = _ball(tree, points[i], -minus)
        near = near[left[near]]
        distance = np.sqrt(np.sum((points[near] - points[i]) ** 2, axis=1))
        closer = distance < nearest[near]
        near, distance = near[closer], distance[closer]
        nearest[near] = distance
        for entry in zip((-distance).tolist(), near.tolist()):
            heapq.heappush(heap, entry)
    return order, distances


def _ball(tree: KDTree, centre: ndarray, radius: float) -> ndarray:
    if not np.isfinite(radius):
        return np.arange(tree.n)
    return np.array(tree.query_ball_point(centre, radius, return_sorted=False), int)


def num_in_ball(dim: int, radius: float) -> float:
    # Points of a regular grid, with the radius in units of its spacing.
    return math.pi ** (dim / 2) / math.gamma(dim / 2 + 1) * radius**dim


def neighbour_distances(
    tree: KDTree, points: Float[ndarray, "n d"], count: int
) -> Float[ndarray, " n"]:
    # To the nearest of so many points in the tree, or to all if there are fewer.
    count = min(count, tree.n)
    distances = np.asarray(tree.query(points, k=count, workers=-1)[0])
    return distances.reshape(len(points), count)[:, -1]
