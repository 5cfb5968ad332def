import functools as ft
from typing import NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import pytest
from jax.flatten_util import ravel_pytree

from .helpers import (
    additive,
    averages,
    burgers,
    central_difference,
    dot,
    frozen,
    implicit,
    moved,
    pendulum,
    random_direction,
    relative_error,
    tight,
    truth_of,
)


# The spectral radius is 0.4 to 0.7 in all of them.
examples = dict(
    additive=additive, burgers=burgers, pendulum=pendulum, averages=averages
)


def objective(theta, example, adjoint, solver=tight):
    solution = eb.solve(*example.make(theta), solver, adjoint=adjoint)
    judge = eb.ValidationResidual(example.validation, target=example.targets)
    return judge(solution)


class Derivatives(NamedTuple):
    # By differences of the oracle.
    directions: dict  # one for each kind of hyperparameter
    exact: dict
    fixed: dict  # with the point of linearisation fixed


# Everything depends strongly on the points, and weakly on the mean.
steps = dict(points=3e-5, mean=6e-4)


# All that is compiled, once for each problem.
@ft.cache
def derivatives(name: str) -> Derivatives:
    example = examples[name]
    theta = example.theta
    _, _, y, w = truth_of(name)

    @eqx.filter_jit
    def truths(theta):
        oracle = example.oracle(theta)
        stated = oracle.stated()
        exact = example.judge(oracle, stated, *oracle.newton(stated, y, w))
        # One linearised solve, at the fixed point.
        _, w_fixed = oracle.linearised(stated, y)
        return jnp.stack([exact, example.judge(oracle, stated, y, w_fixed)])

    directions, exact, fixed = {}, {}, {}
    for i, kind in enumerate(theta):
        only = random_direction(theta[kind], jax.random.key(i))
        directions[kind] = only
        direction = {**zeros(theta), kind: only}
        at = lambda step, d=direction: truths(moved(theta, d, step))
        exact[kind], fixed[kind] = central_difference(at, steps.get(kind, 2e-4))
    return Derivatives(directions, exact, fixed)


def zeros(theta):
    # Not `zeros_like`, which keeps weak types: each kind would compile anew.
    zero = lambda x: jnp.zeros(x.shape, x.dtype)
    return jax.tree.map(zero, eqx.filter(theta, eqx.is_inexact_array))


@ft.cache
def gradient(name: str, adjoint):
    example = examples[name]
    return eqx.filter_jit(eqx.filter_grad(objective))(example.theta, example, adjoint)


@ft.cache
def forward(name: str):
    example = examples[name]

    @eqx.filter_jit
    def along(theta, direction):
        fn = lambda theta: objective(theta, example, implicit)
        return eqx.filter_jvp(fn, (theta,), (direction,))[1]

    return along


kinds = [(name, kind) for name, example in examples.items() for kind in example.theta]
all_kinds = pytest.mark.parametrize("name, kind", kinds)


@all_kinds
def test_implicit_gradient(name, kind):
    known = derivatives(name)
    value = dot(gradient(name, implicit)[kind], known.directions[kind])
    assert relative_error(value, known.exact[kind]) < 1e-6


@all_kinds
def test_forward_mode(name, kind):
    known = derivatives(name)
    theta = examples[name].theta
    direction = {**zeros(theta), kind: known.directions[kind]}
    value = forward(name)(theta, direction)
    assert relative_error(value, known.exact[kind]) < 1e-6


@all_kinds
def test_frozen_gradient(name, kind):
    known = derivatives(name)
    value = dot(gradient(name, frozen)[kind], known.directions[kind])
    assert relative_error(value, known.fixed[kind]) < 1e-6
    # On these problems it is visibly wrong: by 1.6 % at least, mostly by far more.
    assert relative_error(value, known.exact[kind]) > 0.015


@pytest.mark.parametrize("name", ["burgers", "pendulum"])
@pytest.mark.parametrize("adjoint", [implicit, frozen])
def test_gradient_while_learning(name, adjoint):
    # `learn` differentiates what it reads off the solution together with the solution.
    # Here this goes the long way, of which the tests above know that it is right.
    example = examples[name]
    prior, conditions = example.make(example.theta)
    judge = eb.ValidationResidual(example.validation, target=example.targets)
    judge = 0.25 * judge + eb.ValidationResidual(
        example.validation[::2], target=example.targets[::2]
    )

    @eqx.filter_jit
    @eqx.filter_grad
    def slope(prior):
        return judge(eb.solve(prior, conditions, tight, adjoint=adjoint))

    seen = []

    def update(gradient, state, params):
        jax.debug.callback(seen.append, ravel_pytree(gradient)[0])
        return jax.tree.map(jnp.zeros_like, gradient), state

    eb.learn(
        prior,
        conditions,
        judge,
        optax.GradientTransformation(lambda params: (), update),
        gradient="implicit" if adjoint is implicit else "frozen",
        steps=1,
        scale_search=False,
        solver=tight,
        max_inner_steps=100,
    )
    jax.effects_barrier()
    known = ravel_pytree(slope(prior))[0]
    assert relative_error(seen[0][: known.size], known) < 1e-10


