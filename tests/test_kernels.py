import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    Product,
    RationalQuadratic,
    rescale,
    Scaled,
    smoothness,
    Stretched,
    Subspace,
    Sum,
    Warped,
)
from eqx_bilevel._parameters import (
    Bounded,
    Frozen,
    learnable,
    Positive,
    Unconstrained,
    unwrap,
)
from jax.flatten_util import ravel_pytree
from scipy.special import gamma, kv


# A lengthscale that varies so much that a Gibbs kernel with a wrong prefactor is not
# positive definite.
class Bump(eqx.Module):
    height: jax.Array = eqx.field(default=1.0, converter=jnp.asarray)

    def __call__(self, x):
        return 0.05 + self.height * jnp.exp(-8 * jnp.sum((x - 0.5) ** 2))


class Bumps(eqx.Module):
    heights: jax.Array = eqx.field(converter=jnp.asarray)

    def __call__(self, x):
        return 0.1 + self.heights * jnp.exp(-8 * jnp.sum((x - 0.5) ** 2))


class Bend(eqx.Module):
    amount: jax.Array = eqx.field(default=0.3, converter=jnp.asarray)

    def __call__(self, x):
        return x + self.amount * jnp.sin(3 * x) + 0.1 * jnp.sum(x)


# A user's kernel: only `__call__`.
class Cosine(AbstractKernel):
    frequency: jax.Array = eqx.field(default=3.0, converter=jnp.asarray)

    def __call__(self, x, y):
        return jnp.cos(self.frequency * jnp.sum(x - y))


def _network(d, out_size):
    return LengthscaleNetwork(d, out_size, 5, 2, scale=0.4, key=jax.random.key(1))


# All kernels, as functions of the dimension.
KERNELS = {
    "gaussian": lambda d: Gaussian(0.4),
    "gaussian_ard": lambda d: Gaussian(np.linspace(0.3, 0.7, d)),
    "matern_0.5": lambda d: Matern(0.4, nu=0.5),
    "matern_1.5": lambda d: Matern(np.linspace(0.3, 0.7, d), nu=1.5),
    "matern_2.5": lambda d: Matern(0.6),
    "matern_4.5": lambda d: Matern(0.6, nu=4.5),
    "rational_quadratic": lambda d: RationalQuadratic(np.linspace(0.3, 0.7, d), 0.7),
    "periodic": lambda d: Periodic(np.linspace(0.8, 1.2, d), Frozen(1.3)),
    "periodic_learned": lambda d: Periodic(0.8, np.linspace(0.8, 1.2, d)),
    "polynomial": lambda d: Polynomial(3, 0.5, 0.7),
    "linear": lambda d: Polynomial(1, offset=Frozen(0.0)),
    "constant": lambda d: Constant(0.7),
    "cosine": lambda d: Cosine(),
    "gibbs": lambda d: Gibbs(Bump()),
    "gibbs_ard": lambda d: Gibbs(Bumps(np.linspace(0.5, 1.0, d))),
    "gibbs_network": lambda d: Gibbs(_network(d, "scalar")),
    "gibbs_network_ard": lambda d: Gibbs(_network(d, d)),
    "warped": lambda d: Warped(Matern(0.5, 3.5), Bend()),
    "warped_gibbs": lambda d: Warped(Gibbs(Bump()), Bend()),
    "sum": lambda d: Gaussian(0.4) + Polynomial(2) + 0.3,
    "product": lambda d: Gaussian(0.4) * Cosine() * Matern(1.0, 1.5),
    "scaled": lambda d: 2.5 * RationalQuadratic(0.4),
    "subspace": lambda d: Subspace(Gaussian(0.4), 0) * Subspace(Cosine(), d - 1),
    "stretched": lambda d: Stretched(Matern(0.5, 1.5), np.linspace(0.5, 1.5, d)),
    "frozen": lambda d: Frozen(Gaussian(0.4)) + Bounded(0.5, 0.1, 2.0) * Gibbs(Bump()),
}
all_kernels = pytest.mark.parametrize("name", KERNELS)


@eqx.filter_jit
def gram(kernel, xs, ys):
    return jax.vmap(lambda x: jax.vmap(lambda y: kernel(x, y))(ys))(xs)


def points(key, n, d):
    return jax.random.uniform(key, (n, d))


#
# Values
#


def _distance(x, y, lengthscale):
    return np.sqrt(np.sum(((x - y) / lengthscale) ** 2))


def _gibbs(x, y, lx, ly):
    out = 1.0
    for i in range(len(x)):
        square = lx[i] ** 2 + ly[i] ** 2
        out *= math.sqrt(2 * lx[i] * ly[i] / square)
        out *= math.exp(-((x[i] - y[i]) ** 2) / square)
    return out


def _bump(x, height=1.0, floor=0.05):
    return floor + height * np.exp(-8 * np.sum((x - 0.5) ** 2))


def _bend(x):
    return x + 0.3 * np.sin(3 * x) + 0.1 * np.sum(x)


_ls = np.array([0.3, 0.4, 0.9])
_ones = np.ones(3)

