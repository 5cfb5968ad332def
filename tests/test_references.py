"""The references of the benchmarks, against second methods for the same problems."""

import functools as ft
import pathlib
import runpy
import types

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.polynomial import chebyshev, Legendre
from scipy.fft import dct, dst
from scipy.integrate import solve_ivp
from scipy.sparse.linalg import spsolve
from scipy.special import roots_legendre


benchmarks = pathlib.Path(__file__).parents[1] / "benchmarks"
path = benchmarks / "experiments" / "references.py"
references = types.SimpleNamespace(**runpy.run_path(str(path)))


def difference(found, known):
    assert found.shape == known.shape
    return np.max(np.abs(found - known))


#
# Burgers: a sine series
#


@pytest.mark.parametrize("nu, n", [(0.02, 192), (0.01 / np.pi, 768), (0.002, 1152)])
def test_burgers(nu, n):
    k = np.pi * np.arange(1, n)

    def velocity(_, b):
        square = dst(b, type=1) ** 2 / 4
        flux = dct(np.pad(square / 2, 1), type=1)[1:-1] / n
        return k * flux - nu * k**2 * b

    b = np.zeros(n - 1)
    b[0] = -1.0
    t, x = np.array([0.01, 0.3, 0.5, 1.0]), np.linspace(-1, 1, 101)
    b = solve_ivp(velocity, (0, 1), b, "DOP853", t, rtol=1e-11, atol=1e-13).y.T
    known = b @ np.sin(np.outer(k, x))
    assert difference(references.burgers(t, x, nu), known) < 1e-9


def test_burgers_start():
    x = np.linspace(-1, 1, 101)
    found = references.burgers([0, 1e-12], x, 0.002)
    assert difference(found[0], -np.sin(np.pi * x)) < 1e-14
    assert difference(found[1], -np.sin(np.pi * x)) < 1e-11


#
# Eikonal: a sine series, and the equation itself
#


def test_eikonal():
    m = np.pi * np.arange(1, 4000, 2)
    root = np.sqrt(1e4 + m**2)
    x, y = np.linspace(0, 1, 101), np.linspace(0, 1, 51)[1:-1]

    def from_left_and_right(x, y):
        decay = np.exp(-np.outer(x, root)) + np.exp(-np.outer(1 - x, root))
        return (4 * decay / (m * (1 + np.exp(-root)))) @ np.sin(np.outer(m, y).T).T

    inner = x[1:-1]
    v = from_left_and_right(inner, y) + from_left_and_right(y, inner).T
    found = references.eikonal(x, y)
    assert difference(found[1:-1], -0.01 * np.log(v)) < 1e-13
    assert np.all(found[[0, -1]] == 0)


def test_eikonal_equation():
    # On a small square, at the Chebyshev points, across a ridge.
    n, half = 16, 0.01
    z = np.cos(np.pi * np.arange(n + 1) / n)
    vander = chebyshev.chebvander(z, n)
    columns = [chebyshev.chebval(z, chebyshev.chebder(row)) for row in np.eye(n + 1)]
    d = np.stack(columns, axis=1) @ np.linalg.inv(vander) / half
    u = references.eikonal(0.3 + half * z, 0.3 + half * z)
    laplacian = d @ d @ u + u @ d.T @ d.T
    slope = (d @ u) ** 2 + (u @ d.T) ** 2
    assert np.ptp(slope) > 0.1
    assert difference(slope, 1 + 0.01 * laplacian) < 1e-8


#
# Gray-Scott and Allen-Cahn: spectral elements, in which zero slopes are natural
#


