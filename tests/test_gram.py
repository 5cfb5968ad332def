import math

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg
from eqx_bilevel._gram import (
    _products,
    _sides,
    Block,
    covariance,
    covariance_product,
    dense,
    GramOperator,
    Noise,
    symmetric_product,
    variances,
)
from eqx_bilevel._kernels import (
    AbstractFeatureKernel,
    AbstractKernel,
    Constant,
    Gaussian,
    Gibbs,
    LengthscaleNetwork,
    Matern,
    Periodic,
    Polynomial,
    RationalQuadratic,
    Scaled,
    Stretched,
    Subspace,
    Warped,
)
from eqx_bilevel._parameters import Frozen, unwrap
from jax.flatten_util import ravel_pytree

from .helpers import points_mesh


#
# The independent truth: derivatives of `kernel(x, y)` by nested automatic
# differentiation, for one pair of points at a time.
#


def _repeat(fn, order, argnum):
    for _ in range(order):
        fn = jax.jacfwd(fn, argnum)
    return fn


@eqx.filter_jit
def _all_partials(kernel, xs, ys, orders):
    k = lambda x, y: kernel(x, y)
    at = lambda x, y: {(m, n): _repeat(_repeat(k, n, 1), m, 0)(x, y) for m, n in orders}
    return jax.vmap(lambda x: jax.vmap(lambda y: at(x, y))(ys))(xs)


def _axes(index):
    return tuple(axis for axis, order in enumerate(index) for _ in range(order))


def _oracle_block(kernels, left, right):
    out = 0.0
    for name, kernel in kernels.items():
        lefts = [(i, a) for i, (unknown, a) in enumerate(left.jets) if unknown == name]
        rights = [
            (j, b) for j, (unknown, b) in enumerate(right.jets) if unknown == name
        ]
        orders = sorted({(sum(a), sum(b)) for _, a in lefts for _, b in rights})
        table = _all_partials(kernel, left.points, right.points, tuple(orders))
        for i, a in lefts:
            for j, b in rights:
                # `jacfwd` appends axes: those of the inner derivative come first.
                entry = table[sum(a), sum(b)][(..., *_axes(b), *_axes(a))]
                weights = left.coefficients[:, :, i], right.coefficients[:, :, j]
                out = out + np.einsum("nq,nm,mr->nqmr", weights[0], entry, weights[1])
    return np.asarray(out).reshape(left.size, right.size)


def oracle(kernels, left, right):
    return np.block([[_oracle_block(kernels, a, b) for b in right] for a in left])


def assert_close(actual, expected, rtol=1e-12):
    scale = np.max(np.abs(expected))
    assert scale > 0 and actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= rtol * scale


#
# Functionals
#


def e(d, *axes):
    return tuple(axes.count(i) for i in range(d))


def jets(d, *axes, name="u"):
    return tuple((name, e(d, *a)) for a in axes)


def random_block(key, n, q, jets):
    key1, key2 = jax.random.split(key)
    points = jax.random.uniform(key1, (n, len(jets[0][1])))
    return Block(points, jax.random.normal(key2, (n, q, len(jets))), jets)


# Three at each point: the value, the Laplacian, and one like that of Burgers' equation,
# with coefficients that differ from point to point.
def pde_block(key, n, d):
    key1, key2, key3 = jax.random.split(key, 3)
    last = d - 1
    used = jets(d, (), (last,), *[(i, i) for i in range(d)])
    value = jnp.zeros((n, 2 + d)).at[:, 0].set(1.0)
    laplacian = jnp.zeros((n, 2 + d)).at[:, 2:].set(1.0)
    burgers = jnp.zeros((n, 2 + d))
    burgers = burgers.at[:, 0].set(jax.random.normal(key1, (n,)))
    burgers = burgers.at[:, 1].set(jax.random.normal(key2, (n,)))
    burgers = burgers.at[:, -1].set(-0.3)
    points = jax.random.uniform(key3, (n, d))
    return Block(points, jnp.stack([value, laplacian, burgers], axis=1), used)


# First derivatives, mixed ones and second ones.
def mixed_block(key, n, d):
    axes = {1: [(0,), (0, 0)], 2: [(0,), (0, 1), (1, 1)], 3: [(0,), (1, 2), (2, 2)]}
    return random_block(key, n, 2, jets(d, *axes[d]))


#
# Kernels
#