VALUES = [
    (Gaussian(0.4), lambda x, y: np.exp(-(_distance(x, y, 0.4) ** 2) / 2)),
    (Gaussian(_ls), lambda x, y: np.exp(-(_distance(x, y, _ls) ** 2) / 2)),
    (
        RationalQuadratic(_ls, 0.7),
        lambda x, y: (1 + _distance(x, y, _ls) ** 2 / 1.4) ** -0.7,
    ),
    (
        Periodic(_ls, 2 * _ls),
        lambda x, y: np.exp(
            -2 * np.sum(np.sin(np.pi * (x - y) / (2 * _ls)) ** 2 / _ls**2)
        ),
    ),
    (Polynomial(3, 0.5, 0.7), lambda x, y: (0.5 * np.dot(x, y) + 0.7) ** 3),
    (Polynomial(1), lambda x, y: np.dot(x, y) + 1),
    (Constant(), lambda x, y: 1.0),
    (Constant(0.3), lambda x, y: 0.3),
    (Gibbs(Bump()), lambda x, y: _gibbs(x, y, _bump(x) * _ones, _bump(y) * _ones)),
    (
        Gibbs(Bumps(_ls)),
        lambda x, y: _gibbs(x, y, _bump(x, _ls, 0.1), _bump(y, _ls, 0.1)),
    ),
    (
        Warped(Gaussian(_ls), Bend()),
        lambda x, y: np.exp(-(_distance(_bend(x), _bend(y), _ls) ** 2) / 2),
    ),
    (
        Warped(Gibbs(Bump()), Bend()),
        lambda x, y: _gibbs(
            _bend(x), _bend(y), _bump(_bend(x)) * _ones, _bump(_bend(y)) * _ones
        ),
    ),
    (
        Sum((Gaussian(0.4), Constant(0.3), Polynomial(1))),
        lambda x, y: np.exp(-(_distance(x, y, 0.4) ** 2) / 2) + 1.3 + np.dot(x, y),
    ),
    (
        Product((Gaussian(0.4), Constant(0.3), Polynomial(1))),
        lambda x, y: (
            np.exp(-(_distance(x, y, 0.4) ** 2) / 2) * 0.3 * (1 + np.dot(x, y))
        ),
    ),
    (
        Scaled(Gaussian(0.4), 2.5),
        lambda x, y: 2.5 * np.exp(-(_distance(x, y, 0.4) ** 2) / 2),
    ),
    (
        Subspace(Gaussian([0.3, 0.9]), (2, 0)),
        lambda x, y: np.exp(
            -((x[2] - y[2]) ** 2) / (2 * 0.3**2) - (x[0] - y[0]) ** 2 / (2 * 0.9**2)
        ),
    ),
    (
        Stretched(Polynomial(2), _ls),
        lambda x, y: (np.sum(x * y / _ls**2) + 1) ** 2,
    ),
]


@pytest.mark.parametrize("kernel, truth", VALUES, ids=lambda k: type(k).__name__)
def test_values(kernel, truth, getkey):
    for _ in range(5):
        x, y = points(getkey(), 2, 3)
        np.testing.assert_allclose(
            kernel(x, y), truth(np.asarray(x), np.asarray(y)), rtol=1e-13
        )


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, 3.5, 6.5])
def test_matern_values(nu):
    lengthscale = 0.7
    r = np.array([1e-9, 1e-4, 0.01, 0.3, 1.0, 5.0, 40.0])
    u = np.sqrt(2 * nu) * r / lengthscale
    truth = 2 ** (1 - nu) / gamma(nu) * u**nu * kv(nu, u)
    values = gram(Matern(lengthscale, nu), jnp.zeros((1, 1)), jnp.asarray(r)[:, None])
    np.testing.assert_allclose(values[0], truth, rtol=1e-12)


# The limits, where the Bessel function itself is not finite.
def test_matern_extreme_distances():
    for nu in (0.5, 2.5, 30.5):
        values = gram(
            Matern(1.0, nu), jnp.zeros((1, 1)), jnp.array([[0.0], [1e-150], [1e30]])
        )
        np.testing.assert_array_equal(values[0], [1.0, 1.0, 0.0])


def test_matern_tends_to_gaussian(getkey):
    x, y = points(getkey(), 2, 2)
    np.testing.assert_allclose(Matern(0.7, 400.5)(x, y), Gaussian(0.7)(x, y), rtol=0.05)


def test_rational_quadratic_tends_to_gaussian(getkey):
    x, y = points(getkey(), 2, 2)
    np.testing.assert_allclose(
        RationalQuadratic(0.7, 1e13)(x, y), Gaussian(0.7)(x, y), rtol=1e-11
    )


def test_gibbs_constant_lengthscale_is_gaussian(getkey):
    x, y = points(getkey(), 2, 3)
    for length in (jnp.array(0.4), jnp.array([0.3, 0.5, 0.9])):
        gibbs = Gibbs(lambda _: length)
        np.testing.assert_allclose(gibbs(x, y), Gaussian(length)(x, y), rtol=1e-14)
    np.testing.assert_allclose(Gibbs(Bump())(x, x), 1, rtol=1e-14)


