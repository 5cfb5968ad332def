"""Inverse problems: how well, with which objective, and are the error bars right?

    python benchmarks/experiments/inverse.py                  # prints a table
    python benchmarks/experiments/inverse.py darcy heat       # some of the problems
    python benchmarks/experiments/inverse.py --keep           # writes the results kept

Ten seeds each, of points and of noise. Bars include what is left open of the
hyperparameters where the objective is an evidence. `published` is the way of
arXiv:2510.05568, re-created: kernels of unit variance, nuggets of 1e-5, and an
objective that sees the equation at other points and the data that were fitted.
`the truth` is no way to learn: it looks for the smallest errors.
"""

import time

import darcy
import eqx_bilevel as eb
import few_data
import heat
import jax
import jax.numpy as jnp
import numpy as np
import source
import viscosity
from reporting import markdown, study


problems = dict(
    darcy=darcy, few_data=few_data, heat=heat, viscosity=viscosity, source=source
)

#
# Ways to learn
#


def by(objective):
    def way(module, key, **size):
        stated = module.prior(), module.stated(key, **size)
        full = objective
        if not isinstance(objective, eb.AbstractLeastSquaresObjective):
            full = objective + eb.NegativeLogHyperprior(*stated)
        return eb.learn(*stated, full, throw=False), full

    return way


def by_held_out(module, key, **size):
    *others, data = module.stated(key, **size)
    data, objective = eb.hold_out(data, key=jax.random.fold_in(key, 1))
    stated = module.prior(), [*others, data]
    return eb.learn(*stated, objective, throw=False), objective


def by_truth(module, key, **size):
    # What no one can do: the hyperparameters with the smallest errors.
    where = jnp.asarray(module.where)

    def errors(solution):
        found = solution(where)
        relative = [
            jnp.linalg.norm(found[name] - truth) / jnp.linalg.norm(truth)
            for name, truth in module.fields.items()
        ]
        return jnp.sum(jnp.log(jnp.stack(relative)))

    stated = module.prior(), module.stated(key, **size)
    return eb.learn(*stated, eb.Objective(errors), throw=False), None


def published(module, key, **size):
    # Of Darcy flow.
    declared, nugget = 1e-3, 1e-5
    points = darcy.square.interior(120, key=jax.random.fold_in(key, 1))
    # Its unknowns have a nugget themselves, which comes on top of the noise.
    both = float(np.hypot(declared, nugget**0.5))
    conditions = module.stated(key, declared=both, nugget=nugget, **size)
    prior = {name: eb.GaussianProcess(eb.Gaussian(1.0)) for name in ("u", "a")}

    def misfit(solution):
        # What the data are off by: the share of the residual that is not the nugget's.
        off = solution.residuals()["data"] * (declared / both) ** 2
        return 0.5 * jnp.sum((off / declared) ** 2)

    equation = eb.ValidationResidual(points, "balance", misfit_weight=0)
    objective = equation + eb.Objective(misfit)
    options = dict(gradient="frozen", throw=False)
    return eb.learn(prior, conditions, objective, **options), None  # No density.


ways = {
    "evidence": by(eb.NegativeLogEvidence("data")),
    "predictive density": by(eb.NegativeLogPredictive("data")),
    "leave-one-out": by(eb.CrossValidation("data")),
    "five folds": by(eb.CrossValidation("data", 5)),
    "held out": by_held_out,
    "evidence of all": by(eb.NegativeLogEvidence()),
    "published": published,
    "the truth": by_truth,
}
# The objectives are compared on one problem.
ways_of = lambda name: list(ways) if name == "darcy" else ["evidence"]


#
# Running
#


def posterior(learned, objective):
    # With the hyperparameters' share, if they are determined.
    squares = isinstance(objective, eb.AbstractLeastSquaresObjective)
    if objective is None or squares:
        return None
    try:
        return eb.laplace(learned, objective)
    except ValueError:
        return None