class Cosine(AbstractKernel):
    frequency: jax.Array = eqx.field(default=3.0, converter=jnp.asarray)

    def __call__(self, x, y):
        return jnp.cos(self.frequency * jnp.sum(x - y)) + jnp.prod(x * y)


def _network(d, out_size):
    return LengthscaleNetwork(d, out_size, 3, 1, scale=0.8, key=jax.random.key(1))


def _mlp(d):
    return eqx.nn.MLP(d, d, 3, 1, activation=jnp.tanh, key=jax.random.key(2))


KERNELS = {
    "gaussian": lambda d: Gaussian(0.6),
    "gaussian_ard": lambda d: Gaussian(np.linspace(0.4, 0.8, d)),
    "matern_2.5": lambda d: Matern(np.linspace(0.6, 0.9, d)),
    "matern_3.5": lambda d: Matern(0.8, nu=3.5),
    "rational_quadratic": lambda d: RationalQuadratic(0.6, 0.7),
    "periodic": lambda d: Periodic(0.9, np.linspace(1.1, 1.3, d)),
    "polynomial": lambda d: Polynomial(3, 0.7, 0.4),
    "sum": lambda d: Gaussian(0.6) + Polynomial(2) + 0.3,
    "product": lambda d: Gaussian(0.6) * Polynomial(2),
    "product_of_three": lambda d: Matern(0.9) * Gaussian(0.6) * RationalQuadratic(0.8),
    "scaled": lambda d: Scaled(Frozen(Matern(0.8)), 2.5),
    "subspace": lambda d: Subspace(Matern(0.8), d - 1) + Gaussian(0.6),
    "subspaces": lambda d: Subspace(Gaussian(0.4), 0) * Subspace(Periodic(1, 1.3), 1),
    "subspace_permuted": lambda d: Subspace(Gaussian(np.array([0.4, 0.9])), (d - 1, 0)),
    "stretched": lambda d: Stretched(Matern(0.5), 1.7),
    "stretched_ard": lambda d: Stretched(Matern(0.7), np.linspace(0.7, 1.6, d)),
    "warped_gaussian": lambda d: Warped(Gaussian(0.7), _mlp(d)),
    "warped_matern": lambda d: Warped(Matern(0.7, nu=4.5), _mlp(d)),
    "gibbs": lambda d: Gibbs(_network(d, "scalar")),
    "gibbs_ard": lambda d: Gibbs(_network(d, d)),
    "warped_gibbs": lambda d: Warped(Gibbs(_network(d, "scalar")), _mlp(d)),
    "user": lambda d: Cosine(),
}
CASES = [(name, 2) for name in KERNELS]
CASES += [(n, 1) for n in ("product_of_three", "warped_matern", "stretched_ard")]
CASES += [(n, 3) for n in ("gaussian_ard", "stretched_ard", "user")]


def make(name, d):
    return {"u": unwrap(KERNELS[name](d))}


@eqx.filter_jit
def _covariance_and_variances(kernels, left, right):
    return covariance(kernels, left, right), variances(kernels, right)


@eqx.filter_jit
def _all_three(kernels, left, right, vector):
    matrix = covariance(kernels, left, right)
    product = covariance_product(kernels, left, right, vector)
    return matrix, product, variances(kernels, left)


@eqx.filter_jit
def _square(kernels, blocks):
    # Blocks below the diagonal are copied, and computed.
    lazy = covariance(kernels, blocks, blocks)
    return lazy, covariance(kernels, blocks, list(blocks))


jitted = eqx.filter_jit(covariance)


#
# Values
#


@pytest.mark.parametrize("name,d", CASES)
def test_against_automatic_differentiation(name, d, getkey):
    kernels = make(name, d)
    left, right = [pde_block(getkey(), 4, d)], [mixed_block(getkey(), 3, d)]
    if d > 1 and isinstance(kernels["u"], AbstractFeatureKernel):
        # These take long to compile.
        right = [random_block(getkey(), 3, 2, jets(d, (0, 1)))]
    matrix, diagonal = _covariance_and_variances(kernels, left, right)
    assert_close(matrix, oracle(kernels, left, right))
    if not _differentiable_on_the_diagonal(name):
        return
    each = [
        np.diag(oracle(kernels, [point], [point])) for point in _points_of(right[0])
    ]
    assert_close(diagonal, np.concatenate(each))