def test_periodic_is_periodic(getkey):
    x, y = points(getkey(), 2, 2)
    period = jnp.array([0.7, 1.1])
    kernel = Periodic([0.5, 0.9], period)
    for shift in (jnp.array([1.0, 0.0]), jnp.array([-2.0, 3.0])):
        np.testing.assert_allclose(
            kernel(x + shift * period, y), kernel(x, y), rtol=1e-12
        )
    assert not np.allclose(kernel(x + 0.5 * period, y), kernel(x, y), rtol=1e-2)


#
# What makes a kernel a kernel
#


@all_kernels
@pytest.mark.parametrize("d", [1, 2, 3])
def test_symmetric_positive_semidefinite(name, d, getkey):
    xs = points(getkey(), 150, d)
    matrix = gram(KERNELS[name](d), xs, xs)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-13, atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] >= -1e-10 * eigenvalues[-1]


# The test above can fail: this is a common mistake, the prefactor of one dimension used
# for several.
@pytest.mark.parametrize("d", [2, 3])
def test_gibbs_with_wrong_power_is_indefinite(d, getkey):
    class Wrong(AbstractKernel):
        def __call__(self, x, y):
            a, b = Bump()(x), Bump()(y)
            square = a**2 + b**2
            return jnp.sqrt(2 * a * b / square) * jnp.exp(
                -jnp.sum((x - y) ** 2) / square
            )

    xs = points(getkey(), 150, d)
    eigenvalues = np.linalg.eigvalsh(gram(Wrong(), xs, xs))
    assert eigenvalues[0] < -1e-3 * eigenvalues[-1]


#
# Derivatives
#

PROFILES = [
    (Gaussian(1.0), lambda s: jnp.exp(-s / 2)),
    (RationalQuadratic(1.0, 0.7), lambda s: (1 + s / 1.4) ** -0.7),
    (Matern(1.0, 0.5), lambda s: jnp.exp(-jnp.sqrt(s))),
    (Matern(1.0, 1.5), lambda s: (1 + jnp.sqrt(3 * s)) * jnp.exp(-jnp.sqrt(3 * s))),
    (
        Matern(1.0, 2.5),
        lambda s: (1 + jnp.sqrt(5 * s) + 5 * s / 3) * jnp.exp(-jnp.sqrt(5 * s)),
    ),
    (
        Matern(1.0, 3.5),
        lambda s: (
            (1 + jnp.sqrt(7 * s) + 2 * 7 * s / 5 + (7 * s) ** 1.5 / 15)
            * jnp.exp(-jnp.sqrt(7 * s))
        ),
    ),
]


@pytest.mark.parametrize("kernel, phi", PROFILES)
def test_profile(kernel, phi):
    s = jnp.array([0.4, 1.0, 5.0])
    values = jax.vmap(lambda s: kernel.profile(s, 4))(s)
    assert len(values) == 5
    for value in values:
        np.testing.assert_allclose(value, jax.vmap(phi)(s), rtol=1e-10)
        phi = jax.grad(phi)
    assert len(kernel.profile(s[0], 0)) == 1


# The derivative of each entry of the profile, by forward and reverse mode, is the next.
@pytest.mark.parametrize("kernel, phi", PROFILES)
def test_profile_is_differentiable(kernel, phi):
    del phi
    s = jnp.array(0.8)
    following = kernel.profile(s, 5)[1:]
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(
            jacobian(lambda s: kernel.profile(s, 4))(s), following, rtol=1e-13
        )


NUS = [0.5, 1.5, 2.5, 3.5]


# u^q K_q(u) -> 2^(q-1) Gamma(q), and u K_(1/2)(u) u^(-1/2) -> sqrt(pi/2).
@pytest.mark.parametrize("nu", NUS)
def test_matern_profile_at_zero(nu):
    p = round(nu - 0.5)
    values = Matern(1.0, nu).profile(jnp.array(0.0), p)
    truth = [(-nu / 2) ** m * gamma(nu - m) / gamma(nu) for m in range(p + 1)]
    np.testing.assert_allclose(values, truth, rtol=1e-14)
    s = 1e-26
    first_singular = Matern(1.0, nu).profile(jnp.array(s), p + 1)[-1]
    limit = (-nu) ** (p + 1) * 2 ** (1 - nu) / gamma(nu) * math.sqrt(math.pi / 2)
    np.testing.assert_allclose(
        first_singular * math.sqrt(2 * nu * s), limit, rtol=1e-12
    )


