"""One table over many kinds of equations, each against an exact solution.

    python benchmarks/experiments/breadth.py            # prints a table
    python benchmarks/experiments/breadth.py heat       # of some of them
    python benchmarks/experiments/breadth.py --keep     # writes the results kept here

Each is a few lines: an operator, an exact solution, and what holds on the boundary. The
source and boundary data follow from the exact solution. Coordinates are (x, ...), or
(t, x, ...) if there is a time. The kernel is Gaussian with a lengthscale for each
dimension, all one at the start. Each is run with five seeds of the points.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from common import value, values
from reporting import errors, markdown, study


pi = jnp.pi


class Equation(NamedTuple):
    kind: str
    operator: Callable
    exact: Any  # a function of a point, or a dictionary of them
    dim: int
    sides: tuple = ((None, value),)  # faces (all if None), and what is known there
    periodic: tuple[int, ...] = ()  # dimensions


def slope(axis):
    return lambda u, x: u.d(axis)


def robin(u, x):
    return u.value + u.d(0)


def faces(*axes, end="both"):
    ends = ("lower", "upper") if end == "both" else (end,)
    return [(axis, side) for axis in axes for side in ends]


early = faces(0, end="lower")


def determinant(u, x):
    return u.d(0, 0) * u.d(1, 1) - u.d(0, 1) ** 2


def stokes(w, x):
    u, v, p = w["u"], w["v"], w["p"]
    return [-u.laplacian + p.d(0), -v.laplacian + p.d(1), u.d(0) + v.d(1)]


def predator_prey(w, x):
    u, v = w["u"], w["v"]
    return [u.d(0) - u.value * (1 - v.value), v.d(0) - v.value * (u.value - 1)]


equations = dict(
    oscillator=Equation(
        "ordinary, second order, nonlinear; initial values",
        lambda u, x: u.d(0, 0) + jnp.sin(u.value),
        lambda x: jnp.sin(8 * x[0]) + x[0],
        1,
        ((early, value), (early, slope(0))),
    ),
    predator_prey=Equation(
        "system of two ordinary equations",
        predator_prey,
        {"u": lambda x: 1 + 0.5 * jnp.sin(4 * x[0]), "v": lambda x: jnp.exp(-x[0])},
        1,
        ((early, values),),
    ),
    beam=Equation(
        "fourth order, one dimension",
        lambda u, x: u.d(0, 0, 0, 0) + u.value**3,
        lambda x: jnp.sin(3 * pi * x[0]),
        1,
        ((None, value), (None, slope(0))),
    ),
    poisson=Equation(
        "elliptic, linear; Dirichlet",
        lambda u, x: -u.laplacian,
        lambda x: jnp.sin(2 * pi * x[0]) * jnp.sin(3 * pi * x[1]),
        2,
    ),
    mixed=Equation(
        "elliptic, mixed derivative, variable coefficient",
        lambda u, x: -u.d(0, 0) - u.d(1, 1) - x[0] * u.d(0, 1) + u.value**3,
        lambda x: jnp.sin(6 * x[0] + 4 * x[1]),
        2,
    ),
    neumann=Equation(
        "elliptic, nonlinear; Neumann and Dirichlet",
        lambda u, x: -u.laplacian + u.value**3,
        lambda x: jnp.cos(5 * x[0]) * jnp.sin(6 * x[1]),
        2,
        ((faces(0), slope(0)), (faces(1), value)),
    ),
    robin=Equation(
        "elliptic, nonlinear; Robin and Dirichlet",
        lambda u, x: -u.laplacian + jnp.exp(u.value),
        lambda x: jnp.sin(4 * x[0]) * jnp.cos(6 * x[1]),
        2,
        ((faces(0, end="upper"), robin), (faces(0, end="lower") + faces(1), value)),
    ),
    biharmonic=Equation(
        "fourth order, two dimensions",
        lambda u, x: u.d(0, 0, 0, 0) + 2 * u.d(0, 0, 1, 1) + u.d(1, 1, 1, 1),
        lambda x: jnp.sin(4 * x[0]) * jnp.sin(5 * x[1]),
        2,
        ((None, value), (faces(0), slope(0)), (faces(1), slope(1))),
    ),
    monge_ampere=Equation(
        "fully nonlinear: determinant and Laplacian",
        lambda u, x: determinant(u, x) + u.laplacian,
        lambda x: jnp.exp((x[0] ** 2 + x[1] ** 2) / 2),
        2,
    ),
    minimal_surface=Equation(
        "quasilinear elliptic",
        lambda u, x: (
            (1 + u.d(1) ** 2) * u.d(0, 0)
            - 2 * u.d(0) * u.d(1) * u.d(0, 1)
            + (1 + u.d(0) ** 2) * u.d(1, 1)
        ),
        lambda x: jnp.log(jnp.cos(x[0] - 0.5) / jnp.cos(x[1] - 0.5)),
        2,
    ),
    heat=Equation(
        "parabolic; periodic",
        lambda u, x: u.d(0) - 0.1 * u.d(1, 1),
        lambda x: jnp.exp(-0.4 * pi**2 * x[0]) * jnp.sin(2 * pi * x[1]),
        2,
        ((early, value),),
        (1,),
    ),
    fisher=Equation(
        "parabolic, nonlinear",
        lambda u, x: u.d(0) - u.d(1, 1) - u.value * (1 - u.value),
        lambda x: (1 + jnp.exp((x[1] - 5 * x[0] / 6**0.5) / 6**0.5)) ** -2.0,
        2,
        ((early + faces(1), value),),
    ),
    advection=Equation(
        "hyperbolic, first order; periodic",
        lambda u, x: u.d(0) + u.d(1),
        lambda x: jnp.exp(jnp.sin(2 * pi * (x[1] - x[0]))),
        2,
        ((early, value),),
        (1,),
    ),
    klein_gordon=Equation(
        "hyperbolic, second order, nonlinear",
        lambda u, x: u.d(0, 0) - u.d(1, 1) + u.value**3,
        lambda x: jnp.sin(7 * x[1]) * jnp.cos(6 * x[0]),
        2,
        ((early + faces(1), value), (early, slope(0))),
    ),
    korteweg_de_vries=Equation(
        "dispersive, third order",
        lambda u, x: u.d(0) + 6 * u.value * u.d(1) + u.d(1, 1, 1),
        lambda x: 2 / jnp.cosh(2 * (x[1] - 0.5) - 2 * x[0]) ** 2,
        2,
        ((early + faces(1), value), (faces(1, end="upper"), slope(1))),
    ),
    stokes=Equation(
        "system of three: velocities and pressure",
        stokes,
        {
            "u": lambda x: jnp.sin(3 * x[0]) * jnp.cos(3 * x[1]),
            "v": lambda x: -jnp.cos(3 * x[0]) * jnp.sin(3 * x[1]),
            "p": lambda x: jnp.cos(2 * x[0] + x[1]),
        },
        2,
        ((None, values),),
    ),
    poisson_3d=Equation(
        "elliptic, nonlinear, three dimensions",
        lambda u, x: -u.laplacian + u.value**3,
        lambda x: jnp.sin(4 * x[0]) * jnp.cos(2 * x[1] + 3 * x[2]),
        3,
    ),
    heat_4d=Equation(
        "parabolic, time and three dimensions",
        lambda u, x: u.d(0) - 0.1 * (u.d(1, 1) + u.d(2, 2) + u.d(3, 3)),
        lambda x: jnp.exp(-1.2 * x[0]) * jnp.sin(2 * (x[1] + x[2] + x[3])),
        4,
        ((early + faces(1, 2, 3), value),),
    ),
)


#
# What follows from these
#


def applied(operator, exact):
    """The function that an operator makes of the exact solution."""
    if isinstance(exact, dict):
        parts = tuple(exact.items())  # A function of a dictionary compiles each time.
        return lambda x: eb.apply(operator, dict(parts), x)
    return lambda x: eb.apply(operator, exact, x)


def kernel(equation):
    if not equation.periodic:
        return eb.Gaussian(jnp.ones(equation.dim))
    factors = [
        eb.Periodic(1.0, eb.Frozen(1.0)) if i in equation.periodic else eb.Gaussian(1.0)
        for i in range(equation.dim)
    ]
    one, *others = [eb.Subspace(factor, i) for i, factor in enumerate(factors)]
    for other in others:
        one = one * other
    return one


def run(name, seed=0, n=None):
    equation = equations[name]
    n = n or {1: 30, 2: 200, 3: 400, 4: 600}[equation.dim]
    keys = jax.random.split(jax.random.key(seed), 3 + len(equation.sides))
    box = eb.Box(jnp.zeros(equation.dim), jnp.ones(equation.dim))
    operator, exact = equation.operator, equation.exact
    conditions = [
        eb.Condition(operator, box.interior(n, key=keys[0]), applied(operator, exact))
    ]
    for (which, known), key in zip(equation.sides, keys[3:]):
        points = box.boundary(max(n // 2, 2), faces=which, key=key)
        conditions.append(eb.Condition(known, points, applied(known, exact)))
    objective = eb.ValidationResidual(box.interior(n, key=keys[1]))
    one = eb.GaussianProcess(kernel(equation))
    system = isinstance(exact, dict)
    prior = {unknown: one for unknown in exact} if system else one
    untrained = eb.solve(prior, conditions, throw=False)
    began = time.perf_counter()
    learned = eb.learn(prior, conditions, objective, throw=False)
    seconds = time.perf_counter() - began

    def compare(solution):
        points = box.interior(1000, key=keys[2])
        found = solution(points)
        functions = exact if system else {"u": exact}
        truth = {k: jax.vmap(f)(points) for k, f in functions.items()}
        return {k: ((found[k] if system else found), truth[k]) for k in truth}

    return dict(
        equation=name,
        seed=seed,
        kind=equation.kind,
        dim=equation.dim,
        conditions=sum(c.points.shape[0] for c in conditions),
        untrained=errors(compare(untrained)),
        learned=errors(compare(learned.solution)),
        converged=bool(learned.solution.result == eb.RESULTS.successful),
        seconds=round(seconds, 1),
    )


def table(rows):
    heads = ["equation", "kind", "dimensions", "points"]
    heads += ["untrained", "learned: median", "worst", "seconds"]
    lines = []
    for name in dict.fromkeys(row["equation"] for row in rows):
        some = [row for row in rows if row["equation"] == name]
        untrained, learned = [
            [max(each["relative"] for each in row[which].values()) for row in some]
            for which in ("untrained", "learned")
        ]
        error = np.nan_to_num([untrained, learned], nan=np.inf)
        cells = (
            name.replace("_", " "),
            some[0]["kind"],
            some[0]["dim"],
            some[0]["conditions"],
            *(f"{median:.1e}" for median in np.median(error, 1)),
            f"{np.max(error[1]):.1e}",
            # The first run also compiles.
            f"{np.median([row['seconds'] for row in some[1:] or some]):.0f}",
        )
        lines.append(cells)
    return markdown(heads, lines)


def rows(names, seeds=5):
    for name in names:
        for seed in range(seeds):
            yield run(name, seed)


if __name__ == "__main__":
    study("breadth", "equation", __doc__, equations, rows, table)
