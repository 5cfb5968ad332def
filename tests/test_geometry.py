"""Domains that are not boxes: distances, normals, points."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats.qmc as qmc
from eqx_bilevel._geometry._domain import rounding
from matplotlib.path import Path


_L = [[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]]
# Not convex, with a vertex in the middle of an edge, and clockwise.
_ARROW = [[0.0, 0.0], [1.0, 2.0], [2.0, 0.0], [1.0, 0.5], [0.5, 0.25]]
_METHODS = ("sobol", "halton", "random")


def _circle(n, centre=(0.0, 0.0), radius=1.0):
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.array(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _line(vertices, n):
    # The closed line through them, by hand.
    start = np.asarray(vertices, float)
    end = np.roll(start, -1, axis=0)
    t = np.linspace(0, 1, n)[:, None, None]
    return ((1 - t) * start + t * end).reshape(-1, 2)


_square = eb.Box([-1.0, -1.0], [1.0, 1.0])
_corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]]
# A domain, a fine sample of its boundary, and what is inside.
_PLANE = {
    "box": (_square, _line(_corners, 5000), Path(_corners).contains_points),
    "disk": (
        eb.Ball([0.3, -0.2], 0.7),
        _circle(20000, (0.3, -0.2), 0.7),
        lambda x: np.hypot(*(x - [0.3, -0.2]).T) < 0.7,
    ),
    "L": (eb.Polygon(_L), _line(_L, 5000), Path(_L).contains_points),
    "arrow": (eb.Polygon(_ARROW), _line(_ARROW, 5000), Path(_ARROW).contains_points),
}
_hole = _square - eb.Ball([0.2, 0.1], 0.4)
_lens = eb.Ball([-0.5, 0.0], 1.0) & eb.Ball([0.5, 0.0], 1.0)
_eight = eb.Ball([-0.5, 0.0], 1.0) | eb.Ball([0.5, 0.0], 1.0)
_lens_area = 2 * np.pi / 3 - np.sqrt(3) / 2
# Some domains, their areas, and the lengths of their boundaries.
_MEASURES = {
    "disk": (_PLANE["disk"][0], np.pi * 0.49, 2 * np.pi * 0.7),
    "L": (_PLANE["L"][0], 3.0, 8.0),
    "arrow": (_PLANE["arrow"][0], 1.5, 2 * np.sqrt(5) + 2 * np.sqrt(1.25)),
    "hole": (_hole, 4 - np.pi * 0.16, 8 + 0.8 * np.pi),
    "lens": (_lens, _lens_area, 4 * np.pi / 3),
    "eight": (_eight, 2 * np.pi - _lens_area, 8 * np.pi / 3),
    "two": (_eight - _lens, 2 * np.pi - 2 * _lens_area, 4 * np.pi),
    "flush": (_square - eb.Box([0.0, 0.0], [1.0, 1.0]), 3.0, 8.0),
    "overlap": (
        eb.Box([0.0, 0.0], [2.0, 1.0]) | eb.Box([1.0, 0.0], [4.0, 1.0]),
        4.0,
        10.0,
    ),
    "beside": (
        eb.Box([0.0, 0.0], [1.0, 1.0]) | eb.Polygon([[1, 0], [2, 0], [2, 1], [1, 1]]),
        2.0,
        6.0,
    ),
}
_SPACE = {
    "ball": (eb.Ball([1.0, 0.0, -1.0], 2.0), 4 / 3 * np.pi * 8, 16 * np.pi),
    "cuboid": (eb.Box([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), 6.0, 22.0),
    "shell": (
        eb.Ball([0.0, 0.0, 0.0], 1.0) - eb.Ball([0.0, 0.0, 0.0], 0.5),
        4 / 3 * np.pi * 7 / 8,
        5 * np.pi,
    ),
}


@pytest.mark.parametrize("name", _PLANE)
def test_signed_distance_against_brute_force(name, getkey):
    domain, fine, inside = _PLANE[name]
    x = np.asarray(jax.random.uniform(getkey(), (300, 2), minval=-2, maxval=3))
    distance = np.min(np.linalg.norm(x[:, None] - fine[None], axis=2), axis=1)
    expected = np.where(inside(x), -distance, distance)
    assert 5 < np.sum(expected < 0) < 295
    np.testing.assert_allclose(domain.signed_distance(x), expected, atol=2e-4)
    np.testing.assert_array_equal(domain.contains(x), inside(x))


def test_signed_distance_in_space(getkey):
    x = jax.random.uniform(getkey(), (200, 3), minval=-2, maxval=4)
    cuboid = _SPACE["cuboid"][0]
    fine = np.concatenate(
        [
            np.asarray(cuboid.face(a, s, 100, method="grid"))
            for a in range(3)
            for s in ("lower", "upper")
        ]
    )
    brute = np.min(np.linalg.norm(np.asarray(x)[:, None] - fine[None], axis=2), axis=1)
    inside = np.all((x > 0) & (x < np.array([[1.0, 2.0, 3.0]])), axis=1)
    found = cuboid.signed_distance(x)
    np.testing.assert_allclose(found, np.where(inside, -brute, brute), atol=0.04)
    ball = _SPACE["ball"][0].signed_distance(x)
    by_hand = np.linalg.norm(np.asarray(x) - [1, 0, -1], axis=1) - 2
    np.testing.assert_allclose(ball, by_hand, rtol=1e-12)


def test_signed_distance_of_combinations(getkey):
    # A bound of the distance, with the right sign.
    x = np.asarray(jax.random.uniform(getkey(), (500, 2), minval=-1.5, maxval=1.5))
    fine = np.concatenate([_line(_corners, 2000), _circle(8000, (0.2, 0.1), 0.4)])
    distance = np.min(np.linalg.norm(x[:, None] - fine[None], axis=2), axis=1)
    inside = _PLANE["box"][2](x) & (np.hypot(*(x - [0.2, 0.1]).T) > 0.4)
    expected = np.where(inside, -distance, distance)
    # Here it is exact, since the two boundaries are apart.
    np.testing.assert_allclose(_hole.signed_distance(x), expected, atol=1e-3)
    found = np.asarray(_lens.signed_distance(x))
    truth = np.hypot(*(np.abs(x) + [[0.5, 0]]).T) - 1  # To the farther circle.
    np.testing.assert_allclose(found, truth, atol=1e-12)


@pytest.mark.parametrize("name", (*_MEASURES, *_SPACE))
def test_measures(name, getkey):
    domain, volume, measure = {**_MEASURES, **_SPACE}[name]
    lower, upper = domain.bounds
    x = eb.Box(lower, upper).interior(2**14, key=getkey())
    share = np.mean(np.asarray(domain.contains(x)))
    found = share * float(jnp.prod(upper - lower))
    np.testing.assert_allclose(found, volume, rtol=0.01)
    exact = not isinstance(domain, eb.AbstractCombination)
    rtol = 1e-12 if exact else 2e-3
    np.testing.assert_allclose(domain.boundary_measure, measure, rtol=rtol)
    if exact:
        np.testing.assert_allclose(domain.volume, volume, rtol=1e-12)


@pytest.mark.parametrize("name", (*_MEASURES, *_SPACE))
def test_points(name, getkey):
    domain = {**_MEASURES, **_SPACE}[name][0]
    for method in _METHODS if name in ("disk", "hole", "ball") else ("sobol",):
        key = getkey()
        inside = domain.interior(100, key=key, method=method)
        around = domain.boundary(101, key=key, method=method)
        assert inside.shape == (100, domain.dim) and around.shape == (101, domain.dim)
        assert jnp.all(domain.signed_distance(inside) < 0)
        on = jnp.abs(domain.signed_distance(around))
        assert jnp.all(on <= rounding(domain)) and rounding(domain) < 1e-13
        assert jnp.all(domain.contains(around))
        for points in (inside, around):
            assert len(np.unique(np.asarray(points), axis=0)) == len(points)
        again = domain.boundary(101, key=key, method=method)
        np.testing.assert_array_equal(around, again)
        other = domain.boundary(101, key=getkey(), method=method)
        assert not np.array_equal(around, other)


@pytest.mark.parametrize("name", (*_MEASURES, *_SPACE))
def test_normals(name, getkey):
    domain = {**_MEASURES, **_SPACE}[name][0]
    x = np.asarray(domain.boundary(64, key=getkey()))
    normal = np.asarray(domain.normal(x))
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-12)
    # One side is inside, and the other is not: in direction of the normal.
    for h in (1e-5, 1e-7):
        np.testing.assert_allclose(
            domain.signed_distance(x + h * normal), h, rtol=1e-3, atol=1e-12
        )
        np.testing.assert_allclose(
            domain.signed_distance(x - h * normal), -h, rtol=1e-3, atol=1e-12
        )
    shift = 1e-6 * np.eye(domain.dim)[:, None]
    ahead, behind = (domain.signed_distance(x[None] + s) for s in (shift, -shift))
    differences = np.asarray(ahead - behind).T / 2e-6
    np.testing.assert_allclose(normal, differences, atol=1e-5)


def test_normals_away_from_the_boundary_and_in_corners():
    assert _square.normal(jnp.array([1.0, 1.0])).tolist() == pytest.approx(
        [0.5**0.5] * 2
    )
    assert _square.normal(jnp.array([2.0, 3.0])).tolist() == pytest.approx(
        [0.2**0.5, 0.8**0.5]
    )
    assert _square.normal(jnp.array([0.9, 0.2])).tolist() == [1.0, 0.0]
    corner = eb.Polygon(_L).normal(jnp.array([1.5, 2.0]))
    assert corner.tolist() == pytest.approx([1.0, 0.0])
    # Of the hole it points into the hole.
    assert _hole.normal(jnp.array([0.6, 0.1])).tolist() == pytest.approx([-1.0, 0.0])


@pytest.mark.parametrize("method", ("sobol", "halton"))
def test_interior_is_even(method, getkey):
    disk, key = eb.Ball([0.0, 0.0], 1.0), getkey()

    def uneven(points):
        # Polar coordinates, in which a uniform distribution is one on the unit square.
        x, y = np.asarray(points).T
        unit = np.stack([x**2 + y**2, np.arctan2(y, x) / (2 * np.pi) % 1], axis=1)
        return qmc.discrepancy(unit)

    points, random = (
        disk.interior(2048, key=key, method=m) for m in (method, "random")
    )
    assert uneven(points) < uneven(random) / 2


def _along(vertices, points):
    # Arc length, as a share of the whole, by hand.
    start = np.asarray(vertices, float)
    edges = np.roll(start, -1, axis=0) - start
    lengths = np.linalg.norm(edges, axis=1)
    out = []
    for x in np.asarray(points):
        t = np.clip(np.sum((x - start) * edges, axis=1) / lengths**2, 0, 1)
        miss = np.linalg.norm(start + t[:, None] * edges - x, axis=1)
        i = np.argmin(miss)
        out.append(np.sum(lengths[:i]) + t[i] * lengths[i])
    return np.array(out) / np.sum(lengths)


@pytest.mark.parametrize("name", ("disk", "L", "arrow"))
def test_boundary_is_even_by_arc_length(name, getkey):
    points = np.asarray(_PLANE[name][0].boundary(128, key=getkey()))
    if name == "disk":
        unit = np.arctan2(*(points - [0.3, -0.2])[:, ::-1].T) / (2 * np.pi) % 1
    else:
        unit = _along({"L": _L, "arrow": _ARROW[::-1]}[name], points)
        # From whichever vertex.
        offsets = _along(
            {"L": _L, "arrow": _ARROW[::-1]}[name], _PLANE[name][0].vertices
        )
        unit = (unit - offsets[0]) % 1
    # One of the 128 points in each of 128 cells.
    assert np.histogram(unit, 128, (0, 1))[0].tolist() == [1] * 128


@pytest.mark.parametrize("dim", (3, 4))
def test_boundary_is_even_on_spheres(dim, getkey):
    ball, key = eb.Ball(jnp.ones(dim), 3.0), getkey()
    x = (ball.boundary(1024, key=key) - 1.0) / 3.0
    np.testing.assert_allclose(jnp.sum(x**2, axis=1), 1, rtol=1e-12)
    y = (ball.boundary(1024, key=key, method="random") - 1.0) / 3.0
    # Moments: 0 of x, 1/d of its square, 3/(d (d + 2)) of its fourth power.
    moment = lambda x, p: jnp.mean(x**p, axis=0)
    for p, expected in ((1, 0), (2, 1 / dim), (4, 3 / (dim * (dim + 2)))):
        np.testing.assert_allclose(moment(x, p), expected, atol=4e-3)
        np.testing.assert_allclose(moment(y, p), expected, atol=6e-2)
    np.testing.assert_allclose(x.T @ x / 1024, jnp.eye(dim) / dim, atol=4e-3)


def test_boundary_of_combinations_is_in_proportion(getkey):
    points = np.asarray(_hole.boundary(200, key=getkey()))
    on_circle = np.abs(np.hypot(*(points - [0.2, 0.1]).T) - 0.4) < 1e-12
    assert abs(np.sum(on_circle) - 200 * 0.8 * np.pi / (8 + 0.8 * np.pi)) < 2
    # Also where a piece belongs to both: from 1 to 2 on the lower edge.
    points = np.asarray(_MEASURES["overlap"][0].boundary(400, key=getkey()))
    lower = points[points[:, 1] == 0, 0]
    assert np.all(np.abs(np.histogram(lower, 4, (0, 4))[0] - 40) <= 4)
    # And where none of it is, between the two squares.
    points = np.asarray(_MEASURES["beside"][0].boundary(300, key=getkey()))
    assert not np.any((points[:, 0] == 1) & (0 < points[:, 1]) & (points[:, 1] < 1))
    # Nested: two circles and what is left of a square.
    nested = _hole - eb.Ball([-1.0, -1.0], 0.5)
    points = np.asarray(nested.boundary(300, key=getkey()))
    small = np.abs(np.hypot(*(points + 1).T) - 0.5) < 1e-12
    length = np.pi / 4 + 7 + 0.8 * np.pi
    assert abs(np.sum(small) - 300 * np.pi / 4 / length) < 2


def test_one_dimension(getkey):
    ball = eb.Ball(0.5, 2.0)
    assert ball.dim == 1
    assert ball.boundary(7).tolist() == [[-1.5], [2.5]]
    np.testing.assert_allclose([ball.boundary_measure, ball.volume], [2, 4], rtol=1e-12)
    rest = ball - eb.Box(0.0, 1.0)
    assert np.sort(rest.boundary(7, key=getkey())[:, 0]).tolist() == [-1.5, 0, 1, 2.5]
    inside = rest.interior(50, key=getkey())
    assert jnp.all((jnp.abs(inside - 0.5) > 0.5) & (jnp.abs(inside - 0.5) < 2))


@pytest.mark.parametrize("name", ("box", "disk", "arrow"))
def test_transforms(name, getkey):
    domain = _PLANE[name][0]
    x = jax.random.uniform(getkey(), (5, 3, 2))
    distance = domain.signed_distance(x)
    assert distance.shape == (5, 3) and domain.normal(x).shape == (5, 3, 2)
    mapped = jax.vmap(jax.vmap(domain.signed_distance))(x)
    np.testing.assert_allclose(mapped, distance, rtol=1e-14)
    compiled = eqx.filter_jit(lambda d, x: d.signed_distance(x))(domain, x)
    np.testing.assert_allclose(compiled, distance, rtol=1e-12)
    # Derivatives with respect to the domain: all of it is moved.
    shift = lambda s: jax.tree.map(lambda v: v + s if v.ndim else v, domain)
    moved = lambda s: jnp.sum(shift(s).signed_distance(x[0, 0]))
    one = jnp.zeros(2)
    gradient = jax.grad(lambda s: moved(s[None] if name == "arrow" else s))(one)
    np.testing.assert_allclose(gradient, -domain.normal(x[0, 0]), rtol=1e-10)
    # What is undefined, such as the middle of a disk, is no NaN for others.
    assert jnp.all(
        jnp.isfinite(jax.grad(lambda c: eb.Ball(c, 1.0).signed_distance(c))(one))
    )


def test_traced_domains_and_keys(getkey):
    disk, key = eb.Ball([0.0, 0.0], 1.0), getkey()
    for domain in (disk, _hole):
        points = jax.jit(lambda: domain.interior(5, key=key))()
        np.testing.assert_array_equal(points, domain.interior(5, key=key))
        with pytest.raises(ValueError, match="traced.*Choose the points outside"):
            jax.jit(lambda key: domain.interior(5, key=key, method="random"))(key)
        with pytest.raises(ValueError, match="traced.*Choose the points outside"):
            eqx.filter_jit(lambda d: d.interior(5, key=key))(domain)
    with pytest.raises(ValueError, match="traced.*Choose the points outside"):
        eqx.filter_jit(lambda d: d.boundary(5, key=key))(_hole)
    # The boundary of an elementary shape depends on it smoothly.
    mean = lambda r: jnp.mean(
        jnp.linalg.norm(eb.Ball([0.0, 0.0], r).boundary(9, key=key), axis=1)
    )
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(2.0), 1.0, rtol=1e-12)
    triangle = lambda v: jnp.sum(eb.Polygon(v).boundary(9, key=key))
    assert jnp.all(jnp.isfinite(jax.jit(jax.grad(triangle))(jnp.eye(3)[:, :2])))


def test_single_precision(getkey):
    disk = eb.Ball(jnp.zeros(2, jnp.float32), 1.0)
    polygon = eb.Polygon(jnp.asarray(_L, jnp.float32))
    for domain in (disk, polygon, polygon - disk):
        for points in (
            domain.interior(50, key=getkey()),
            domain.boundary(50, key=getkey()),
        ):
            assert points.dtype == jnp.float32
            assert jnp.all(domain.contains(points))
        assert domain.signed_distance(points).dtype == jnp.float32
        assert jnp.all(jnp.abs(domain.signed_distance(points)) < 1e-5)


@pytest.mark.parametrize(
    "vertices",
    (
        [[0, 0], [1, 1], [1, 0], [0, 1]],  # crosses itself
        [[0, 0], [1, 0], [2, 0]],  # encloses nothing
        [[0, 0], [2, 0], [1, 0], [1, 1]],  # turns back
        [[0, 0], [2, 0], [2, 2], [1, 0], [0, 2]],  # a vertex on an edge
        [[0, 0], [1, 0], [1, 1], [0, 0], [-1, 0], [-1, -1]],  # a vertex twice
    ),
)
def test_polygons_that_meet_themselves(vertices):
    for v in (vertices, vertices[::-1], vertices[1:] + vertices[:1]):
        with pytest.raises(ValueError, match="`vertices` are those of a polygon that"):
            eb.Polygon(v)


def test_many_vertices_do_not_meet():
    polygon = eb.Polygon(_circle(400))
    np.testing.assert_allclose(polygon.volume, np.pi, rtol=1e-4)
    spiral = np.linspace(0, 4 * np.pi, 60)
    arm = np.stack([np.cos(spiral), np.sin(spiral)], axis=1)
    both = np.concatenate(
        [arm * (2 + spiral)[:, None], (arm * (4 + spiral)[:, None])[::-1]]
    )
    assert eb.Polygon(both).volume > 0


def test_wrong_arguments(getkey):
    with pytest.raises(ValueError, match="repeated"):
        eb.Polygon([[0, 0], [1, 0], [1, 1], [0, 0]])
    for vertices in ([[0, 0], [1, 1]], [[0, 0, 0], [1, 0, 0], [0, 1, 0]]):
        with pytest.raises(ValueError, match=r"`vertices` must have shape `\(m, 2\)`"):
            eb.Polygon(vertices)
    with pytest.raises(ValueError, match="`vertices` must be finite"):
        eb.Polygon([[0, 0], [1, np.nan], [1, 1]])
    for radius in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="`radius` must be positive and finite"):
            eb.Ball([0.0, 0.0], radius)
    with pytest.raises(ValueError, match="`centre` must be finite"):
        eb.Ball([0.0, np.nan], 1.0)
    with pytest.raises(ValueError, match="`radius` must be a number, got shapes"):
        eb.Ball([0.0, 0.0], jnp.ones(2))
    disk = eb.Ball([0.0, 0.0], 1.0)
    for fn in (disk.interior, disk.boundary, _hole.interior, _hole.boundary):
        with pytest.raises(ValueError, match="'random', got 'grid'. Only a box has"):
            fn(5, key=getkey(), method="grid")
        with pytest.raises(ValueError, match="`key` is needed for"):
            fn(5)
        with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
            fn(0, key=getkey())
    with pytest.raises(ValueError, match=r"`x` must have shape \(..., 2\)"):
        _hole.normal(jnp.array([0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="same dimension can be combined, got 2 and 1"):
        disk | eb.Box(0.0, 1.0)
    with pytest.raises(ValueError, match="got float64 and float32"):
        disk & eb.Ball(jnp.zeros(2, jnp.float32), 1.0)
    with pytest.raises(TypeError, match="unsupported operand.*'Ball' and 'float'"):
        disk - 1.0


def test_empty_domains(getkey):
    empty = eb.Ball([0.0, 0.0], 1.0) - eb.Ball([0.0, 0.0], 2.0)
    with pytest.raises(ValueError, match="only 0 lie inside the `Difference`"):
        empty.interior(10, key=getkey())
    with pytest.raises(ValueError, match="boundary of the `Difference`: 0 of"):
        empty.boundary(10, key=getkey())