def test_smooth_profiles_at_zero():
    s = jnp.array(0.0)
    np.testing.assert_array_equal(
        Gaussian(1.0).profile(s, 4), [(-0.5) ** m for m in range(5)]
    )
    rising = [1, 0.7, 0.7 * 1.7, 0.7 * 1.7 * 2.7, 0.7 * 1.7 * 2.7 * 3.7]
    np.testing.assert_allclose(
        RationalQuadratic(1.0, 0.7).profile(s, 4),
        [r * (-1 / 1.4) ** m for m, r in enumerate(rising)],
        rtol=1e-14,
    )


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_matern_finite_at_zero(nu, dtype):
    def terms(lengthscale, s):
        return jnp.stack(Matern(lengthscale, nu).profile(s / lengthscale**2, 4))

    inputs = (jnp.array(0.3, dtype), jnp.array(0.0, dtype))
    assert terms(*inputs).dtype == dtype
    assert np.all(np.isfinite(terms(*inputs)))
    by_lengthscale, by_s = jax.jacrev(terms, argnums=(0, 1))(*inputs)
    assert np.all(np.isfinite(by_s))
    np.testing.assert_array_equal(by_lengthscale, 0.0)
    # As the library uses it: the singular ones times powers of a difference.
    x = jnp.array([0.2, 0.3], dtype)
    kernel = Matern(inputs[0], nu)
    by_kernel, by_point = jax.grad(lambda kx: kx[0](kx[1], x))((kernel, x))
    np.testing.assert_array_equal(by_kernel.lengthscale.raw, 0.0)
    np.testing.assert_array_equal(by_point, 0.0)


# d^2m/dx^2m of phi((x - y)^2 / l^2) at x = y is (2m)!/m! phi^(m)(0) / l^2m.
@pytest.mark.parametrize("nu, m", [(1.5, 1), (2.5, 2), (3.5, 2), (4.5, 3)])
def test_matern_call_differentiable_at_coincident_points(nu, m):
    kernel = Matern(0.3, nu)
    y = jnp.array([0.4])
    fn = lambda t: kernel(t[None], y)
    for _ in range(2 * m):
        fn = jax.jacfwd(fn)
    phi_m = (-nu / 2) ** m * gamma(nu - m) / gamma(nu)
    truth = math.factorial(2 * m) / math.factorial(m) * phi_m / 0.3 ** (2 * m)
    np.testing.assert_allclose(fn(y[0]), truth, rtol=1e-12)


def _central_difference(fn, h):
    # Fourth order: the error is O(h^4).
    return (8 * (fn(h) - fn(-h)) - (fn(2 * h) - fn(-2 * h))) / (12 * h)


def _directional(kernel, m):
    fn = lambda t, x, y, v: kernel(x + t * v, y)
    for _ in range(m):
        fn = jax.jacfwd(fn)
    return eqx.filter_jit(fn)


# The fourth derivative by nested forward mode, at coincident points too, compared with
# differences of the third.
@pytest.mark.parametrize(
    "name", [n for n in KERNELS if smoothness(KERNELS[n](2)) == math.inf]
)
def test_call_differentiable_four_times(name, getkey):
    kernel = unwrap(KERNELS[name](2))
    third, fourth = _directional(kernel, 3), _directional(kernel, 4)
    x, y, v = points(getkey(), 3, 2)
    v = v / jnp.linalg.norm(v)
    for first in (x, y):
        value = fourth(jnp.array(0.0), first, y, v)
        difference = _central_difference(
            lambda h: third(jnp.array(h), first, y, v), 2e-4
        )
        scale = 1 + abs(third(jnp.array(0.0), first, y, v)) + abs(value)
        assert abs(value - difference) < 1e-6 * scale


@all_kernels
def test_gradients_of_parameters(name, getkey):
    kernel, xs, weights = KERNELS[name](2), points(getkey(), 6, 2), getkey()
    weights = jax.random.normal(weights, (6, 6))
    params, rest = eqx.partition(kernel, learnable(kernel))
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def loss(flat):
        # The diagonal is there too: coincident points.
        return jnp.sum(weights * gram(eqx.combine(unravel(flat), rest), xs, xs))

    gradient = jax.grad(loss)(flat)
    assert np.all(np.isfinite(gradient))
    if flat.size <= 5:
        directions = np.eye(flat.size)
    else:
        directions = np.asarray(jax.random.normal(getkey(), (3, flat.size)))
    for v in directions:
        difference = _central_difference(lambda h: loss(flat + h * v), 1e-3)
        scale = 1e-2 + np.linalg.norm(gradient)
        assert abs(gradient @ v - difference) < 1e-6 * scale


@all_kernels
def test_wrapped_equals_unwrapped(name, getkey):
    x, y = points(getkey(), 2, 2)
    kernel = KERNELS[name](2)
    np.testing.assert_array_equal(kernel(x, y), unwrap(kernel)(x, y))
    if isinstance(kernel, AbstractFeatureKernel):
        np.testing.assert_array_equal(
            kernel(x, y), kernel.pair(kernel.features(x), kernel.features(y))
        )


# Parameters inside the function that a kernel was given.
def test_wrapped_inside_functions(getkey):
    class Power(eqx.Module):
        scale: Positive

        def __call__(self, x):
            return self.scale * (1 + x**2)

    x, y = points(getkey(), 2, 2)
    for cls in (Gibbs, ft.partial(Warped, Gaussian(1.0))):
        truth = cls(lambda x: 0.3 * (1 + x**2))(x, y)
        for function in (Power(Positive(0.3)), Frozen(Power(Positive(0.3)))):
            np.testing.assert_allclose(cls(function)(x, y), truth, rtol=1e-14)


