"""Kernels of GPJax. The independent truth is automatic differentiation of their own
formulas, where these have derivatives.
"""

import subprocess
import sys

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from eqx_bilevel._gram import covariance, variances
from gpjax import kernels as gk
from gpjax.parameters import PositiveReal, Real, SigmoidBounded

from .test_gram import assert_close, jets, oracle, pde_block, random_block


class Deep(gk.AbstractKernel):
    # A kernel of a user's own, as in GPJax's documentation.
    base: gk.AbstractKernel
    network: eqx.nn.MLP
    fixed: paramax.AbstractUnwrappable

    def __init__(self, base, dim, key):
        self.base = base
        self.network = eqx.nn.MLP(dim, 2, 3, 1, jnp.tanh, key=key)
        self.fixed = paramax.NonTrainable(PositiveReal(0.7))
        super().__init__()

    def __call__(self, x, y):
        scale = paramax.unwrap(self.fixed)
        return scale * self.base(self.network(x), self.network(y))


class Cosine(gk.RBF):
    # A subclass with another formula.
    def __call__(self, x, y):
        return jnp.sum(jnp.cos((x - y) / paramax.unwrap(self.lengthscale)))


ard = jnp.array([0.5, 0.8])
KERNELS = {
    "rbf": gk.RBF(lengthscale=ard, variance=2.0),
    "matern52": gk.Matern52(lengthscale=0.6, variance=0.5),
    "rational_quadratic": gk.RationalQuadratic(lengthscale=ard, alpha=1.5),
    "periodic": gk.Periodic(lengthscale=0.8, period=jnp.array([1.5, 2.0])),
    "active_dims": gk.Matern52([1]) * gk.RBF(slice(0, 1)) + gk.RBF([1, 0], ard),
    "polynomials": gk.Polynomial(degree=3, shift=0.5) * gk.Linear([1])
    + gk.Constant(constant=jnp.array(2.0)),
    "deep": Deep(gk.RationalQuadratic() + gk.RBF([0]), 2, jax.random.key(0)),
    "deep_matern": Deep(gk.Matern52() + gk.RBF([0]), 2, jax.random.key(0)),
    "subclass": Cosine(lengthscale=ard),
}


@pytest.mark.parametrize("name", KERNELS)
def test_against_automatic_differentiation(name, getkey):
    original = KERNELS[name]
    kernels = {"u": eb.unwrap(eb.from_gpjax(original))}
    left = [pde_block(getkey(), 3, 2)]
    right = [random_block(getkey(), 2, 1, jets(2, (), (0, 1)))]
    matrix = eqx.filter_jit(covariance)(kernels, left, right)
    assert_close(matrix, oracle({"u": original}, left, right))
    # GPJax's formulas for Matern kernels have no derivatives at x = y.
    if "matern" not in name and name != "active_dims":
        diagonal = eqx.filter_jit(variances)(kernels, right)
        assert_close(diagonal, np.diag(oracle({"u": original}, right, right)))


@pytest.mark.parametrize(
    "cls,order", [(gk.Matern12, 0), (gk.Matern32, 1), (gk.Matern52, 2)]
)
def test_matern(cls, order):
    original, ours = cls([0], 0.6, 0.5), eb.from_gpjax(cls([0], 0.6, 0.5))
    x, y = jnp.array([0.1, 0.2]), jnp.array([0.5, 0.9])
    np.testing.assert_allclose(ours(x, y), original(x, y), rtol=1e-14)
    assert eb.smoothness(ours) == order
    if order > 0:
        # E[u'(x)^2] of a Matern process, from its spectral density.
        slope = lambda x, y: jax.jacfwd(jax.jacfwd(ours, 0), 1)(x, y)[0, 0]
        nu = order + 0.5
        np.testing.assert_allclose(slope(x, x), 0.5 * nu / (nu - 1) / 0.6**2)


