"""Points of one's own, and those of meshes."""

import itertools as it
import sys

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import meshio
import numpy as np
import pytest
from scipy.spatial import Delaunay


def _disk(n=20):
    # Rings of points, and the directions of the outermost one.
    radii = np.linspace(0.1, 1.0, 10)
    angle = np.linspace(0, 2 * np.pi, 6 * n, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([r * circle for r in radii[:-1]]), circle


def _lattice(dim, n):
    axes = np.meshgrid(*[np.linspace(0, 1, n)] * dim, indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, dim)


def _simplices(dim, n):
    # Kuhn's triangulation of the cube: in each small one, the paths from its lowest to
    # its highest corner.
    number = lambda index: np.ravel_multi_index(index, (n,) * dim)
    cells = []
    for corner in it.product(range(n - 1), repeat=dim):
        for order in it.permutations(range(dim)):
            path = [np.array(corner)]
            for axis in order:
                path.append(path[-1] + np.eye(dim, dtype=int)[axis])
            cells.append([number(tuple(p)) for p in path])
    return np.array(cells)


def _on_faces(points):
    return np.any((points == 0) | (points == 1), axis=1)


def _sorted(points):
    return np.array(sorted(map(tuple, np.asarray(points).tolist())))


def test_subselection(getkey):
    inside, circle = _disk()
    cloud = eb.PointCloud(inside, circle)
    assert isinstance(cloud, eb.AbstractDomain) and cloud.dim == 2
    np.testing.assert_array_equal(cloud.interior(), inside)
    np.testing.assert_array_equal(cloud.boundary(), circle)
    np.testing.assert_array_equal(cloud.bounds, [[-1, -1], [1, 1]])
    for method in ("farthest", "random"):
        for n, fn, everything in (
            (30, cloud.interior, inside),
            (30, cloud.boundary, circle),
        ):
            some = set(map(tuple, fn(n, key=getkey(), method=method).tolist()))
            assert len(some) == n and some <= set(map(tuple, everything.tolist()))
    # Evenly: of 120 points on the circle a quarter leaves gaps of at most twice four.
    angle = np.sort(np.arctan2(*np.asarray(cloud.boundary(30)).T))
    gaps = np.diff(angle, append=angle[0] + 2 * np.pi) / (2 * np.pi / 120)
    assert np.max(gaps) < 8.01
    random = np.asarray(cloud.boundary(30, key=getkey(), method="random"))
    angle = np.sort(np.arctan2(*random.T))
    assert np.max(np.diff(angle)) / (2 * np.pi / 120) > 8.01


def test_farthest_by_hand():
    inside, circle = _disk(5)
    chosen = [0]
    for _ in range(19):
        apart = np.linalg.norm(inside[:, None] - inside[None, chosen], axis=2)
        # Equally far points are as good as each other: those of the library are
        # compared by their distances.
        chosen.append(int(np.argmax(np.min(apart, axis=1))))
    found = np.asarray(eb.PointCloud(inside, circle).interior(20))
    nearest = lambda x: [
        np.min(np.linalg.norm(x[:i] - x[i], axis=1)) for i in range(1, 20)
    ]
    np.testing.assert_allclose(nearest(found)[:5], nearest(inside[chosen])[:5])
    assert np.min(nearest(found)) > 0.9 * np.min(nearest(inside[chosen]))


def test_distance_and_normals(getkey):
    inside, circle = _disk(200)
    cloud = eb.PointCloud(inside, circle, 3.0 * circle)
    x = jax.random.uniform(getkey(), (300, 2), minval=-1.5, maxval=1.5)
    disk = eb.Ball([0.0, 0.0], 1.0)
    np.testing.assert_allclose(
        cloud.signed_distance(x), disk.signed_distance(x), atol=1e-5
    )
    np.testing.assert_array_equal(cloud.contains(x), disk.contains(x))
    np.testing.assert_allclose(cloud.normal(circle), circle, atol=1e-12)
    np.testing.assert_allclose(cloud.normal(x), disk.normal(x), atol=3e-3)
    assert jnp.all(cloud.contains(inside)) and jnp.all(cloud.contains(circle))


@pytest.mark.parametrize("suffix, kind_of_file", (("vtu", "vtu"), ("msh", "gmsh22")))
@pytest.mark.parametrize("dim, n", ((2, 9), (3, 5)))
def test_mesh(dim, n, suffix, kind_of_file, tmp_path):
    points, cells = _lattice(dim, n), _simplices(dim, n)
    # As mesh generators do: a point of no cell, three coordinates, cells of the
    # boundary or lines of a drawing as well.
    more = np.concatenate([np.full((1, dim), 7.0), points])
    more = np.concatenate([more, np.zeros((len(more), 3 - dim))], axis=1)
    kind = {2: "triangle", 3: "tetra"}[dim]
    kinds = [("line", np.array([[1, 2]])), (kind, cells + 1)]
    if dim == 3:
        kinds.insert(1, ("triangle", np.array([[1, 2, 1 + n]])))
    path = tmp_path / f"cube.{suffix}"
    meshio.write(path, meshio.Mesh(more, kinds), file_format=kind_of_file)
    cloud = eb.PointCloud.from_mesh(path)

    outer = _on_faces(points)
    np.testing.assert_array_equal(_sorted(cloud.interior()), _sorted(points[~outer]))
    np.testing.assert_array_equal(_sorted(cloud.boundary()), _sorted(points[outer]))
    # Within a face, the normal is that of the face; on edges and in corners it points
    # out of all faces there.
    x = np.asarray(cloud.boundary())
    signs = (x == 1).astype(float) - (x == 0)
    normal = np.asarray(cloud.normal(x))
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1)
    within = np.sum(signs != 0, axis=1) == 1
    assert np.sum(within) > 20
    np.testing.assert_allclose(normal[within], signs[within], atol=1e-12)
    assert np.all(normal[~within] * signs[~within] >= 0)
    assert np.all(np.sum(normal * signs, axis=1) > 0.5)
    assert np.all(cloud.contains(points))


