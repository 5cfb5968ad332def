"""What matters? One choice at a time, the others as they are by default.

    python benchmarks/experiments/sensitivity.py            # prints a table
    python benchmarks/experiments/sensitivity.py nugget     # of some of the choices
    python benchmarks/experiments/sensitivity.py --keep     # writes the results kept

The problems are the elliptic one with a Gaussian kernel, and Burgers' equation and the
eikonal one with a network, all at 300 + 100 points, but for the stages. Each choice is
run with five seeds of points and networks.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import burgers
import deep_burgers
import eikonal
import elliptic
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import scipy.stats
from reporting import errors, markdown, study


class Problem(NamedTuple):
    module: Any
    box: eb.Box
    kernel: Callable
    steps: int


def network(key, scale=0.25, out=2, width=50, depth=2):
    return eb.Gibbs(eb.LengthscaleNetwork(2, out, width, depth, scale, key=key))


problems = dict(
    elliptic=Problem(elliptic, elliptic.square, lambda key: eb.Gaussian(0.3), 60),
    burgers=Problem(burgers, burgers.space_time, network, 150),
    eikonal=Problem(eikonal, eikonal.square, eikonal.kernel, 150),
)


#
# Choices: each changes what `learn` is called with
#


class Stated(NamedTuple):
    kernel: eb.AbstractKernel
    conditions: list[eb.Condition]
    objective: eb.ValidationResidual
    options: dict[str, Any]


def kernel(make):
    return lambda stated, key: stated._replace(kernel=make(key))


def nugget(value):
    def change(stated, key):
        new = jnp.array(value) if isinstance(value, float) else value
        # Of the equation. What holds at the boundary is imposed as well as possible.
        equation, *others = stated.conditions
        equation = dataclasses.replace(equation, nugget=new)
        return stated._replace(conditions=[equation, *others])

    return change


def validation(points=None, weight=None):
    def change(stated, key):
        old = stated.objective
        chosen = old.points if points is None else points(key)
        kept = old.misfit_weight if weight is None else weight
        objective = eb.ValidationResidual(chosen, misfit_weight=kept)
        return stated._replace(objective=objective)

    return change


def option(**new):
    return lambda stated, key: stated._replace(options=stated.options | new)


def with_network(width, depth):
    # With the default's optimiser also where it would be Adam.
    def change(stated, key):
        bounded = eb.BoundedBFGS(1e-5, 1e-5, max_length=0.3)
        options = stated.options | dict(optimiser=bounded)
        kernel = network(key, width=width, depth=depth)
        return stated._replace(kernel=kernel, options=options)

    return change


def three_times_the_points(stated, key):
    conditions, objective = burgers.stated(key, 3 * len(stated.objective.points))
    return stated._replace(conditions=conditions, objective=objective)


def after_fewer(stated, key):
    kernel, *problem, options = stated
    first = eb.learn(eb.GaussianProcess(kernel), *problem, **options)
    options = options | dict(scale_search=False)
    learned = stated._replace(kernel=first.prior.kernel, options=options)
    return three_times_the_points(learned, key)


def choices(problem):
    default, box = option(), problem.box
    some = lambda n, method="sobol": validation(
        lambda key: box.interior(n, key=key, method=method)
    )
    kernels = {
        "Gaussian": kernel(lambda key: eb.Gaussian(0.3)),
        "Gaussian, per dimension": kernel(lambda key: eb.Gaussian([0.3, 0.3])),
        "Matern 9/2": kernel(lambda key: eb.Matern([0.3, 0.3], 4.5)),
        "Matern 13/2": kernel(lambda key: eb.Matern([0.3, 0.3], 6.5)),
        "rational quadratic": kernel(lambda key: eb.RationalQuadratic([0.3, 0.3])),
        "Gibbs, one length": kernel(lambda key: network(key, out="scalar")),
        "Gibbs, per dimension": kernel(network),
        "deep": kernel(deep_burgers.kernel),
    }
    nuggets = {
        "automatic": nugget(None),
        "1e-12": nugget(1e-12),
        "1e-10": nugget(1e-10),
        "1e-8": nugget(1e-8),
        "1e-6": nugget(1e-6),
        "learned, from 1e-4": nugget(eb.Positive(1e-4)),
    }
    points = {
        "300, Sobol": default,
        "50": some(50),
        "100": some(100),
        "1000": some(1000),
        "300, random": some(300, "random"),
        "17 x 17, grid": some(17, "grid"),
    }
    misfits = {f"{w:g}": validation(weight=w) for w in (1e4, 1.0, 0.0)}
    optimisers = {
        "BoundedBFGS": default,
        "Adam, 1e-3": option(optimiser=optax.adam(1e-3)),
        "Adam, 1e-2": option(optimiser=optax.adam(1e-2)),
        "BFGS": option(optimiser=optx.BFGS(1e-5, 1e-5)),
        "frozen gradient": option(gradient="frozen"),
        "without scale search": option(scale_search=False),
    }
    networks = {
        f"{depth} x {width}": with_network(width, depth)
        for depth, width in ((2, 50), (1, 50), (3, 50), (2, 10), (2, 25), (2, 100))
    }
    found = dict(kernel=kernels, nugget=nuggets, misfit=misfits)
    if problem.module is not eikonal:
        found |= dict(optimiser=optimisers, validation=points)
    if problem.module is elliptic:
        levenberg = optx.LevenbergMarquardt(1e-3, 1e-3)
        optimisers["Levenberg-Marquardt"] = option(optimiser=levenberg)
    if problem.module is burgers:
        found["network"] = networks
        found["stages"] = {
            "900 + 300 at once": three_times_the_points,
            "300 + 100, then 900 + 300": after_fewer,
        }
    return found


kinds = ("kernel", "nugget", "optimiser", "validation", "misfit", "network", "stages")


#
# Running
#


def run(name, kind, choice, seed, n=300, steps=None):
    problem = problems[name]
    points_key, network_key, other_key = jax.random.split(jax.random.key(seed), 3)
    options = dict(steps=steps or problem.steps, throw=False)
    statement = problem.module.stated(points_key, n)
    stated = Stated(problem.kernel(network_key), *statement, options)
    key = network_key if kind in ("kernel", "network") else other_key
    began = time.perf_counter()
    stated = choices(problem)[kind][choice](stated, key)
    prior = eb.GaussianProcess(stated.kernel)
    learned = eb.learn(prior, stated.conditions, stated.objective, **stated.options)
    return dict(
        problem=name,
        kind=kind,
        choice=choice,
        seed=seed,
        error=errors(problem.module.compare(learned.solution))["u"],
        objective=float(learned.objective),
        converged=bool(learned.solution.result == eb.RESULTS.successful),
        steps=len(learned.history["objective"]),
        seconds=round(time.perf_counter() - began, 1),
    )


def table(rows):
    return f"{_errors(rows)}\n\n{_judgement(rows)}"


def _errors(rows):
    names = list(dict.fromkeys(row["problem"] for row in rows))
    heads = [head for name in names for head in (name, "worst", "seconds")]
    lines = []
    for kind, choice in dict.fromkeys((row["kind"], row["choice"]) for row in rows):
        cells = [f"{kind}: {choice}"]
        for name in names:
            case = (name, kind, choice)
            some = [r for r in rows if (r["problem"], r["kind"], r["choice"]) == case]
            if not some:
                cells += [""] * 3
                continue
            error = np.nan_to_num([r["error"]["rms"] for r in some], nan=np.inf)
            cells += [f"{np.median(error):.1e}", f"{max(error):.1e}"]
            # The first run also compiles.
            seconds = [r["seconds"] for r in some if r["seed"] > 0]
            cells.append(f"{np.median(seconds):.0f}" if seconds else "")
        lines.append(cells)
    return markdown(["", *heads], lines)


def _judgement(rows):
    # How well the objective tells errors apart, of choices that do not change it.
    lines = []
    for kind in ("kernel", "nugget", "optimiser", "network"):
        for name in problems:
            some = [r for r in rows if (r["problem"], r["kind"]) == (name, kind)]
            ranks, losses = [], []
            for seed in sorted({row["seed"] for row in some}):
                each = [row for row in some if row["seed"] == seed]
                judged = np.nan_to_num([r["objective"] for r in each], nan=np.inf)
                error = [row["error"]["rms"] for row in each]
                ranks.append(scipy.stats.spearmanr(judged, error).statistic)
                losses.append(error[np.argmin(judged)] / min(error))
            if some:
                of = [ranks, losses]
                middle, worst = np.median(of, 1), (min(ranks), max(losses))
                cells = [f"{x:.2g}" for pair in zip(middle, worst) for x in pair]
                lines.append([kind, name, *cells])
    heads = ["among", "problem", "rank correlation", "worst"]
    return markdown([*heads, "error of the one chosen / smallest", "worst"], lines)


def rows(kinds, seeds=5):
    for kind in kinds:
        for name, problem in problems.items():
            for choice in choices(problem).get(kind, ()):
                for seed in range(seeds):
                    yield run(name, kind, choice, seed)
                jax.clear_caches()  # Programs take memory, and these are many.


if __name__ == "__main__":
    study("sensitivity", "kind", __doc__, kinds, rows, table)
