"""Equinox, Optax and Optimistix used with this library as they are used without it."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest


box = eb.Box(0.0, 1.0)
grid = box.grid(7)
conditions = [
    eb.Condition(
        lambda u, x: u.d(0), box.grid(6), lambda x: jnp.cos(3 * x[0]), nugget=1e-6
    ),
    eb.Condition(lambda u, x: u.value, jnp.zeros((1, 1)), nugget=1e-6),
]
objective = eb.ValidationResidual(box.interior(6, method="grid"))


def _prior(lengthscale=0.2):
    return eb.GaussianProcess(eb.Gaussian(lengthscale))


def _learn(optimiser, steps):
    return eb.learn(
        _prior(), conditions, objective, optimiser, steps=steps, scale_search=False
    )


@pytest.fixture(scope="module")
def learned():
    return _learn(optx.LBFGS(1e-3, 1e-6), 12)


#
# Optimisers
#


def test_optax_chain_and_schedule():
    # Two steps whose lengths are known, and then none.
    schedule = optax.piecewise_constant_schedule(1.0, {2: 0.0})
    optimiser = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(schedule))
    learned = _learn(optimiser, 4)
    before, after = _prior().kernel.lengthscale.raw, learned.prior.kernel.lengthscale
    np.testing.assert_allclose(after.raw - before, 2e-3, rtol=1e-6)
    values = learned.history["objective"]
    assert values[0] > values[1] > values[2] == values[3]


def test_optax_with_the_value():
    # It halves the learning rate after a step that is no better.
    plateau = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=1, accumulation_size=1
    )
    learned = _learn(optax.chain(optax.sgd(1e-4), plateau), 3)
    assert learned.objective < learned.history["objective"][0]


@pytest.mark.parametrize(
    "optimiser",
    [
        optx.GaussNewton(1e-3, 1e-6),
        optx.OptaxMinimiser(optax.adam(0.1), 1e-3, 1e-6),
    ],
    ids=["gauss_newton", "optax_minimiser"],
)
def test_optimistix(optimiser, learned):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        other = _learn(optimiser, 12)
    assert other.objective < 1e-2 * other.history["objective"][0]
    assert learned.objective < 1e-2 * learned.history["objective"][0]


#
# Models
#


class Readout(eqx.Module):
    # Features are a kernel between the point and some centres.
    kernel: eb.AbstractKernel
    centres: jax.Array
    linear: eqx.nn.Linear

    def __call__(self, x):
        kernel = eb.unwrap(self.kernel)
        return self.linear(jax.vmap(lambda y: kernel(x, y))(self.centres))


def test_learned_kernel_in_another_model(learned, getkey):
    linear = eqx.nn.Linear(len(grid), "scalar", key=getkey())
    model = Readout(learned.prior.kernel, grid, linear)

    @eqx.filter_jit
    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - jnp.sin(x[:, 0])) ** 2)

    x = box.grid(9)
    gradient = eqx.filter_grad(loss)(model, x)
    where = lambda m: m.kernel.lengthscale.raw
    raw, h = where(model), 1e-5
    up, down = (loss(eqx.tree_at(where, model, raw + e), x) for e in (h, -h))
    np.testing.assert_allclose(where(gradient), (up - down) / (2 * h), rtol=1e-6)
    optimiser = optax.sgd(1e-2)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, _ = optimiser.update(gradient, optimiser.init(params))
    assert loss(eqx.apply_updates(model, updates), x) < loss(model, x)


def test_tree_at(learned):
    prior = learned.prior
    moved = eqx.tree_at(lambda p: p.kernel.lengthscale, prior, eb.Frozen(0.3))
    solution = eb.solve(moved, conditions)
    np.testing.assert_array_equal(
        solution(grid), eb.solve(_prior(0.3), conditions)(grid)
    )
    longer = eqx.tree_at(
        lambda p: p.kernel, prior, replace_fn=lambda k: 2.0 * k + eb.Polynomial(1)
    )
    k, x, y = eb.unwrap(longer).kernel, jnp.array([0.1]), jnp.array([0.6])
    length = learned.prior.kernel.lengthscale.value
    expected = 2 * jnp.exp(-0.5 * (0.5 / length) ** 2) + 1.06
    np.testing.assert_allclose(k(x, y), expected, rtol=1e-14)
    assert jnp.all(jnp.isfinite(eb.solve(longer, conditions)(grid)))


def test_serialise(learned, tmp_path):
    path = tmp_path / "learned.eqx"
    eqx.tree_serialise_leaves(path, learned)
    # A skeleton with the same structure, and other numbers.
    zeros = lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x
    loaded = eqx.tree_deserialise_leaves(path, jax.tree.map(zeros, learned))
    assert eqx.tree_equal(loaded, learned)
    np.testing.assert_array_equal(loaded.solution(grid), learned.solution(grid))
    np.testing.assert_array_equal(loaded.solution.std(grid), learned.solution.std(grid))
