import functools as ft
from typing import NamedTuple

import eqx_bilevel as eb
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest

from .helpers import (
    additive,
    burgers,
    central_difference,
    dot,
    moved,
    pendulum,
    random_direction,
    relative_error,
    truth_of,
)


# The spectral radius is 0.4 to 0.7 in all of them.
examples = dict(additive=additive, burgers=burgers, pendulum=pendulum)

tight = eb.GaussNewton(rtol=1e-13, atol=1e-13)
implicit, frozen = eb.FixedPointAdjoint(), eb.FrozenAdjoint()


def objective(theta, example, adjoint, solver=tight):
    solution = eb.solve(*example.make(theta), solver, adjoint=adjoint)
    judge = eb.ValidationResidual(example.validation, target=example.targets)
    return judge(solution)


class Derivatives(NamedTuple):
    directions: dict  # one for each kind of hyperparameter
    implicit: dict
    frozen: dict
    forward: dict  # along the directions
    exact: dict  # by differences of the oracle
    fixed: dict  # likewise, with the point of linearisation fixed


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
        _, w_fixed = oracle.linearised(stated, y)
        return jnp.stack([exact, example.judge(oracle, stated, y, w_fixed)])

    @eqx.filter_jit
    def forward(theta, direction):
        fn = lambda theta: objective(theta, example, implicit)
        return eqx.filter_jvp(fn, (theta,), (direction,))[1]

    directions, along, exact, fixed = {}, {}, {}, {}
    for i, kind in enumerate(theta):
        only = random_direction(theta[kind], jax.random.key(i))
        directions[kind] = only
        zero = jax.tree.map(jnp.zeros_like, eqx.filter(theta, eqx.is_inexact_array))
        direction = {**zero, kind: only}
        along[kind] = forward(theta, direction)
        at = lambda step, d=direction: truths(moved(theta, d, step))
        exact[kind], fixed[kind] = central_difference(at)
    grad = eqx.filter_jit(eqx.filter_grad(objective))
    return Derivatives(
        directions,
        grad(theta, example, implicit),
        grad(theta, example, frozen),
        along,
        exact,
        fixed,
    )


kinds = [(name, kind) for name, example in examples.items() for kind in example.theta]


@pytest.mark.parametrize("name, kind", kinds)
def test_implicit_gradient(name, kind):
    found = derivatives(name)
    value = dot(found.implicit[kind], found.directions[kind])
    assert relative_error(value, found.exact[kind]) < 1e-6


@pytest.mark.parametrize("name, kind", kinds)
def test_forward_mode(name, kind):
    found = derivatives(name)
    assert relative_error(found.forward[kind], found.exact[kind]) < 1e-6


@pytest.mark.parametrize("name, kind", kinds)
def test_frozen_gradient(name, kind):
    found = derivatives(name)
    value = dot(found.frozen[kind], found.directions[kind])
    assert relative_error(value, found.fixed[kind]) < 1e-6