@pytest.mark.parametrize("adjoint", [implicit, frozen])
def test_second_derivatives(adjoint):
    # In two kinds at once, against differences of the first.
    @jax.jit
    def slope(stiffness, length):
        fn = lambda s, l: objective(
            {**pendulum.theta, "stiffness": s, "lengthscale": l}, pendulum, adjoint
        )
        return jnp.stack(jax.grad(fn, (0, 1))(stiffness, length))

    at = pendulum.theta["stiffness"], pendulum.theta["lengthscale"]
    known = [
        central_difference(lambda h: slope(at[0] + 30 * h, at[1]), 1e-3) / 30,
        central_difference(lambda h: slope(at[0], at[1] + h), 1e-4),
    ]
    found = jax.jacfwd(slope, (0, 1))(*at)
    if adjoint is implicit:
        for value, truth in zip(found, known):
            assert relative_error(value, truth) < 1e-5
    else:
        # The point of linearisation is fixed, and differences move it.
        assert relative_error(found[0], known[0]) > 1e-3


#
# What has no derivative
#


def pendulum_of(stiffness):
    return pendulum.make({**pendulum.theta, "stiffness": stiffness})


def test_start_has_no_derivative():
    # Neither a function nor a warm start.
    x = pendulum.validation

    @jax.jit
    @jax.value_and_grad
    def fn(shift):
        other = eb.solve(*pendulum_of(30.0 + shift), tight)
        first = eb.solve(*pendulum_of(jnp.asarray(30.0)), tight, initial=other)
        start = lambda x: x[0] + shift
        second = eb.solve(*pendulum_of(jnp.asarray(30.0)), tight, initial=start)
        return jnp.sum(first(x)) + jnp.sum(second(x))

    _, slope = fn(jnp.asarray(0.1))
    assert slope == 0


def test_settings_and_statistics_have_no_derivative():
    def value(solver):
        solution = eb.solve(*pendulum_of(jnp.asarray(30.0)), solver)
        return jnp.sum(solution(pendulum.validation))

    slopes = eqx.filter_grad(value)(tight)
    assert all(jnp.all(slope == 0) for slope in jax.tree.leaves(slopes))

    def statistics(stiffness):
        stats = eb.solve(*pendulum_of(stiffness), tight).stats
        return stats["objective"] + stats["rkhs_norm"] + stats["residual_norm"]

    assert jax.grad(statistics)(jnp.asarray(30.0)) == 0


#
# Other linear solvers
#


def test_conjugate_gradients():
    linear_solver = lx.CG(rtol=1e-13, atol=1e-13, max_steps=1000)
    solver = eb.GaussNewton(1e-11, 1e-11, linear_solver=linear_solver)

    def fn(stiffness):
        theta = {**pendulum.theta, "stiffness": stiffness}
        return objective(theta, pendulum, implicit, solver)

    value = jax.jit(jax.grad(fn))(pendulum.theta["stiffness"])
    known = derivatives("pendulum")
    value = value * known.directions["stiffness"]
    assert relative_error(value, known.exact["stiffness"]) < 1e-6


def test_lineax_gmres_for_the_adjoint():
    adjoint = eb.FixedPointAdjoint(lx.GMRES(rtol=1e-10, atol=1e-10))

    def fn(stiffness):
        theta = {**pendulum.theta, "stiffness": stiffness}
        return objective(theta, pendulum, adjoint)

    value = jax.jit(jax.grad(fn))(pendulum.theta["stiffness"])
    value = value * derivatives("pendulum").directions["stiffness"]
    assert relative_error(value, derivatives("pendulum").exact["stiffness"]) < 1e-6


#
# Memory
#


@pytest.fixture
def optimised():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_memory(optimised):
    # Of a frozen gradient of one step: the matrix, its factor, a copy for each; and a
    # tenth of all for what is done in blocks.
    box = eb.Box([0.0, 0.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(0))
    interior, boundary = box.interior(700, key=keys[0]), box.boundary(100, key=keys[1])
    conditions = [
        eb.Condition(lambda u, x: -u.laplacian + u.value**3, interior, 1.0),
        eb.Condition(lambda u, x: u.value, boundary),
    ]

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(kernel):
        options = dict(adjoint=eb.FrozenAdjoint(), max_steps=1, throw=False)
        solution = eb.solve(eb.GaussianProcess(kernel), conditions, **options)
        return eb.ValidationResidual(interior)(solution)

    memory = loss.lower(eb.Gaussian(0.3)).compile().compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4.4 * 800**2 * 8