def test_mesh_of_a_ring(tmp_path):
    # A hole, whose normals point into it.
    inside, circle = _disk()
    points = np.concatenate([inside, circle])
    cells = Delaunay(points).simplices
    middle = np.mean(points[cells], axis=1)
    cells = cells[np.hypot(*middle.T) > 0.5]
    path = tmp_path / "ring.vtu"
    meshio.write(
        path, meshio.Mesh(np.pad(points, ((0, 0), (0, 1))), [("triangle", cells)])
    )
    cloud = eb.PointCloud.from_mesh(path)
    x = np.asarray(cloud.boundary())
    radius = np.hypot(*x.T)
    assert np.sum(np.isclose(radius, 1)) == np.sum(np.isclose(radius, 0.5)) == 120
    direction = x / radius[:, None] * np.where(radius > 0.9, 1, -1)[:, None]
    np.testing.assert_allclose(cloud.normal(x), direction, atol=1e-2)


def test_cells_that_touch_in_a_vertex(tmp_path):
    # Their normals there cancel, but a unit vector must come out.
    points = np.array([[0, 0], [-1, 1], [-1, -1], [1, -1], [1, 1], [-0.5, 0.0], [0, 3]])
    cells = np.array([[0, 1, 5], [0, 5, 2], [1, 2, 5], [0, 3, 4]])
    path = tmp_path / "bow.vtu"
    meshio.write(
        path, meshio.Mesh(np.pad(points, ((0, 0), (0, 1))), [("triangle", cells)])
    )
    cloud = eb.PointCloud.from_mesh(path)
    np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=1), 1)
    assert cloud.interior().tolist() == [[-0.5, 0.0]]


def test_meshes_that_cannot_be_read(tmp_path, monkeypatch):
    square = _lattice(3, 2)
    write = lambda kind, cells, points=square: meshio.write(
        path, meshio.Mesh(points, [(kind, np.array(cells))])
    )
    path = tmp_path / "mesh.vtu"
    write("quad", [[0, 1, 3, 2]])
    with pytest.raises(ValueError, match=r"Only meshes of triangles.*\['quad'\]"):
        eb.PointCloud.from_mesh(path)
    write("triangle", [[0, 1, 2], [0, 1, 4]])
    with pytest.raises(ValueError, match="a surface in space"):
        eb.PointCloud.from_mesh(path)
    write("triangle", [[0, 2, 4]])
    with pytest.raises(ValueError, match="are on its boundary"):
        eb.PointCloud.from_mesh(path)
    monkeypatch.setitem(sys.modules, "meshio", None)
    with pytest.raises(ImportError, match=r"eqx_bilevel\[mesh\]"):
        eb.PointCloud.from_mesh(path)


def test_wrong_arguments(getkey):
    inside, circle = _disk(5)
    cloud = eb.PointCloud(inside, circle)
    for fn in (cloud.signed_distance, cloud.contains, cloud.normal):
        with pytest.raises(ValueError, match="has no normals.*Pass `normals`"):
            fn(inside)
    with pytest.raises(ValueError, match="`n` must be at most 30 here, got 31"):
        cloud.boundary(31)
    with pytest.raises(ValueError, match="'farthest', 'random', got 'sobol'"):
        cloud.interior(3, method="sobol")
    with pytest.raises(ValueError, match="`key` is needed for `method='random'`"):
        cloud.interior(3, method="random")
    with pytest.raises(ValueError, match="`interior` must have shape"):
        eb.PointCloud(np.zeros((3, 3)), circle)
    with pytest.raises(ValueError, match="`interior` must be finite"):
        eb.PointCloud(np.full((3, 2), np.nan), circle)
    with pytest.raises(ValueError, match="`normals` must have the shape of `boundary`"):
        eb.PointCloud(inside, circle, circle[:3])
    with pytest.raises(ValueError, match="`normals` must not be zero"):
        eb.PointCloud(inside, circle, 0 * circle)
    with pytest.raises(ValueError, match="A `PointCloud` cannot be combined"):
        eb.Ball([0.0, 0.0], 1.0) - cloud
    with pytest.raises(ValueError, match="does not know the measure"):
        cloud.boundary_measure
