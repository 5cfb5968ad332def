"""How often learning ends well, from starts spread over two decades.

    python benchmarks/experiments/robustness.py            # prints a table
    python benchmarks/experiments/robustness.py --keep     # writes the results kept

For each problem, seed of the points and start, each way is tried. A run has ended well
if its inner solve converged and its objective is at most ten times the smallest one
that was found with these points by any way from any start: no truth is needed to tell.
Errors are reported for the runs that ended well, and for all.
"""

import time

import burgers
import elliptic
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from reporting import errors, study


starts = (0.03, 0.1, 0.3, 1.0, 3.0)
problems = dict(
    elliptic=(elliptic, lambda start: eb.Gaussian(start)),
    burgers=(burgers, lambda start: eb.Gaussian([start, start])),
)


def full_steps(prior, conditions):
    # As the published code does it: thirty linearised solves without damping.
    nugget = lambda c: c.nugget
    conditions = [
        eqx.tree_at(nugget, c, jnp.array(1e-10), is_leaf=lambda x: x is None)
        for c in conditions
    ]
    solution = None
    for _ in range(30):
        options = dict(initial=solution, max_steps=1, throw=False)
        solution = eb.solve(prior, conditions, **options)
        if not np.all(np.isfinite(solution.weights)):
            break
    return solution


def ways():
    learn = lambda **options: lambda *stated: eb.learn(*stated, throw=False, **options)
    return {
        "untrained, full steps": lambda p, c, _: full_steps(p, c),
        "untrained": lambda p, c, _: eb.solve(p, c, throw=False),
        "frozen": learn(gradient="frozen", scale_search=False, steps=40),
        "implicit": learn(scale_search=False, steps=40),
        "frozen, scale search": learn(gradient="frozen", steps=40),
        "implicit, scale search": learn(steps=40),
    }


def run(name, n, seed, start, way):
    module, kernel = problems[name]
    conditions, objective = module.stated(jax.random.key(seed), n)
    prior = eb.GaussianProcess(kernel(start))
    began = time.perf_counter()
    found = ways()[way](prior, conditions, objective)
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


def table(rows):
    header = (
        "| problem | way | ended well | error if so: median | worst | error: median "
    )
    lines = [header + "| worst | seconds |", "|---" * 8 + "|"]
    best = {}
    for row in rows:
        case = row["problem"], row["seed"]
        if row["converged"] and np.isfinite(row["objective"]):
            best[case] = min(best.get(case, np.inf), row["objective"])
    for name in dict.fromkeys(row["problem"] for row in rows):
        for way in dict.fromkeys(row["way"] for row in rows):
            some = [r for r in rows if (r["problem"], r["way"]) == (name, way)]
            well = [
                r["converged"] and r["objective"] <= 10 * best[name, r["seed"]]
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
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows(names, n=300, seeds=5):
    for name in names:
        for way in ways():
            for seed in range(seeds):
                for start in starts:
                    yield run(name, n, seed, start, way)


if __name__ == "__main__":
    study("robustness", "problem", __doc__, problems, rows, table)