# Automatic differentiation of a Matern kernel's `__call__` at x == y is not meant to be
# right in general: its derivatives there are compared with closed forms below.
def _differentiable_on_the_diagonal(name):
    rough = ("matern", "product_of_three", "scaled", "stretched", "warped_matern")
    return not name.startswith(rough) and name != "subspace"


def _points_of(block):
    for i in range(block.points.shape[0]):
        one = slice(i, i + 1)
        yield Block(block.points[one], block.coefficients[one], block.jets)


def test_constant(getkey):
    kernels = {"u": unwrap(Constant(0.7))}
    left, right = [pde_block(getkey(), 4, 2)], [mixed_block(getkey(), 3, 2)]
    # Only the value of a constant is not zero.
    matrix, diagonal = _covariance_and_variances(kernels, left, right)
    assert matrix.shape == (12, 6) and np.all(matrix == 0) and np.all(diagonal == 0)
    weights = np.reshape(left[0].coefficients[:, :, 0], -1)
    expected = 0.7 * np.outer(weights, weights)
    matrix, diagonal = _covariance_and_variances(kernels, left, left)
    assert_close(matrix, expected, 1e-14)
    assert_close(diagonal, np.diag(expected), 1e-14)


# Smooth enough for an operator of fourth order on both sides.
BIHARMONIC = {
    "gaussian_ard": lambda: Gaussian(np.array([0.6, 0.9])),
    "matern_4.5": lambda: Matern(0.9, nu=4.5),
}


@pytest.mark.parametrize("name", BIHARMONIC)
def test_biharmonic(name, getkey):
    kernels = {"u": unwrap(BIHARMONIC[name]())}
    used = jets(2, (0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1))
    coefficients = jnp.broadcast_to(jnp.array([1.0, 2.0, 1.0]), (3, 1, 3))
    left = [Block(jax.random.uniform(getkey(), (3, 2)), coefficients, used)]
    right = [random_block(getkey(), 3, 1, used)]
    assert_close(jitted(kernels, left, right), oracle(kernels, left, right))


# The others are differentiated automatically.
@pytest.mark.parametrize(
    "name,axes",
    (
        ("gibbs", ()),
        ("periodic", (0, 0)),
        ("user", (0, 0, 0, 0)),
        ("warped_matern", ()),
    ),
)
def test_fourth_order_in_one_dimension(name, axes, getkey):
    kernels = make(name, 1)
    left = [random_block(getkey(), 3, 1, jets(1, (0, 0, 0, 0)))]
    right = [random_block(getkey(), 4, 1, jets(1, axes))]
    assert_close(jitted(kernels, left, right), oracle(kernels, left, right))


def _matern_moment(nu, order):
    # The variance of the derivative of this order, for lengthscale 1: the 2m-th moment
    # of the spectral density, a Student distribution with 2 nu degrees of freedom.
    below = math.prod(nu - i for i in range(1, order + 1))
    return math.prod(range(1, 2 * order, 2)) * nu**order / below


