"""A solution that was found before, as a differentiable function of hyperparameters.

What an outer objective will read off the solution is part of what is differentiated
implicitly. Everything that depends on the kernel is then differentiated at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, PyTree, Scalar

from ._adjoint import FrozenAdjoint, without_gradient
from ._condition import Condition
from ._gauss_newton import Root
from ._linearised import flat, join, prior_z, separate, split
from ._problem import Problem
from ._solution import Reading, Solution
from ._solve import of_use, root_residual, solution_at
from ._system import AbstractSystem


class _Found(NamedTuple):
    # Of the state of `GaussNewton`, what adjoints use.
    factor: PyTree
    jitter: Float[Array, ""]
    change: Float[Array, ""]


class _AlreadyFound(optx.AbstractLeastSquaresSolver):
    # Takes no step: where it starts is the solution.
    system: AbstractSystem
    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable[[PyTree], Scalar] = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return options["found"]

    def step(self, fn, y, args, options, state, tags):
        return y, state, None

    def terminate(self, fn, y, args, options, state, tags):
        return jnp.array(True), options["result"]

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {"state": state}


def differentiable(
    prior: Any,
    conditions: list[Condition],
    whole: Problem,
    found: Solution,
    adjoint: optx.AbstractAdjoint,
    points: Sequence[Array],
    readings: Sequence[Reading],
) -> Solution:
    # `found` for these arguments, with derivatives, and read at these points already,
    # which are in `whole`. `readings`: what is known of `found` there, if it is known.
    found = without_gradient(found)
    useful = of_use(found.result, found.stats["change"])
    weights = jnp.where(useful, found.weights, 0.0)
    problem = whole.conditions
    read = without_gradient(whole.readings)
    if readings:
        at_points = [readings[r.position].values for r in read.rows]
        values = without_gradient(jnp.where(useful, flat(at_points), 0.0))
    elif points:
        values = prior_z(read) + found._system.read(
            without_gradient(whole), found._linearised, found._factor, weights, None
        )
    else:
        values = found._z[:0]
    singular, successful = optx.RESULTS.singular, optx.RESULTS.successful
    jitter, change = found.stats["jitter"], found.stats["change"]
    sol = optx.least_squares(
        root_residual,
        _AlreadyFound(system=found._system),
        Root(join(whole, found._z, values), weights),
        whole,
        options=dict(
            found=_Found(found._factor, jitter, change),
            result=optx.RESULTS.where(useful, successful, singular),  # pyright: ignore
        ),
        adjoint=FrozenAdjoint() if problem.z_size == 0 else adjoint,
        max_steps=None,
        throw=False,
    )
    z, values = separate(whole, sol.value.z)
    solution = solution_at(
        prior,
        conditions,
        problem,
        Root(z, sol.value.weights),
        found._next_z,
        found._factor,
        jitter,
        found._system,
        found.result,
        found.stats,
    )
    known = [
        Reading(points[r.position], r.trace.jets, jets)
        for r, jets in zip(read.rows, split(read, values))
    ]
    return dataclasses.replace(solution, _readings=tuple(known))