# The costly part of the kernel inside is done once per point.
def test_warped_composes_features(getkey):
    (x,) = points(getkey(), 1, 2)
    features = Warped(Gibbs(Bump()), Bend()).features(x)
    np.testing.assert_array_equal(features[0], Bend()(x))
    np.testing.assert_array_equal(features[1], Bump()(Bend()(x)) ** 2)
    np.testing.assert_array_equal(Warped(Cosine(), Bend()).features(x), Bend()(x))


def test_warp_changes_dimension(getkey):
    x, y = points(getkey(), 2, 2)
    circle = lambda x: jnp.stack([jnp.cos(x[0]), jnp.sin(x[0]), x[1]])
    value = Warped(Gaussian([1.0, 1.0, 0.5]), circle)(x, y)
    chord = 4 * np.sin((x[0] - y[0]) / 2) ** 2
    np.testing.assert_allclose(
        value, np.exp(-chord / 2 - 2 * (x[1] - y[1]) ** 2), rtol=1e-13
    )


#
# Algebra
#


def test_operators(getkey):
    a, b, c, d = Gaussian(0.3), Matern(0.5), Polynomial(2), Cosine()
    assert (a + b + (c + d)).kernels == (a, b, c, d)
    assert (a * b * (c * d)).kernels == (a, b, c, d)
    assert isinstance(a + b, Sum) and isinstance(a * b, Product)
    assert (a * (b + c)).kernels[1].kernels == (b, c)
    assert sum([a, b, c]).kernels == (a, b, c)
    assert math.prod([b, c], start=a).kernels == (a, b, c)
    assert a + 0 is a and 0.0 + a is a
    frozen = Frozen(b)
    assert (a + frozen).kernels == (a, frozen)
    assert (frozen * a).kernels == (frozen, a)
    x, y = points(getkey(), 2, 2)
    values = [k(x, y) for k in (a, b, c, d)]
    np.testing.assert_allclose(
        (a * (b + c) + d)(x, y),
        values[0] * (values[1] + values[2]) + values[3],
        rtol=1e-14,
    )


NUMBERS = [
    2,
    2.0,
    np.float64(2.0),
    np.array(2.0),
    np.array(2),
    Positive(2.0),
    Bounded(2.0, 1.0, 3.0),
    Unconstrained(2.0),
    Frozen(2.0),
]


@pytest.mark.parametrize("number", [*NUMBERS, "jax"], ids=repr)
def test_operators_with_numbers(number, getkey):
    number = jnp.array(2.0) if isinstance(number, str) else number
    x, y = points(getkey(), 2, 2)
    kernel = Gaussian(0.3)
    is_parameter = isinstance(number, (Positive, Bounded, Unconstrained, Frozen))
    for scaled in (number * kernel, kernel * number):
        assert isinstance(scaled, Scaled) and scaled.kernel == kernel
        assert type(scaled.variance) is (type(number) if is_parameter else Positive)
        np.testing.assert_allclose(scaled(x, y), 2 * kernel(x, y), rtol=1e-14)
    for shifted in (number + kernel, kernel + number):
        assert isinstance(shifted, Sum)
        assert any(isinstance(k, Constant) for k in shifted.kernels)
        np.testing.assert_allclose(shifted(x, y), 2 + kernel(x, y), rtol=1e-14)


def test_traced_variance(getkey):
    x, y = points(getkey(), 2, 2)
    fn = lambda v: (v * Gaussian(0.3) + v)(x, y)
    value, gradient = jax.jit(jax.value_and_grad(fn))(2.0)
    np.testing.assert_allclose(gradient, 1 + Gaussian(0.3)(x, y), rtol=1e-13)
    np.testing.assert_allclose(value, 2 * gradient, rtol=1e-13)


def test_operators_reject():
    kernel = Gaussian(0.3)
    for fn in (
        lambda: kernel + "a",
        lambda: kernel * "a",
        lambda: None + kernel,
        lambda: [1.0] * kernel,
        lambda: kernel * (lambda x, y: 1.0),
    ):
        with pytest.raises(TypeError):
            fn()


def test_smoothness():
    assert smoothness(Gaussian(0.3)) == math.inf
    assert smoothness(Cosine()) == math.inf
    assert [smoothness(Matern(1.0, nu)) for nu in NUS] == [0, 1, 2, 3]
    rough = Matern(1.0, 1.5)
    assert smoothness(2.0 * rough + Gaussian(0.3)) == 1
    assert smoothness(Matern(1.0, 2.5) * rough) == 1
    assert smoothness(Subspace(rough, 0)) == 1
    assert smoothness(Stretched(rough, 2.0)) == 1
    assert smoothness(Warped(rough, Bend())) == 1
    assert smoothness(Frozen(rough) + Gaussian(0.3)) == 1
    assert smoothness(Gibbs(Bump())) == math.inf

    class Rough(AbstractKernel):
        def __call__(self, x, y):
            return jnp.minimum(x[0], y[0])

    smoothness.register(Rough, lambda kernel: 0)
    assert smoothness(Rough() + Gaussian(0.3)) == 0


#
# Rescaling
#