@pytest.mark.parametrize(
    "nu,orders", ((1.5, (0, 1)), (2.5, (0, 1, 2)), (4.5, (0, 3, 4)))
)
def test_matern_at_coinciding_points_1d(nu, orders):
    length, q = 0.7, len(orders)
    eye = jnp.broadcast_to(jnp.eye(q), (2, q, q))
    used = jets(1, *[(0,) * m for m in orders])
    block = Block(jnp.array([[0.3], [0.3]]), eye, used)

    def fn(length):
        kernels = {"u": unwrap(Matern(length, nu=nu))}
        return covariance(kernels, [block], [block]), variances(kernels, [block])

    expected, slope = np.zeros((2, q, q))
    for i, m in enumerate(orders):
        for j, n in enumerate(orders):
            if (m + n) % 2 == 0:  # Odd moments vanish.
                half = (m + n) // 2
                moment = (-1) ** ((m - n) // 2) * _matern_moment(nu, half)
                expected[i, j] = moment * length ** (-2 * half)
                slope[i, j] = -2 * half * moment * length ** (-2 * half - 1)
    run = jax.jit(lambda x: (fn(x), jax.jacfwd(fn)(x), jax.jacrev(fn)(x)))
    values, forwards, backwards = run(jnp.array(length))
    # Derivatives with respect to the lengthscale are finite and right there, too.
    for truth, found in ((expected, values), (slope, forwards), (slope, backwards)):
        diagonal = np.tile(np.diag(truth), 2)
        np.testing.assert_allclose(found[0], np.tile(truth, (2, 2)), rtol=1e-13)
        np.testing.assert_allclose(found[1], diagonal, rtol=1e-13)


def test_matern_at_coinciding_points_2d():
    nu, (lx_, ly) = 2.5, (0.6, 1.1)
    kernels = {"u": unwrap(Matern(np.array([lx_, ly]), nu=nu))}
    used = jets(2, (0, 0), (0, 1), (1, 1))
    eye = jnp.eye(3)[None]
    block = Block(jnp.array([[0.3, 0.8]]), eye, used)
    # E[u_xx u_xx] = 3 c, E[u_xx u_yy] = E[u_xy u_xy] = c, by isotropy.
    c = _matern_moment(nu, 2) / 3
    expected = np.array(
        [
            [3 * c / lx_**4, 0, c / (lx_ * ly) ** 2],
            [0, c / (lx_ * ly) ** 2, 0],
            [c / (lx_ * ly) ** 2, 0, 3 * c / ly**4],
        ]
    )
    assert_close(covariance(kernels, [block], [block]), expected, 1e-13)


# The limit is reached continuously: nearby points do not lose digits.
def test_matern_at_nearby_points():
    kernels = {"u": unwrap(Matern(0.7))}
    at = lambda x: Block(jnp.array([[x]]), jnp.ones((1, 1, 1)), jets(1, (0, 0)))
    for distance in (1e-3, 1e-6, 1e-9, 1e-12, 1e-100):
        actual = covariance(kernels, [at(0.0)], [at(distance)])[0, 0]
        # k'''' of (1 + t + t^2 / 3) exp(-t), t = sqrt(5) r / l.
        t = math.sqrt(5) * distance / 0.7
        expected = 25 / 0.7**4 * (1 - 5 / 3 * t + t**2 / 3) * math.exp(-t)
        np.testing.assert_allclose(actual, expected, rtol=1e-13)


#
# Blocks
#


def test_independent_unknowns(getkey):
    kernels = dict(u=unwrap(Gaussian(0.6)), v=unwrap(RationalQuadratic(0.8)))
    only_u = random_block(getkey(), 3, 1, jets(2, (), (0, 0)))
    only_v = random_block(getkey(), 2, 2, jets(2, (0,), name="v"))
    both = random_block(getkey(), 3, 2, jets(2, (1,), name="v") + jets(2, (0, 0), (1,)))
    matrix = jitted(kernels, [only_u, both], [only_v, both])
    assert np.all(matrix[:3, :4] == 0)
    # The others are those of each unknown on its own, added up.
    kernel_u, kernel_v = {"u": kernels["u"]}, {"v": kernels["v"]}
    assert_close(matrix[:3, 4:], oracle(kernel_u, [only_u], [both]))
    assert_close(matrix[3:, :4], oracle(kernel_v, [both], [only_v]))
    expected = oracle(kernel_u, [both], [both]) + oracle(kernel_v, [both], [both])
    assert_close(matrix[3:, 4:], expected)


# Functionals are counted point by point, and blocks one after the other.
def test_order_of_functionals():
    kernels = {"u": unwrap(Gaussian(0.6))}
    points = jnp.array([[0.1], [0.6]])
    coefficients = jnp.array([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    both = Block(points, coefficients, jets(1, (), (0,)))
    value = Block(points, jnp.ones((2, 1, 1)), jets(1, ()))
    assert both.size == 4 and value.size == 2
    matrix = covariance(kernels, [value, both], [both])
    k = lambda i, j: math.exp(-0.5 * ((points[i, 0] - points[j, 0]) / 0.6) ** 2)
    slope = lambda i, j: k(i, j) * (points[i, 0] - points[j, 0]) / 0.36
    expected = [[k(i, 0), slope(i, 0), k(i, 1), slope(i, 1)] for i in range(2)]
    np.testing.assert_allclose(matrix[:2], expected, rtol=1e-14)
    np.testing.assert_allclose(matrix[jnp.array([2, 4])], expected, rtol=1e-14)


def _blocks_1d(key, sizes=((5, 1), (3, 2))):
    keys = jax.random.split(key, len(sizes))
    used = [jets(1, (), (0, 0)), jets(1, (), (0,)), jets(1, (0,))]
    each = zip(keys, sizes, used)
    return tuple(random_block(k, n, q, names) for k, (n, q), names in each)


@pytest.mark.parametrize("name", ("matern_2.5", "user"))
def test_product_and_variances(name, getkey):
    kernels = make(name, 1)
    left, right = _blocks_1d(getkey()), _blocks_1d(getkey(), ((4, 2), (3, 1)))
    vector = jax.random.normal(getkey(), (sum(b.size for b in right),))
    matrix, product, diagonal = _all_three(kernels, left, right, vector)
    expected = oracle(kernels, left, right)
    assert_close(matrix, expected)
    assert_close(product, expected @ vector)
    assert_close(diagonal, np.diag(_square(kernels, left)[0]), 1e-14)


@pytest.mark.parametrize("name,d", (("matern_2.5", 2), ("user", 2), ("gibbs", 1)))
def test_symmetric_positive_semidefinite(name, d, getkey):
    kernels = make(name, d)
    mixed = jets(d, (0,), (0, d - 1))
    blocks = [random_block(getkey(), 6, 1, jets(d, ())), None]
    blocks[1] = random_block(getkey(), 5, 2, mixed)
    matrix, computed = map(np.asarray, _square(kernels, blocks))
    assert_close(matrix.T, matrix, 1e-14)
    assert_close(computed, matrix, 1e-14)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] >= -1e-14 * eigenvalues[-1]
    assert eigenvalues[-2] > 0


#
# Chunks
#


@pytest.mark.parametrize("at_once", (1, 6))
def test_chunks(at_once, getkey, monkeypatch):
    kernels = make("matern_3.5", 1)
    # With 3 columns: rows one by one, and chunks of two that 7 rows do not fill.
    left, right = _blocks_1d(getkey(), ((7, 1),)), _blocks_1d(getkey(), ((3, 2),))
    vector = jax.random.normal(getkey(), (sum(b.size for b in right),))
    weights = jax.random.normal(getkey(), (sum(b.size for b in left),))

    def scalars(inputs):
        kernels, left, right, vector = inputs
        matrix = covariance(kernels, left, right)
        product = covariance_product(kernels, left, right, vector)
        return weights @ (matrix @ vector), weights @ product

    inputs = (kernels, left, right, vector)
    params, static = eqx.partition(inputs, eqx.is_inexact_array)
    fn = lambda params: scalars(eqx.combine(params, static))
    run = lambda: jax.jit(lambda p: (fn(p), jax.jacrev(fn)(p)))(params)
    values, gradients = run()
    monkeypatch.setattr(_sides, "_PAIRS_AT_ONCE", at_once)
    assert "scan" in str(jax.make_jaxpr(fn)(params))
    chunked_values, chunked_gradients = run()
    np.testing.assert_allclose(chunked_values, values, rtol=1e-13)
    np.testing.assert_allclose(values[0], values[1], rtol=1e-13)
    for whole, chunked in zip(gradients, chunked_gradients):
        assert_close(ravel_pytree(chunked)[0], ravel_pytree(whole)[0], 1e-12)


@pytest.fixture
def few(monkeypatch):
    # What is for many points is for few.
    for name, value in dict(_MANY=3, _TILE=3, _TILES=2).items():
        monkeypatch.setattr(_products, name, value)


# Conditions and points that are only read; tiles that are filled up, and that are not.
@pytest.mark.parametrize("num", ((7, 5, 4), (6, 0, 4), (4, 3, 1), (0, 2, 0)))
@pytest.mark.parametrize("devices", (1, 2))
def test_each_pair_once(num, devices, few, getkey):
    kernels = make("matern_3.5", 1)
    blocks = _blocks_1d(getkey(), ((7, 1), (5, 2), (4, 1)))
    read = jax.random.normal(getkey(), (21,))
    given = [jax.random.normal(getkey(), (n, b.at_each)) for n, b in zip(num, blocks)]

    def by_matrix(kernels, blocks, given):
        some = [
            Block(b.points[: len(w)], b.coefficients[: len(w)], b.jets)
            for b, w in zip(blocks, given)
        ]
        vector = jnp.concatenate([w.reshape(-1) for w in given])
        return read @ covariance(kernels, blocks, some) @ vector

    def by_pairs(kernels, blocks, given):
        products = symmetric_product(kernels, blocks, given)
        return read @ jnp.concatenate([p.reshape(-1) for p in products])

    params, static = eqx.partition((kernels, blocks, given), eqx.is_inexact_array)

    def run(fn):
        fn_of_params = lambda params: fn(*eqx.combine(params, static))
        direction = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
        )
        value, slope = jax.jvp(fn_of_params, (params,), (direction,))
        gradient, bent = jax.jvp(jax.grad(fn_of_params), (params,), (direction,))
        return value, slope, ravel_pytree(gradient)[0], ravel_pytree(bent)[0]

    expected = jax.jit(lambda: run(by_matrix))()
    with jax.set_mesh(points_mesh(devices)):
        found = jax.jit(lambda: run(by_pairs))()
    for one, other in zip(found, expected):
        assert_close(one, other, 1e-11)


def test_half_of_the_pairs(few, getkey):
    blocks = _blocks_1d(getkey(), ((12, 1),))
    product = lambda v: covariance_product(make("user", 1), blocks, blocks, v)
    # Four tiles of three points, and so ten pairs of tiles.
    assert "length=10" in str(jax.make_jaxpr(product)(jnp.ones(12)))
    # Devices share these. They wait for each other once, at the end.
    with jax.set_mesh(points_mesh(2)):
        program = str(jax.make_jaxpr(product)(jnp.ones(12)))
    assert "length=5" in program
    assert program.count("psum") == 1 and "all_gather" not in program


#
# Derivatives
#


def _check_derivatives(fn, inputs, key, h=1e-3, rtol=1e-7):
    # In one random direction in all inputs, forwards and backwards.
    flat, unravel = ravel_pytree(inputs)
    direction = jax.random.normal(key, flat.shape)
    direction = direction / jnp.linalg.norm(direction)
    scalar = jax.jit(lambda flat: fn(unravel(flat)))
    at = lambda t: scalar(flat + t * direction)
    # Central differences, extrapolated twice: the error is of order h^6.
    rough = [(at(h / n) - at(-h / n)) / (2 * h / n) for n in (1, 2, 4)]
    finer = [(4 * rough[i + 1] - rough[i]) / 3 for i in range(2)]
    difference = (16 * finer[1] - finer[0]) / 15
    forward = jax.jit(lambda x: jax.jvp(scalar, (x,), (direction,))[1])(flat)
    backward = jax.jit(jax.grad(scalar))(flat) @ direction
    scale = abs(difference)
    assert scale > 1e-3
    assert abs(forward - difference) <= rtol * scale
    assert abs(backward - forward) <= 1e-11 * scale


# With respect to kernel parameters, points, coefficients and the vector, all at once.
@pytest.mark.parametrize(
    "name,which",
    (
        ("matern_3.5", "covariance"),
        ("matern_3.5", "product"),
        ("matern_3.5", "variances"),
        ("gibbs", "product"),
    ),
)
def test_derivatives(name, which, getkey):
    if name == "gibbs":  # Shorter to compile.
        blocks = (random_block(getkey(), 5, 1, jets(1, (), (0,))),)
    else:
        blocks = _blocks_1d(getkey())
    others = (random_block(getkey(), 4, 2, jets(1, (), (0,))),)
    vector = jax.random.normal(getkey(), (8,))
    weights = jax.random.normal(getkey(), (sum(b.size for b in blocks),))
    inputs = (make(name, 1), blocks, others, vector)
    params, static = eqx.partition(inputs, eqx.is_inexact_array)

    def fn(params):
        kernels, blocks, others, vector = eqx.combine(params, static)
        if which == "covariance":
            # Also with itself, at coinciding points.
            square = weights @ covariance(kernels, blocks, blocks) @ jnp.sin(weights)
            return square + weights @ covariance(kernels, blocks, others) @ vector
        elif which == "product":
            square = covariance_product(kernels, blocks, blocks, weights)
            product = covariance_product(kernels, blocks, others, vector)
            return weights @ (product + square)
        else:
            return weights @ variances(kernels, blocks)

    _check_derivatives(fn, params, getkey())


#
# As an operator
#


@pytest.fixture
def gram(getkey):
    blocks = _blocks_1d(getkey())
    variances = 0.1 + jax.random.uniform(getkey(), (7,))
    root = jax.random.normal(getkey(), (4, 4))
    noise = Noise((variances, root @ root.T + 0.1 * jnp.eye(4)))
    return GramOperator(make("matern_3.5", 1), blocks, noise)


def _expected(gram):
    # `covariance` is compared with the truth above.
    square = np.asarray(jitted(gram.kernels, gram.blocks, gram.blocks))
    variances, matrix = map(np.asarray, gram.noise.parts)
    return square + scipy.linalg.block_diag(np.diag(variances), matrix)


def test_whitening(gram, getkey):
    vector = jax.random.normal(getkey(), (11,))
    noise = gram.noise.added_to(jnp.zeros((11, 11)))
    assert_close(gram.noise.mv(vector), noise @ vector)
    square = jnp.sum(gram.noise.whiten(vector) ** 2)
    assert_close(square, vector @ jnp.linalg.solve(noise, vector))


def test_operator(gram, getkey):
    expected = _expected(gram)
    vector = jax.random.normal(getkey(), (11,))

    @eqx.filter_jit
    def run(gram):
        operators = (gram, gram.T, lx.linearise(gram), lx.conj(gram))
        products = [operator.mv(vector) for operator in operators]
        matrices = [m.as_matrix() for m in (gram, dense(gram), lx.materialise(gram))]
        return products, matrices, lx.diagonal(gram)

    products, matrices, diagonal = run(gram)
    for product in products:
        assert_close(product, expected @ vector)
    for matrix in matrices:
        assert_close(matrix, expected)
    assert_close(diagonal, np.diag(expected))
    assert gram.in_structure() == gram.out_structure()
    assert gram.in_structure().shape == (11,)


def test_operator_properties(gram):
    assert lx.is_symmetric(gram) and lx.is_positive_semidefinite(gram)
    for predicate in (lx.is_diagonal, lx.is_tridiagonal, lx.is_negative_semidefinite):
        assert not predicate(gram)
    for predicate in (lx.is_lower_triangular, lx.is_upper_triangular):
        assert not predicate(gram)
    assert not lx.has_unit_diagonal(gram)
    struct = eqx.filter_eval_shape(dense, gram)
    assert isinstance(struct, lx.MatrixLinearOperator)
    assert lx.is_positive_semidefinite(struct)


SOLVERS = (
    lx.Cholesky(),
    lx.CG(rtol=1e-13, atol=1e-13),
)


def test_linear_solve(gram, getkey):
    vector, weights = jax.random.normal(getkey(), (2, 11))
    params, static = eqx.partition((gram, vector), eqx.is_inexact_array)

    def run(solve):
        fn = lambda params: weights @ solve(*eqx.combine(params, static))
        value, gradient = jax.jit(jax.value_and_grad(fn))(params)
        return value, ravel_pytree(gradient)[0]

    direct = lambda gram, vector: jnp.linalg.solve(gram.as_matrix(), vector)
    expected, truth = run(direct)
    for solver in SOLVERS:
        value, gradient = run(lambda g, v: lx.linear_solve(g, v, solver).value)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert_close(gradient, truth, 1e-9)


#
# Transformations
#


def test_jit_and_vmap(getkey):
    blocks = _blocks_1d(getkey())
    lengthscales = jnp.array([0.4, 0.7, 1.1])
    offsets = jnp.array([0.0, 0.3, 0.5])
    vector = jax.random.normal(getkey(), (11,))

    def fn(lengthscale, offset):
        kernels = {"u": unwrap(Matern(lengthscale))}
        moved = [Block(b.points**2 + offset, b.coefficients, b.jets) for b in blocks]
        return (
            covariance(kernels, blocks, moved),
            covariance_product(kernels, blocks, moved, vector),
            variances(kernels, blocks),
        )

    batched = jax.jit(jax.vmap(fn))(lengthscales, offsets)
    single = jax.jit(fn)
    for i in range(3):
        one = single(lengthscales[i], offsets[i])
        for actual, expected in zip(batched, one):
            assert_close(actual[i], expected, 1e-13)
        moved = [
            Block(b.points**2 + offsets[i], b.coefficients, b.jets) for b in blocks
        ]
        truth = oracle({"u": unwrap(Matern(lengthscales[i]))}, blocks, moved)
        assert_close(one[0], truth)


def test_precision_is_kept():
    kernels = {"u": unwrap(Gaussian(jnp.array(0.6, jnp.float32)))}
    points = jnp.array([[0.1], [0.5]], jnp.float32)
    block = Block(points, jnp.ones((2, 1, 1), jnp.float32), jets(1, (0, 0)))
    vector = jnp.ones(2, jnp.float32)
    assert covariance(kernels, [block], [block]).dtype == jnp.float32
    product = covariance_product(kernels, [block], [block], vector)
    assert product.dtype == jnp.float32
    assert variances(kernels, [block]).dtype == jnp.float32
