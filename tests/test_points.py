import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats.qmc as qmc
from eqx_bilevel import AbstractDomain, Box
from eqx_bilevel._geometry._sampling import unit_points


_QMC = ("sobol", "halton")
_RANDOM = ("sobol", "halton", "random")


def _box(dim, dtype=jnp.float64):
    lower = jnp.array([-1.0, 2.0, 0.0][:dim], dtype=dtype)
    upper = jnp.array([1.0, 2.5, 3.0][:dim], dtype=dtype)
    return Box(lower, upper)


def _to_unit(box, points):
    return (np.asarray(points) - np.asarray(box.lower)) / np.asarray(box.size)


def test_geometry():
    box = Box(lower=[0.0, -1.0], upper=[2, 1])
    assert isinstance(box, AbstractDomain)
    assert box.dim == 2
    assert box.size.tolist() == [2.0, 2.0]
    assert box.volume == 4.0
    assert box.face_normal(0, "lower").tolist() == [-1.0, 0.0]
    assert box.face_normal(1, "upper").tolist() == [0.0, 1.0]
    assert box.lower.dtype == box.upper.dtype == box.face_normal(0, "upper").dtype
    interval = Box(0.0, 1.0)
    assert interval.dim == 1 and interval.lower.shape == (1,)


def test_contains():
    box = _box(2)
    x = jnp.array([[0.0, 2.2], [-1.0, 2.0], [1.0, 2.5], [1.1, 2.2], [0.0, jnp.nan]])
    assert box.contains(x).tolist() == [True, True, True, False, False]
    assert box.contains(x[0]).shape == ()
    assert box.contains(x[None]).shape == (1, 5)
    assert box.contains(x.astype(jnp.float32)).tolist()[0]
    with pytest.raises(ValueError, match=r"`x` must have shape \(..., 2\).*got \(3,\)"):
        box.contains(jnp.zeros(3))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("method", _RANDOM)
@pytest.mark.parametrize("dim", (1, 2, 3))
def test_interior(dim, method, dtype, getkey):
    box = _box(dim, dtype)
    points = box.interior(100, key=getkey(), method=method)
    assert points.shape == (100, dim) and points.dtype == dtype
    assert np.all((points > box.lower[None]) & (points < box.upper[None]))
    if dtype == jnp.float64:
        assert len(np.unique(np.asarray(points), axis=0)) == 100
    # All of the box, not a part of it.
    unit = _to_unit(box, points)
    assert np.all(np.min(unit, axis=0) < 0.2) and np.all(np.max(unit, axis=0) > 0.8)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.float32))
@pytest.mark.parametrize("lower, upper", ((0.0, 1.0), (-1.0, 0.0), (100.0, 101.0)))
def test_strictly_inside_when_rounded(lower, upper, dtype, getkey):
    # So many points that some of them would be rounded to the ends.
    box = Box(jnp.asarray([lower], dtype), jnp.asarray([upper], dtype))
    for method in _RANDOM:
        points = box.interior(100_000, key=getkey(), method=method)
        assert points.dtype == dtype
        assert jnp.all((points > box.lower[None]) & (points < box.upper[None]))


@pytest.mark.parametrize("method", _RANDOM)
def test_keys(method, getkey):
    box, key = _box(2), getkey()
    for fn in (box.interior, box.boundary):
        points = fn(40, key=key, method=method)
        assert np.array_equal(points, fn(40, key=key, method=method))
        other = fn(40, key=getkey(), method=method)
        assert not np.array_equal(points, other)
    # Both kinds of key. (The same seed is the same key.)
    old, new = (fn(40, key=k, method=method) for k in (jr.PRNGKey(7), jr.key(7)))
    assert np.array_equal(old, new)


def test_sobol_is_scipys(getkey):
    # In particular the first points do not depend on the power of two behind them.
    key = getkey()
    unit = unit_points(37, 2, key, "sobol", 0)
    rng = np.random.default_rng([*np.asarray(jr.key_data(key)).tolist(), 0])
    with pytest.warns(UserWarning, match="power of 2"):
        expected = qmc.Sobol(2, scramble=True, rng=rng).random(37)
    assert np.array_equal(unit, expected)


def test_power_of_two_warning_is_not_shown(getkey, recwarn):
    _box(2).interior(100, key=getkey())
    _box(2).boundary(13, key=getkey())
    assert len(recwarn) == 0


@pytest.mark.parametrize("dim", (1, 2, 3))
@pytest.mark.parametrize("method", _QMC)
def test_discrepancy(method, dim, getkey):
    box, key = _box(dim), getkey()
    quasi, random = (
        qmc.discrepancy(_to_unit(box, box.interior(512, key=key, method=m)))
        for m in (method, "random")
    )
    assert quasi < random / 3