# Kernels for which rescaling is the same as rescaling the points.
SCALING = [
    "gaussian_ard",
    "matern_1.5",
    "rational_quadratic",
    "cosine",
    "product",
    "scaled",
    "subspace",
    "stretched",
]


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("transform", [lambda k: k, unwrap], ids=["wrapped", "plain"])
def test_rescale_scales_points(name, transform, getkey):
    x, y = points(getkey(), 2, 2)
    kernel = transform(KERNELS[name](2))
    for new in (
        rescale(kernel, 2.5),
        jax.jit(rescale)(kernel, 2.5),
        rescale(rescale(kernel, 5), jnp.array(0.5)),
    ):
        np.testing.assert_allclose(new(2.5 * x, 2.5 * y), kernel(x, y), rtol=1e-13)
        np.testing.assert_allclose(unwrap(new)(x, y), new(x, y), rtol=1e-15)


# An optimiser's state and a compiled function still fit: only the first time is a
# wrapper added, if any.
@all_kernels
def test_rescale_keeps_structure(name):
    once = rescale(KERNELS[name](2), 1.5)
    twice = rescale(once, jnp.array(2.0))
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    for before, after in zip(jax.tree.leaves(once), jax.tree.leaves(twice)):
        if eqx.is_array(before):
            assert before.aval == after.aval
    if not ("gibbs" in name or name in ("cosine", "product", "subspace", "frozen")):
        kernel = KERNELS[name](2)
        assert jax.tree.structure(once) == jax.tree.structure(kernel)


def test_rescale_values(getkey):
    kernel = Gaussian(Bounded([0.3, 0.6], 0.1, 1.0)) + Matern(Frozen(0.3))
    new = rescale(kernel, 2.0)
    value = np.asarray(new.kernels[0].lengthscale.value)
    np.testing.assert_allclose(value, [0.6, 1.0], rtol=1e-13)
    assert isinstance(new.kernels[0].lengthscale, Bounded) and value[1] < 1
    assert new.kernels[1] == kernel.kernels[1]
    # The period, the shape and the variance are no lengthscales.
    new = rescale(2.0 * Periodic(0.3, 5.0) * RationalQuadratic(0.3, 0.7), 2.0)
    truth = 2.0 * Periodic(0.6, 5.0) * RationalQuadratic(0.6, 0.7)
    x, y = points(getkey(), 2, 2)
    np.testing.assert_allclose(new(x, y), truth(x, y), rtol=1e-14)
    polynomial = Polynomial(2) + 0.3
    assert rescale(polynomial, 2.0) == polynomial
    # Not the points are scaled, but the function.
    for factor in (2.0, jnp.array(2.0)):
        new = rescale(rescale(Gibbs(Bump()), 3.0), factor)
        np.testing.assert_allclose(
            new(x, y), Gibbs(lambda x: 6 * Bump()(x))(x, y), rtol=1e-14
        )
    frozen = Gibbs(Frozen(Bump()))
    assert rescale(frozen, 2.0) is frozen
    frozen = Frozen(Gaussian(0.3)) + Gaussian(0.2)
    assert rescale(frozen, 2.0).kernels[0] is frozen.kernels[0]
    new = rescale(Warped(Gaussian(0.3), Bend()), 2.0)
    np.testing.assert_allclose(
        new(x, y), Gaussian(0.6)(Bend()(x), Bend()(y)), rtol=1e-14
    )
    new = rescale(Stretched(Gaussian(0.3), Frozen(5.0)), 2.0)
    np.testing.assert_allclose(new(x, y), Gaussian(3.0)(x, y), rtol=1e-14)


def test_rescale_by_dimension():
    factor = jnp.array([2.0, 8.0])
    new = rescale(Gaussian([0.1, 0.2]), factor)
    np.testing.assert_allclose(new.lengthscale.value, [0.2, 1.6])
    new = rescale(Gaussian(0.1), factor)
    np.testing.assert_allclose(new.lengthscale.value, 0.4)
    product = Subspace(Gaussian(0.1), 0) * Subspace(Gaussian([0.1, 0.1]), (1, 0))
    one, two = rescale(product, factor).kernels
    np.testing.assert_allclose(one.kernel.lengthscale.value, 0.2)
    np.testing.assert_allclose(two.kernel.lengthscale.value, [0.8, 0.2])
    new = rescale(Stretched(Gaussian(1.0), [1.0, 1.0]), factor)
    np.testing.assert_allclose(new.factor.value, factor)
    for values, expected in ((lambda x: 1 + x, [2.0, 8.0]), (lambda x: 1 + x[0], 4.0)):
        new = rescale(rescale(Gibbs(values), factor), jnp.ones(2))
        np.testing.assert_allclose(new.lengthscale(jnp.zeros(2)), expected)
    new = rescale(Warped(Gaussian(0.1), lambda x: x[:1]), factor)
    np.testing.assert_allclose(new.kernel.lengthscale.value, 0.4)


def test_rescale_is_differentiable(getkey):
    x, y = points(getkey(), 2, 2)
    kernel = Gaussian(0.5) * Gibbs(Bump())

    @jax.jit
    def fn(factor):
        return rescale(kernel, factor)(x, y)

    difference = _central_difference(lambda h: fn(1.3 + h), 1e-3)
    np.testing.assert_allclose(jax.grad(fn)(1.3), difference, rtol=1e-8)