def test_what_is_learned():
    positive, number = PositiveReal(0.4), jnp.array(0.3)
    fixed = paramax.non_trainable(PositiveReal(2.0))
    bounded = SigmoidBounded(0.4, low=0.1, high=0.9)
    kernel = gk.RationalQuadratic([0], positive, fixed, 1.5) * gk.Periodic(
        [1], bounded, period=2.0
    ) + gk.Constant(constant=number)
    product, constant = eb.from_gpjax(kernel).kernels
    quadratic, periodic = product.kernels
    assert isinstance(quadratic.kernel.kernel.lengthscale, eb.Positive)
    assert isinstance(quadratic.variance, eb.Frozen)
    assert isinstance(quadratic.kernel.kernel.alpha, eb.Frozen)
    inner = periodic.kernel.kernel
    assert isinstance(inner.lengthscale, eb.Bounded)
    assert (inner.lengthscale.lower, inner.lengthscale.upper) == (0.2, 1.8)
    assert isinstance(constant.value, eb.Positive)
    leaves = jax.tree.leaves((quadratic, periodic, constant))
    assert all(x.dtype == jnp.float64 and not x.weak_type for x in leaves)


def test_deep_kernel_is_learned():
    box, slope = eb.Box(0.0, 1.0), lambda u, x: u.d(0)
    conditions = [
        eb.Condition(slope, box.grid(5), lambda x: jnp.cos(3 * x[0]), nugget=1e-6),
        eb.Condition(lambda u, x: u.value, jnp.zeros((1, 1)), nugget=1e-6),
    ]
    original = Deep(gk.Matern32(), 1, jax.random.key(0))
    prior = eb.GaussianProcess(eb.from_gpjax(original))
    objective = eb.ValidationResidual(box.interior(6, method="grid"))
    adam = optax.adam(1e-2)
    learned = eb.learn(prior, conditions, objective, adam, steps=3, scale_search=False)
    assert learned.objective < learned.history["objective"][0]
    before, after = prior.kernel.kernel, learned.prior.kernel.kernel
    weight = lambda k: k.network.layers[0].weight
    assert jnp.all(weight(before) != weight(after))
    assert before.base.variance.value != after.base.variance.value
    assert eqx.tree_equal(before.fixed, after.fixed)
    np.testing.assert_allclose(after.fixed.value.unwrap(), 0.7)


def test_solution_with_a_rough_kernel():
    # Data that are values can be interpolated, derivatives are refused.
    points = jnp.linspace(0.0, 1.0, 4)[:, None]
    original = gk.PoweredExponential(lengthscale=0.5, power=0.8)
    prior = eb.GaussianProcess(eb.from_gpjax(gk.RBF() + original))
    data = eb.Condition(lambda u, x: u.value, points, jnp.arange(4.0), noise=0.1)
    k = original.gram(points).as_matrix() + gk.RBF().gram(points).as_matrix()
    expected = k @ jnp.linalg.solve(k + 0.01 * jnp.eye(4), jnp.arange(4.0))
    np.testing.assert_allclose(eb.solve(prior, [data])(points), expected, rtol=1e-9)
    slopes = eb.Condition(lambda u, x: u.d(0), points)
    with pytest.raises(ValueError, match="derivative"):
        eb.solve(prior, [slopes])


def test_errors(monkeypatch):
    for wrong in (gk.RBF, eb.Gaussian(1.0)):
        with pytest.raises(ValueError, match="must be an instance of `gpjax.kernels"):
            eb.from_gpjax(wrong)
    features = gk.RFF(gk.RBF(n_dims=1), 2, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="`RFF`, which is not a function of two"):
        eb.from_gpjax(gk.RBF() + features)
    with pytest.raises(ValueError, match="greater than zero"):
        eb.from_gpjax(gk.Constant(constant=Real(-1.0)))
    monkeypatch.setitem(sys.modules, "gpjax.kernels", None)
    with pytest.raises(ImportError, match=r"eqx_bilevel\[gpjax\]"):
        eb.from_gpjax(gk.RBF())


def test_gpjax_is_not_imported():
    code = "import sys, eqx_bilevel; assert not {'gpjax', 'paramax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