@pytest.mark.parametrize("method", _RANDOM)
@pytest.mark.parametrize("dim", (2, 3))
def test_face(dim, method, getkey):
    box, key = _box(dim, jnp.float32), getkey()
    units = []
    for axis, side in it.product(range(dim), ("lower", "upper")):
        points = box.face(axis, side, 64, key=key, method=method)
        assert points.shape == (64, dim) and points.dtype == jnp.float32
        end = box.lower[axis] if side == "lower" else box.upper[axis]
        assert jnp.all(points[:, axis] == end)
        rest = np.delete(np.asarray(points), axis, axis=1)
        lower, upper = np.delete(box.lower, axis), np.delete(box.upper, axis)
        assert np.all((rest > lower) & (rest < upper))
        assert np.all(box.contains(points))
        units.append(np.delete(_to_unit(box, points), axis, axis=1))
    # Same key, but independent points.
    for a, b in it.combinations(units, 2):
        assert not np.array_equal(a, b)
        assert not np.array_equal(np.sort(a, axis=0), np.sort(b, axis=0))


@pytest.mark.parametrize("method", _QMC)
def test_each_face_is_covered(method, getkey):
    box = Box([0.0, -1.0], [1.0, 1.0])
    points = _to_unit(box, box.boundary(128, key=getkey(), method=method))
    for i, (axis, end) in enumerate(it.product((0, 1), (0.0, 1.0))):
        side = points[32 * i : 32 * (i + 1)]
        assert np.all(side[:, axis] == end)
        along = np.sort(side[:, 1 - axis])
        # 32 points: one in each of 32 cells, so that no gap is longer than two of them.
        if method == "sobol":
            assert np.histogram(along, 32, (0, 1))[0].tolist() == [1] * 32
        assert np.max(np.diff(along, prepend=0, append=1)) <= 2 / 32


def test_dealing_out_one_sequence_would_fail(getkey):
    # The mistake that the test above must be able to find.
    unit = np.asarray(unit_points(128, 1, getkey(), "sobol", 0))[:, 0]
    along = np.sort(unit[0::4])
    assert np.max(np.diff(along, prepend=0, append=1)) > 0.5


