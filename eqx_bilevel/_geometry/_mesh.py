"""Meshes: their vertices, and which of them are on the boundary."""

import itertools as it
from os import PathLike

import numpy as np
from jaxtyping import Float, Int


# The vertices that occur in cells, and the cells.
def read_mesh(
    path: str | PathLike,
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, "m k"]]:
    try:
        import meshio
    except ImportError as error:
        raise ImportError(
            "Meshes are read by meshio. Install it by `pip install meshio`, or with "
            'the extra `mesh`: `pip install "eqx_bilevel[mesh]"`.'
        ) from error
    mesh = meshio.read(path)
    points, kinds = np.asarray(mesh.points, float), {c.type for c in mesh.cells}
    kind = "tetra" if "tetra" in kinds else "triangle"
    # Cells of fewer dimensions are those of the boundary, or of the lines of a drawing.
    ignored = {"vertex", "line", "triangle"}
    if kind not in kinds or not kinds <= ignored | {kind}:
        raise ValueError(
            f"Only meshes of triangles or of tetrahedra can be read, and {path} has "
            f"cells of the kinds {sorted(kinds)}."
        )
    cells = np.concatenate([np.asarray(c.data) for c in mesh.cells if c.type == kind])
    used, cells = np.unique(cells, return_inverse=True)
    points, dim = points[used], 2 if kind == "triangle" else 3
    if np.any(points[:, dim:] != points[:1, dim:]):
        raise ValueError(
            f"The mesh {path} is a surface in space, of triangles only: it has no "
            "inside. Fill it with tetrahedra first."
        )
    return points[:, :dim], cells.reshape(-1, dim + 1)


# Which vertices are on the boundary, and outward vectors there: the sum of those of the
# facets, each as long as the facet is large.
def boundary_vertices(
    points: Float[np.ndarray, "n d"], cells: Int[np.ndarray, "m k"]
) -> tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b d"]]:
    facets, opposite = _boundary_facets(cells)
    outward = _outward(points[facets], points[opposite])
    normals = np.zeros_like(points)
    for column in facets.T:
        np.add.at(normals, column, outward)
    # Where the sum vanishes, as if two cells touch in a vertex only, that of one facet.
    one = np.zeros_like(points)
    for column in facets.T:
        one[column] = outward
    size = np.linalg.norm(one, axis=1)
    vanishes = np.linalg.norm(normals, axis=1) < 1e-8 * size
    normals[vanishes] = one[vanishes]
    found = np.unique(facets)
    return found, normals[found]


# The facets that belong to one cell, and that cell's other vertex.
def _boundary_facets(cells: Int[np.ndarray, "m k"]):
    k = cells.shape[1]
    facets = np.concatenate([cells[:, c] for c in it.combinations(range(k), k - 1)])
    # In the same order, since the first combination leaves out the last vertex.
    opposite = cells[:, ::-1].T.reshape(-1)
    _, first, count = np.unique(
        np.sort(facets, axis=1), axis=0, return_index=True, return_counts=True
    )
    alone = first[count == 1]
    return facets[alone], opposite[alone]


def _outward(facets: Float[np.ndarray, "f d d"], opposite: Float[np.ndarray, "f d"]):
    edges = facets[:, 1:] - facets[:, :1]
    if facets.shape[2] == 2:
        normal = np.stack([edges[:, 0, 1], -edges[:, 0, 0]], axis=1)
    else:
        normal = np.cross(edges[:, 0], edges[:, 1])
    inward = np.sum(normal * (opposite - facets[:, 0]), axis=1) > 0
    return np.where(inward[:, None], -normal, normal)