# Of the Legendre-Gauss-Lobatto points of each element: all, and the second derivative.
def elements(edges, degree):
    legendre = Legendre.basis(degree)
    z = np.array([-1, *np.sort(legendre.deriv().roots().real), 1])
    p = legendre(z)
    weights = 2 / (degree * (degree + 1) * p**2)
    gaps = z[:, None] - z + np.eye(degree + 1)
    d = p[:, None] / p / gaps * (1 - np.eye(degree + 1))
    d -= np.diag(d.sum(axis=1))
    size = degree * (len(edges) - 1) + 1
    x, mass, stiffness = np.zeros(size), np.zeros(size), sp.lil_array((size, size))
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        at = slice(i * degree, (i + 1) * degree + 1)
        half = (b - a) / 2
        x[at] = a + half * (z + 1)
        mass[at] += half * weights
        stiffness[at, at] += (d.T * weights) @ d / half
    return x, sp.csc_array(sp.diags_array(-1 / mass) @ stiffness)


def implicit(velocity, jacobian, start, t, rtol):
    options = dict(jac=jacobian, rtol=rtol, atol=rtol / 100)
    return solve_ivp(velocity, (0, t[-1]), start, "Radau", t, **options).y


@pytest.mark.parametrize("start", references.gray_scott_starts.values())
def test_gray_scott(start):
    x, d2 = elements(np.linspace(0, 1, 11), 16)
    diagonal = sp.diags_array

    def velocity(_, uv):
        u, v = np.split(uv, 2)
        u_t = 1e-3 * (d2 @ u) - u * v**2 + 0.04 * (1 - u)
        return np.concatenate([u_t, 2e-3 * (d2 @ v) + u * v**2 - 0.1 * v])

    def jacobian(_, uv):
        u, v = np.split(uv, 2)
        uu, vv = (
            1e-3 * d2 - diagonal(v**2 + 0.04),
            2e-3 * d2 + diagonal(2 * u * v - 0.1),
        )
        blocks = [[uu, diagonal(-2 * u * v)], [diagonal(v**2), vv]]
        return sp.block_array(blocks, format="csc")

    t = np.array([0.01, 0.35, 1.0])
    initial = np.concatenate([each(x) for each in start])
    known = implicit(velocity, jacobian, initial, t, 1e-11)
    found = np.concatenate(references.gray_scott(t, x, *start), axis=1)
    assert difference(found, known.T) < 1e-10


def test_allen_cahn():
    # Small at the kink, and nowhere larger than the interface is wide.
    edges = [*np.arange(65) / 65, *(1 - 0.5 ** np.arange(1, 10) / 65), 1.0]
    x, d2 = elements(edges, 13)

    def velocity(_, u):
        return 1e-4 * (d2 @ u) + 5 * u - 5 * u**3

    def jacobian(_, u):
        return sp.csc_array(1e-4 * d2 + sp.diags_array(5 - 15 * u**2))

    t = np.array([1e-5, 1e-4, 4e-4, 1e-3, 0.01, 0.3, 1.0])
    start = x**2 * np.cos(np.pi * x)
    known = implicit(velocity, jacobian, start, t, 1e-11).T
    found = references.allen_cahn([*t, 0], -x)
    assert difference(found[:-1], known) < 1e-9
    assert difference(found[-1], start) == 0


#
# Schroedinger: a Runge-Kutta method in a rotating frame
#


# A cosine series on (0, 5). The modes beyond the last, and the last fifth, are only
# turned by the mean of 2 |h|^2.
def rotating(t, x, n):
    z, weights = roots_legendre(2 * n)
    nodes = 2.5 * (z + 1)
    q = np.pi * np.arange(2**17) / 5
    initial = np.cos(np.outer(q[: n + 1], nodes)) @ (weights / np.cosh(nodes))
    frequencies = q[: n + 1] ** 2 / 2

    def velocity(t, b):
        turn = np.exp(-1j * t * frequencies)
        h = dct(turn * b, type=1)
        return 1j * dct(np.abs(h) ** 2 * h, type=1) / (2 * n) / turn

    # No values between steps: they are less accurate.
    b = solve_ivp(velocity, (0, t), initial + 0j, "DOP853", rtol=1e-10, atol=1e-12)
    kept = 4 * n // 5
    c = 2 * b.y[:kept, -1]
    c[0] /= 2
    slope = -2 * np.sinh(5) / np.cosh(5) ** 2
    beyond = 0.4 * slope * (-1.0) ** np.arange(kept, len(q)) / q[kept:] ** 2
    c = np.concatenate([c, beyond * np.exp(1.6j * np.tanh(5) * t)])
    return np.cos(np.outer(x, q)) @ (c * np.exp(-0.5j * t * q**2))


