"""The kernel learned for Burgers' equation at viscosity 0.02, reused at 0.002.

It fails, since the front is ten times as sharp there.
"""

import burgers
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from common import Published, Run, value


title = "Burgers, that kernel reused at 0.002"
published = Published({"u": (0.108, 2.7)})

viscosity = 0.002


def run(key, n=900):
    before = burgers.run(key, n)
    points, sides = before.learned.conditions
    conditions = [
        eb.Condition(burgers.Burgers(jnp.array(viscosity)), points.points),
        eb.Condition(value, sides.points, burgers.start),
    ]
    kernel = burgers.kernel(jax.random.split(key)[1])
    untrained = lambda: eb.solve(eb.GaussianProcess(kernel), conditions, throw=False)
    reused = eb.solve(before.learned.prior, conditions, throw=False)
    return Run(untrained, reused, before.learned)


def compare(solution):
    return burgers.compare(solution, viscosity)