def run(name, way, seed, **size):
    module = problems[name]
    began = time.perf_counter()
    learned, objective = ways[way](module, jax.random.key(seed), **size)
    seconds = time.perf_counter() - began
    solution, where = learned.solution, jnp.asarray(module.where)
    spread = posterior(learned, objective)
    found = solution(where)
    std = solution.std(where) if spread is None else spread.std(where)
    single = not isinstance(found, dict)
    found, std = ({"u": a} if single else a for a in (found, std))
    row = dict(problem=name, way=way, seed=seed, seconds=round(seconds, 1))
    row["converged"] = bool(solution.result == eb.RESULTS.successful)
    row["bars"] = "conditional" if spread is None else "whole"
    row["squared_errors"] = float(jnp.mean(solution.standardised_errors("data") ** 2))
    noise = eb.unwrap(learned.conditions[-1].noise)
    row["noise"] = float(noise) / module.noise
    row["fields"] = {}
    for each, truth in module.fields.items():
        error = np.asarray(found[each]) - truth
        inside = np.abs(error) <= 1.645 * np.asarray(std[each])
        row["fields"][each] = dict(
            relative=float(np.linalg.norm(error) / np.linalg.norm(truth)),
            covered=float(np.mean(inside)),
            std=float(np.mean(std[each]) / np.sqrt(np.mean(truth**2))),
        )
    row["numbers"] = {}
    for each, truth in module.numbers.items():
        if each in found:
            number, bar = float(found[each][0]), float(std[each][0])
        else:
            values = module.read(*eb.unwrap((learned.prior, learned.conditions)))
            number, bar = float(values[each]), np.nan
            if spread is not None:
                bar = float(spread.std_of(module.read)[each])
        best = module.most_likely(learned.conditions[-1])[each]
        row["numbers"][each] = dict(
            error=number - truth, std=bar, most_likely=best - truth
        )
    return row


def table(rows):
    heads = ["problem", "objective", "unknown", "error: median", "worst"]
    heads += ["most likely: median", "covered", "bar", "noise", "runs converged"]
    lines = []
    for name, way in dict.fromkeys((row["problem"], row["way"]) for row in rows):
        some = [r for r in rows if (r["problem"], r["way"]) == (name, way)]
        for i, each in enumerate([*some[0]["fields"], *some[0]["numbers"]]):
            numbers = [r["numbers"].get(each) for r in some]
            if numbers[0] is None:
                fields = [r["fields"][each] for r in some]
                error = [f["relative"] for f in fields]
                best = ""
                covered = f"{np.mean([f['covered'] for f in fields]):.0%} (of 90%)"
                bar = np.median([f["std"] for f in fields])
            else:
                error = [abs(n["error"]) for n in numbers]
                best = f"{np.median([abs(n['most_likely']) for n in numbers]):.1e}"
                inside = [abs(n["error"]) <= 1.96 * n["std"] for n in numbers]
                covered = f"{sum(inside)} of {len(inside)} (of 95%)"
                bar = np.median([n["std"] for n in numbers])
            error = np.nan_to_num(error, nan=np.inf)
            first = i == 0
            converged = sum(r["converged"] for r in some)
            cells = (
                problems[name].title if first else "",
                way if first else "",
                each.replace("_", " "),
                f"{np.median(error):.1e}",
                f"{np.max(error):.1e}",
                best,
                covered,
                f"{bar:.1e}",
                f"{np.median([r['noise'] for r in some]):.2f}" if first else "",
                f"{converged} of {len(some)}" if first else "",
                f"{np.median([r['seconds'] for r in some]):.0f}" if first else "",
            )
            lines.append(cells)
    return markdown([*heads, "seconds"], lines)


def rows(names, seeds=10):
    for name in names:
        for way in ways_of(name):
            for seed in range(seeds):
                yield run(name, way, seed)
            jax.clear_caches()


if __name__ == "__main__":
    study("inverse", "problem", __doc__, problems, rows, table)