points = np.linspace(-5, 5, 61)


@ft.cache
def schroedinger(t, num_modes):
    u, v = references.schroedinger([t], points, num_modes)
    return u[0] + 1j * v[0]


# The highest peak is at t = 0.785. What is left at 256 modes is due to the simpler law
# of this method's tail; the reference's own is shown by the other test.
def test_schroedinger():
    assert difference(schroedinger(0.2, 1024), rotating(0.2, points, 1024)) < 1e-8
    assert difference(schroedinger(0.8, 256), rotating(0.8, points, 256)) < 3e-7


def test_schroedinger_tail():
    fine = schroedinger(0.2, 1024)
    assert difference(schroedinger(0.2, 256), fine) < 6e-8
    assert difference(schroedinger(0.2, 512), fine) < 6e-9


def test_schroedinger_start():
    x = points
    u, v = references.schroedinger([1e-6, 0.0], x)
    assert difference(u, np.tile(2 / np.cosh(x), (2, 1))) < 1e-4
    assert difference(v[1], 0 * x) == 0
    # To first order, away from the kink.
    inside = np.abs(x) < 4.5
    rate = 1 / np.cosh(x) - 2 / np.cosh(x) ** 3 + 8 / np.cosh(x) ** 3
    assert difference(v[0, inside], 1e-6 * rate[inside]) < 1e-9


#
# Darcy flow
#


def _finite_volumes(n):
    # On a grid of n + 1 by n + 1 points, with the permeability between them.
    axis = np.arange(n + 1) / n
    middle = (axis[1:] + axis[:-1]) / 2

    def permeability(x, y):
        grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1)
        a = references.darcy_log_permeability(grid.reshape(-1, 2))
        return np.exp(a).reshape(len(x), len(y))

    kx, ky = permeability(middle, axis[1:-1]), permeability(axis[1:-1], middle)
    number = np.arange((n - 1) ** 2).reshape(n - 1, n - 1)
    parts = [(number, number, kx[:-1] + kx[1:] + ky[:, :-1] + ky[:, 1:])]
    for a, b, k in (
        (number[:-1], number[1:], kx[1:-1]),
        (number[:, :-1], number[:, 1:], ky[:, 1:-1]),
    ):
        parts += [(a, b, -k), (b, a, -k)]
    flat = [[entry.reshape(-1) for entry in part] for part in parts]
    rows, columns, values = map(np.concatenate, zip(*flat))
    matrix = sp.csc_matrix((values, (rows, columns)))
    u = spsolve(matrix, np.full(matrix.shape[0], n**-2.0))
    return axis[1:-1], u.reshape(n - 1, n - 1)


def test_darcy():
    axis, coarse = _finite_volumes(40)
    _, fine = _finite_volumes(80)
    better = (4 * fine[1::2, 1::2] - coarse) / 3
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    truth = references.darcy(points).reshape(better.shape)
    # Their errors are of second order, and then of nearly fourth.
    assert difference(better, truth) < 0.05 * difference(fine[1::2, 1::2], truth)
    assert difference(better, truth) < 2e-5 * np.max(truth)
    # With fewer modes, and between the nodes of both.
    x = np.random.default_rng(0).uniform(size=(50, 2))
    assert difference(references.darcy(x, 32), references.darcy(x)) < 1e-7
    assert np.all(references.darcy(np.array([[0.0, 0.3], [0.5, 1.0]])) == 0)