@pytest.mark.parametrize("dim, n", ((2, 10), (2, 3), (3, 14), (3, 6)))
def test_boundary_counts(dim, n, getkey):
    box, key = _box(dim), getkey()
    points = box.boundary(n, key=key)
    assert points.shape == (n, dim)
    faces = list(it.product(range(dim), ("lower", "upper")))
    counts = [n // len(faces) + (i < n % len(faces)) for i in range(len(faces))]
    assert sum(counts) == n
    expected = [
        box.face(axis, side, count, key=key)
        for (axis, side), count in zip(faces, counts)
        if count > 0
    ]
    assert np.array_equal(points, jnp.concatenate(expected))


def test_some_faces(getkey):
    box = _box(2)
    faces = [(1, "upper"), (0, "lower")]
    points = box.boundary(7, key=getkey(), faces=faces)
    assert points.shape == (7, 2)
    assert jnp.all(points[:4, 1] == 2.5) and jnp.all(points[4:, 0] == -1)
    for faces in ([], [(0, "lower"), (0, "lower")]):
        with pytest.raises(ValueError, match="`faces` must be different pairs"):
            box.boundary(7, key=getkey(), faces=faces)
    with pytest.raises(ValueError, match="`axis` must be"):
        box.boundary(7, key=getkey(), faces=[(2, "lower")])


def test_one_dimension():
    box = Box(0.5, 2.0)
    for n in (1, 2, 100):
        assert box.boundary(n).tolist() == [[0.5], [2.0]]
        assert box.boundary(n, method="grid").tolist() == [[0.5], [2.0]]
        assert box.face(0, "upper", n).tolist() == [[2.0]]
    assert box.boundary(1, faces=[(0, "upper")]).tolist() == [[2.0]]
    with pytest.raises(ValueError, match="`method` must be one of .* got 'other'.$"):
        box.boundary(2, method="other")
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        box.boundary(0)


def test_grid():
    box = Box([0.0, 0.3], [1.0, 0.9])
    points = box.grid((3, 4))
    x, y = np.meshgrid([0, 0.5, 1], np.linspace(0.3, 0.9, 4), indexing="ij")
    np.testing.assert_allclose(points[:, 0].reshape(3, 4), x, rtol=1e-15)
    np.testing.assert_allclose(points[:, 1].reshape(3, 4), y, rtol=1e-15)
    # The ends are exact, in spite of 0.3 + (0.9 - 0.3) > 0.9.
    assert jnp.all(box.contains(points))
    assert jnp.max(points[:, 1]) == 0.9 and jnp.min(points[:, 1]) == 0.3
    assert box.grid(5).shape == (25, 2)
    with pytest.raises(ValueError, match="`n` must be at least 2, got 1"):
        box.grid(1)


def test_inner_grid():
    # The nodes of a regular grid, less those of the boundary.
    box = Box([0.0, 0.1], [1.0, 0.3])
    everything = np.asarray(box.grid((5, 6)))
    on_boundary = np.any(
        (everything == np.asarray(box.lower)) | (everything == np.asarray(box.upper)),
        axis=1,
    )
    inside = box.interior((3, 4), method="grid")
    np.testing.assert_allclose(inside, everything[~on_boundary], rtol=1e-15)
    around = box.boundary((3, 4), method="grid")
    # The corners are on no face's inside.
    assert around.shape == (2 * 4 + 2 * 3, 2)
    corners = np.array(list(it.product((0.0, 1.0), (0.1, 0.3))))
    union = np.unique(np.concatenate([around, corners]).round(12), axis=0)
    expected = np.unique(everything[on_boundary].round(12), axis=0)
    np.testing.assert_allclose(union, expected, rtol=1e-12)
    assert box.boundary(3, method="grid").shape == (12, 2)
    assert box.face(0, "lower", (4,), method="grid").shape == (4, 2)
    assert box.interior(3, method="grid").shape == (9, 2)


def test_jit_random(getkey):
    box, key = _box(2), getkey()
    for fn in (box.interior, box.boundary):
        points = jax.jit(lambda key: fn(20, key=key, method="random"))(key)
        expected = fn(20, key=key, method="random")
        np.testing.assert_allclose(points, expected, rtol=0, atol=1e-15)
    keys = jr.split(key, 3)
    points = jax.vmap(lambda key: box.interior(20, key=key, method="random"))(keys)
    assert points.shape == (3, 20, 2) and not jnp.allclose(points[0], points[1])


@pytest.mark.parametrize("method", _QMC)
def test_traced_key(method, getkey):
    box, key = _box(2), getkey()
    for fn in (box.interior, box.boundary):
        with pytest.raises(ValueError, match=f"'{method}'.*traced.*method='random'"):
            jax.jit(lambda key: fn(20, key=key, method=method))(key)
    # A constant key is fine, and so are traced bounds.
    points = eqx.filter_jit(lambda box: box.interior(20, key=key, method=method))(box)
    expected = box.interior(20, key=key, method=method)
    np.testing.assert_allclose(points, expected, rtol=0, atol=1e-15)


def test_gradient_with_respect_to_bounds(getkey):
    key = getkey()

    def mean(upper):
        return jnp.mean(Box(jnp.zeros(2), upper).interior(64, key=key))

    upper = jnp.array([1.0, 2.0])
    unit = Box([0.0, 0.0], [1.0, 1.0]).interior(64, key=key)
    grad = jax.jit(jax.grad(mean))(upper)
    np.testing.assert_allclose(grad, jnp.sum(unit, axis=0) / 128, rtol=1e-12)


def test_wrong_bounds():
    matrices = np.zeros((1, 1)), np.ones((1, 1))
    for lower, upper in (([0.0], [1.0, 1.0]), matrices, ([], [])):
        with pytest.raises(ValueError, match="`lower` and `upper` must have one"):
            Box(lower, upper)
    for lower, upper in (
        ([0.0, 1.0], [1.0, 1.0]),
        ([0.0, 2.0], [1.0, 1.0]),
        ([0.0, 0.0], [1.0, np.inf]),
        ([0.0, 0.0], [1.0, np.nan]),
    ):
        with pytest.raises(ValueError, match=r"`lower` must be less than.*got lower="):
            Box(lower, upper)
        with pytest.raises(ValueError, match="`lower` must be less than `upper`"):
            jax.jit(lambda: Box(lower, upper).size)()
    with pytest.raises(ValueError, match="same dtype, got float32 and float64"):
        Box(jnp.zeros(2, dtype=jnp.float32), jnp.ones(2))
    # A list follows the array beside it.
    assert Box([0.0, 0.0], jnp.ones(2, dtype=jnp.float32)).lower.dtype == jnp.float32


def test_wrong_arguments(getkey):
    box, key = _box(2), getkey()
    with pytest.raises(ValueError, match="'sobol', 'halton', 'random', 'grid', got"):
        box.interior(10, key=key, method="uniform")
    with pytest.raises(ValueError, match="'sobol', 'halton', 'random', 'grid', got"):
        box.boundary(10, key=key, method="uniform")
    for n in (0, -1):
        for fn in (box.interior, box.boundary):
            with pytest.raises(ValueError, match=f"`n` must be at least 1, got {n}"):
                fn(n, key=key)
    with pytest.raises(ValueError, match="tuple only with `method='grid'`"):
        box.interior((3, 4), key=key)
    with pytest.raises(ValueError, match="tuple of 2 numbers"):
        box.interior((3, 4, 5), method="grid")
    for method in _RANDOM:
        with pytest.raises(ValueError, match="`key` is needed .*jax.random.key"):
            box.interior(10, method=method)
    for axis in (-1, 2):
        with pytest.raises(ValueError, match="`axis` must be at least 0 and less than"):
            box.face(axis, "lower", 10, key=key)
        with pytest.raises(ValueError, match="`axis`"):
            box.face_normal(axis, "lower")
    with pytest.raises(ValueError, match="`side` must be 'lower' or 'upper', got 'up'"):
        box.face(0, "up", 10, key=key)
