"""How often learning ends well, from starts spread over two decades.

    python benchmarks/experiments/robustness.py            # prints a table
    python benchmarks/experiments/robustness.py --keep     # writes the results kept

For each problem, seed and start, each way is tried. A run has ended well if its inner
solve converged and its objective is at most ten times the smallest one that was found
with these points by any way from any start, but for those that are next to zero: no
truth is needed to tell. Errors, the largest ones, are reported for the runs that ended
well, and for all.

Full steps are linearised solves without damping. Learning with them, and with frozen
gradients, is the way of the paper: one of them for each outer step. The nugget is 1e-10
as it is there, for all ways, since objectives depend on it.
"""

import dataclasses
import functools as ft
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import burgers
import elliptic
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from reporting import errors, markdown, study


class Problem(NamedTuple):
    module: Any
    kernel: Callable  # of the start, and of a key
    points: int
    steps: int
    starts: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)


def network(start, key):
    return eb.Gibbs(eb.LengthscaleNetwork(2, 2, scale=start, key=key))


problems = dict(
    elliptic=Problem(elliptic, lambda start, _: eb.Gaussian(start), 300, 40),
    burgers=Problem(burgers, lambda start, _: eb.Gaussian([start, start]), 300, 40),
    network=Problem(burgers, network, 300, 80, (0.03, 0.3, 3.0)),
)


def full_steps(prior, conditions):
    solution = None
    for _ in range(30):
        options = dict(initial=solution, max_steps=1, throw=False)
        solution = eb.solve(prior, conditions, **options)
        if not np.all(np.isfinite(solution.weights)):
            break
    return solution


def ways(steps):
    def learn(**options):
        return ft.partial(eb.learn, steps=steps, throw=False, **options)

    full = dict(gradient="frozen", max_inner_steps=1)
    return {
        "untrained, full steps": lambda prior, conditions, _: full_steps(
            prior, conditions
        ),
        "untrained": lambda prior, conditions, _: eb.solve(
            prior, conditions, throw=False
        ),
        "frozen, full steps": learn(scale_search=False, **full),
        "frozen": learn(scale_search=False, gradient="frozen"),
        "implicit": learn(scale_search=False),
        "frozen, full steps, scale search": learn(**full),
        "frozen, scale search": learn(gradient="frozen"),
        "implicit, scale search": learn(),
    }


def run(name, seed, start, way, n=None, steps=None):
    problem = problems[name]
    module, n = problem.module, n or problem.points
    points_key, network_key = jax.random.split(jax.random.key(seed))
    conditions, objective = module.stated(points_key, n)
    conditions = [dataclasses.replace(c, nugget=jnp.array(1e-10)) for c in conditions]
    prior = eb.GaussianProcess(problem.kernel(start, network_key))
    began = time.perf_counter()
    found = ways(steps or problem.steps)[way](prior, conditions, objective)
    solution = found.solution if isinstance(found, eb.Learned) else found
    value = float(objective(solution))
    seconds = time.perf_counter() - began
    change = float(solution.stats["change"])
    return dict(
        problem=name,
        points=n,
        seed=seed,
        start=start,
        way=way,
        converged=bool(solution.result == eb.RESULTS.successful) or change < 1e-6,
        objective=value,
        error=errors(module.compare(solution))["u"]["max"],
        seconds=round(seconds, 2),
    )


def _is_solution(row):
    # No objective is so small here but that of a function which is zero between the
    # points, and so satisfies Burgers' equation there. `learn` warns of it.
    return row["converged"] and 1e-9 < row["objective"] < np.inf


def table(rows):
    heads = ["problem", "way", "ended well", "error if so: median", "worst"]
    heads += ["error: median", "worst", "seconds"]
    lines, best = [], {}
    for row in filter(_is_solution, rows):
        case = row["problem"], row["seed"]
        best[case] = min(best.get(case, np.inf), row["objective"])
    for name in dict.fromkeys(row["problem"] for row in rows):
        for way in dict.fromkeys(row["way"] for row in rows):
            some = [r for r in rows if (r["problem"], r["way"]) == (name, way)]
            well = [
                _is_solution(r) and r["objective"] <= 10 * best[name, r["seed"]]
                for r in some
            ]
            error = np.nan_to_num([r["error"] for r in some], nan=np.inf)
            good = error[np.array(well)]
            cells = (
                name,
                way,
                f"{sum(well)} of {len(well)}",
                f"{np.median(good):.1e}" if len(good) else "",
                f"{np.max(good):.1e}" if len(good) else "",
                f"{np.median(error):.1e}",
                f"{np.max(error):.1e}",
                f"{np.median([r['seconds'] for r in some]):.1f}",
            )
            lines.append(cells)
    return markdown(heads, lines)


def rows(names, seeds=5):
    for name in names:
        for way in ways(problems[name].steps):
            for seed in range(seeds):
                for start in problems[name].starts:
                    yield run(name, seed, start, way)


if __name__ == "__main__":
    study("robustness", "problem", __doc__, problems, rows, table)