#
# Transformations
#


def test_jit_compiles_once(getkey):
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def fn(kernel, x, y):
        return kernel(x, y)

    x, y = points(getkey(), 2, 2)
    for lengthscale in (0.3, 0.4, jnp.array(0.5)):
        kernel = 2.0 * Gaussian(lengthscale) + Gibbs(_network(2, 2))
        np.testing.assert_allclose(fn(kernel, x, y), kernel(x, y), rtol=1e-13)


def test_vmap_over_kernels(getkey):
    x, y = points(getkey(), 2, 2)
    lengthscales = jnp.array([0.2, 0.5, 0.9])
    make = lambda l: rescale(Gaussian(l) + 0.5 * Matern(l), l)
    batched = eqx.filter_vmap(make)(lengthscales)
    values = eqx.filter_vmap(lambda k: k(x, y))(batched)
    truth = [make(l)(x, y) for l in lengthscales]
    np.testing.assert_allclose(values, truth, rtol=1e-14)


def test_filter_grad(getkey):
    x, y = points(getkey(), 2, 2)
    kernel = 2.0 * Gaussian(Frozen(0.3)) + Subspace(Gaussian(0.4), 0)
    gradient = eqx.filter_grad(lambda k: k(x, y))(kernel)
    scaled, subspace = gradient.kernels
    assert scaled.kernel.lengthscale.wrapped == 0
    # Parameters are learned through their logarithm.
    np.testing.assert_allclose(scaled.variance.raw, 2 * Gaussian(0.3)(x, y), rtol=1e-13)
    square = ((x[0] - y[0]) / 0.4) ** 2
    np.testing.assert_allclose(
        subspace.kernel.lengthscale.raw, square * np.exp(-square / 2), rtol=1e-12
    )


#
# Mistakes
#

_x = jnp.array([0.1, 0.2])

MISTAKES = [
    (lambda: Gaussian(-1.0), "`lengthscale`.*-1"),
    (lambda: Gaussian([0.3, 0.0]), "`lengthscale`"),
    (lambda: Gaussian(math.nan), "`lengthscale`"),
    (lambda: Gaussian(Unconstrained(-1.0)), "`lengthscale` must be positive.*-1"),
    (lambda: Gaussian(Frozen(np.array([1.0, -2.0]))), "`lengthscale` must be positive"),
    (lambda: Gaussian(Frozen("a")), "`lengthscale` must be a number.*'a'"),
    (lambda: Gaussian(np.ones((2, 2))), r"`lengthscale` must.*\(2, 2\)"),
    (lambda: jax.jit(Gaussian)(np.ones((2, 2))), r"`lengthscale` must.*\(2, 2\)"),
    (lambda: Gaussian([1.0, 2.0, 3.0])(_x, _x), r"`lengthscale`.*\(3,\).*\(2,\)"),
    (lambda: Periodic(1.0, [1.0] * 3)(_x, _x), r"`period`.*\(3,\).*\(2,\)"),
    (lambda: Periodic(0.0, 1.0), "`lengthscale`"),
    (lambda: Periodic(1.0, -1.0), "`period`"),
    (lambda: RationalQuadratic(1.0, [1.0, 2.0]), r"`alpha` must be a scalar.*\(2,\)"),
    (lambda: Matern(1.0, 2.0), "`nu`.*0.5, 1.5, 2.5.*2.0"),
    (lambda: Matern(1.0, 2), "`nu`"),
    (lambda: Matern(1.0, -0.5), "`nu`"),
    (lambda: Matern(1.0, math.nan), "`nu`"),
    (lambda: Polynomial(0), "`degree` must be at least 1; got 0"),
    (lambda: Polynomial(2, scale=-1.0), "`scale`"),
    (lambda: Polynomial(2, offset=0.0), r"`offset`.*Frozen\(0.0\)"),
    (lambda: Polynomial(2, offset=Frozen(-1.0)), "`offset` must be non-negative"),
    (lambda: Constant(-1.0), "`value`"),
    (lambda: Gaussian(1.0) + (-1.0), "`value`"),
    (lambda: 0.0 * Gaussian(1.0), "`variance`"),
    (lambda: np.array([1.0, 2.0]) * Gaussian(1.0), r"`variance`.*scalar.*\(2,\)"),
    (lambda: Sum(()), "`kernels`"),
    (lambda: Scaled(Frozen(1.0), 1.0), "`kernel` must be an `AbstractKernel`"),
    (lambda: Subspace(Gaussian(1.0), ()), "`dims`"),
    (lambda: Subspace(Gaussian(1.0), -1), "`dims`.*-1"),
    (lambda: Subspace(Gaussian(1.0), (0, 0)), "`dims`"),
    (lambda: Subspace(Gaussian(1.0), 2)(_x, _x), r"`dims`.*\(2,\)"),
    (lambda: Stretched(Gaussian(1.0), 0.0), "`factor`"),
    (lambda: Stretched(Cosine(), [1.0] * 3)(_x, _x), r"`factor`.*\(3,\).*\(2,\)"),
    (lambda: Gibbs(Frozen(0.3)), "`lengthscale`.*function.*`Gaussian`"),
    (lambda: Gibbs(Bumps(np.ones(3)))(_x, _x), r"`lengthscale`.*\(3,\).*\(2,\)"),
    (lambda: Warped(Gaussian(1.0), Frozen(0.3)), "`warp`"),
    (lambda: Warped(Gaussian(1.0), jnp.sum)(_x, _x), r"`warp`.*shape \(\)"),
    (lambda: rescale(Cosine(), -2.0), "`factor`"),
    (lambda: _network(2, "scalar")(jnp.ones(3)), r"in_size=2.*\(3,\)"),
    (lambda: _network(2, 3), "`out_size`.*3.*2"),
    (
        lambda: LengthscaleNetwork(2, scale=0.0, key=jax.random.key(0)),
        "Wrong value for `scale`.*greater than zero",
    ),
]


