"""Six dimensions: what kernels with structure are worth.

    python benchmarks/experiments/dimensions.py            # prints a table
    python benchmarks/experiments/dimensions.py additive   # of some kernels
    python benchmarks/experiments/dimensions.py --keep     # writes the results here

The equation is -Lap u + u^3 = f on the unit cube, with values on its boundary. Of two
exact solutions one is a sum of functions of one coordinate each, and the other is not.
"""

import functools as ft
import operator
import time

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from breadth import applied
from common import value
from reporting import errors, markdown, study


dim = 6
cube = eb.Box(jnp.zeros(dim), jnp.ones(dim))
rates = jnp.linspace(1.0, 6.0, dim)


def one():
    return eb.Gaussian(1.0)


kernels = dict(
    gaussian=("Gaussian, one lengthscale", lambda: eb.Scaled(one(), 1.0)),
    product=(
        "product: a lengthscale for each dimension",
        lambda: eb.Scaled(eb.Gaussian(jnp.ones(dim)), 1.0),
    ),
    additive=(
        "sum: a lengthscale and a weight for each dimension",
        lambda: ft.reduce(
            operator.add,
            [eb.Scaled(eb.Subspace(one(), i), 1.0) for i in range(dim)],
        ),
    ),
)
solutions = {
    "a sum": lambda x: jnp.sum(jnp.sin(rates * x)),
    "no sum": lambda x: jnp.sin(jnp.sum(rates * x) / 4),
}


def equation(u, x):
    return -u.laplacian + u.value**3


def run(name, seed=0, n=200, steps=40, solutions=solutions):
    kind, kernel = kernels[name]
    keys = jax.random.split(jax.random.key(seed), 4)
    interior, boundary = cube.interior(n, key=keys[0]), cube.boundary(n, key=keys[1])
    objective = eb.ValidationResidual(cube.interior(n, key=keys[2]))
    points = cube.interior(1000, key=keys[3])
    row = dict(kernel=name, kind=kind, seed=seed, conditions=2 * n)
    for what, exact in solutions.items():
        conditions = [
            eb.Condition(equation, interior, applied(equation, exact)),
            eb.Condition(value, boundary, exact),
        ]
        truth = jax.vmap(exact)(points)
        prior = eb.GaussianProcess(kernel())
        untrained = eb.solve(prior, conditions, throw=False)
        began = time.perf_counter()
        learned = eb.learn(prior, conditions, objective, steps=steps, throw=False)
        row[what] = dict(
            untrained=errors({"u": (untrained(points), truth)})["u"],
            learned=errors({"u": (learned.solution(points), truth)})["u"],
            seconds=round(time.perf_counter() - began, 1),
        )
    return row


def rows(names, seeds=5):
    for name in names:
        for seed in range(seeds):
            yield run(name, seed)
            jax.clear_caches()


def table(rows):
    columns = [(what, when) for what in solutions for when in ("untrained", "learned")]
    heads = [f"{what}: {when}" for what, when in columns]
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        cells = []
        for what, when in columns:
            error = np.nan_to_num([r[what][when]["relative"] for r in some], nan=np.inf)
            cells.append(f"{np.median(error):.1e} ({np.max(error):.1e})")
        seconds = [sum(row[what]["seconds"] for what in solutions) for row in some]
        lines.append([kind, *cells, f"{np.median(seconds):.0f}"])
    return markdown(["kernel", *heads, "seconds"], lines)


if __name__ == "__main__":
    study("dimensions", "kernel", __doc__, kernels, rows, table)