@pytest.mark.parametrize("i", range(len(MISTAKES)))
def test_mistakes(i):
    fn, match = MISTAKES[i]
    with pytest.raises(ValueError, match=match):
        fn()


def test_abstract():
    with pytest.raises(TypeError):
        AbstractKernel()  # pyright: ignore


@pytest.mark.parametrize(
    "kernel, text",
    [
        (Gaussian(0.2), "Gaussian(lengthscale=Positive(0.2))"),
        (
            Matern([0.2, 0.3], 1.5),
            "Matern(lengthscale=Positive([0.2, 0.3]), nu=1.5)",
        ),
        (
            2.0 * Polynomial(2, offset=Frozen(0.0)),
            "Scaled(kernel=Polynomial(degree=2,scale=Positive(1.0),offset=Frozen(0.0)),"
            "variance=Positive(2.0))",
        ),
        (
            Subspace(Periodic(1.0, Frozen(10.0)), 1) + 0.5,
            "Sum(kernels=(Subspace(kernel=Periodic(lengthscale=Positive(1.0),"
            "period=Frozen(10.0)),dims=(1,)),Constant(value=Positive(0.5))))",
        ),
    ],
    ids=lambda x: "",
)
def test_repr(kernel, text):
    assert "".join(repr(kernel).split()) == "".join(text.split())


#
# The network
#


def test_network(getkey):
    key = getkey()
    network = LengthscaleNetwork(2, 2, 7, 1, scale=0.25, key=key)
    first, last = network.mlp.layers
    x = np.array([0.3, -0.8])
    hidden = np.tanh(first.weight @ x + first.bias)
    truth = 0.25 * np.log1p(np.exp(last.weight @ hidden + last.bias))
    np.testing.assert_allclose(network(jnp.asarray(x)), truth, rtol=1e-13)
    assert LengthscaleNetwork(3, key=key)(jnp.ones(3)).shape == ()
    # The weights are learned, and the scale of each output.
    size = sum(a.size for a in jax.tree.leaves(eqx.filter(network, eqx.is_array)))
    assert size == 7 * 2 + 7 + 2 * 7 + 2 + 2
    # A search for scales changes no structure, so that files can be read again.
    for out_size, scale in ((2, 0.25), ("scalar", 0.25), (2, Frozen(0.25))):
        network = LengthscaleNetwork(2, out_size, 7, 1, scale, key=key)
        kernel = rescale(Gibbs(network), jnp.array([2.0, 8.0]))
        assert jax.tree.structure(kernel) == jax.tree.structure(Gibbs(network))
        shapes = lambda tree: [
            jnp.shape(a) for a in jax.tree.leaves(eqx.filter(tree, eqx.is_array))
        ]
        assert shapes(kernel) == shapes(Gibbs(network))
        factor = 1.0 if isinstance(scale, Frozen) else 4.0
        factor = np.array([2.0, 8.0]) if out_size == 2 and factor == 4.0 else factor
        expected = factor * network(jnp.asarray(x))
        np.testing.assert_allclose(kernel.lengthscale(jnp.asarray(x)), expected)


@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("size", [1e-300, 1.0, 1e100, 1e300])
def test_network_is_positive(bias, size):
    network = eqx.tree_at(
        lambda n: n.mlp.layers[-1].bias, _network(2, 2), jnp.full(2, bias)
    )
    for x in size * jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]):
        assert np.all(network(x) > 0) and np.all(np.isfinite(network(x)))
        gradient = eqx.filter_grad(lambda n: jnp.sum(n(x)))(network)
        assert np.all(np.isfinite(ravel_pytree(gradient)[0]))


# So positive that the kernel may divide by its square.
@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("size", [1e-300, 1.0, 1e100])
def test_gibbs_with_extreme_network(bias, size):
    network = eqx.tree_at(
        lambda n: n.mlp.layers[-1].bias, _network(2, 2), jnp.full(2, bias)
    )
    for x in size * jnp.array([[1.0, 1.0], [-1.0, 1.0]]):
        fn = lambda k: k(x, x) + k(x, -x)
        value, gradient = eqx.filter_value_and_grad(fn)(Gibbs(network))
        assert 1 <= value <= 2
        assert np.all(np.isfinite(ravel_pytree(gradient)[0]))
