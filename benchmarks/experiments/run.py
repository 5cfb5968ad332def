"""Runs the experiments of arXiv:2510.05568, and prints a table.

    python benchmarks/experiments/run.py                      # all, which takes hours
    python benchmarks/experiments/run.py burgers --seeds 5
    python benchmarks/experiments/run.py burgers --keep --add   # seeds that are missing
    python benchmarks/experiments/run.py --table              # of the results kept here

Each seed has points and initial networks of its own. Every run is one line of JSON on
standard output; `--keep` puts them into the results of the repository, in the place of
those of the same seed.
"""

import functools as ft
import importlib
import json
import sys
import time

import equinox as eqx
import eqx_bilevel as eb
import jax
import numpy as np
from reporting import (
    command_line,
    environment,
    errors,
    markdown,
    parsed,
    read,
    stamp,
    write,
)


names = (
    "elliptic",
    "elliptic_nugget",
    "additive",
    "ten_parameters",
    "schroedinger",
    "gray_scott",
    "gray_scott_reuse",
    "gray_scott_anew",
    "gray_scott_published",
    "eikonal",
    "burgers",
    "burgers_reuse",
    "burgers_front",
    "burgers_small",
    "allen_cahn",
    "deep_burgers",
    "deep_eikonal",
)


#
# Running
#


def run(name, seed, **size):
    module = importlib.import_module(name)
    began = time.perf_counter()
    found = module.run(jax.random.key(seed), **size)
    solution, learned = found.solution, found.learned
    jax.block_until_ready(eqx.filter(solution, eqx.is_array))
    seconds = time.perf_counter() - began
    # One, or several that were solved at once or one by one.
    is_solution = lambda x: isinstance(x, eb.Solution)
    each = jax.tree.leaves(solution, is_leaf=is_solution)
    nuggets = [s.stats["jitter"] for s in each]
    nuggets += [eb.unwrap(c.nugget) for c in learned.conditions if c.nugget is not None]
    return dict(
        experiment=name,
        seed=seed,
        learned=errors(module.compare(solution)),
        untrained=errors(module.compare(found.untrained())),
        converged=all(np.all(s.result == eb.RESULTS.successful) for s in each),
        objective=float(learned.objective),
        steps=len(learned.history["best"]),
        nugget=float(max(map(np.max, nuggets))),
        **_hyperparameters(learned.prior),
        seconds=round(seconds, 1),
        **stamp(),
    )


def _hyperparameters(prior):
    # The weights of a network say nothing by themselves.
    numbers = eqx.filter(eb.unwrap(prior), eqx.is_inexact_array)
    if sum(x.size for x in jax.tree.leaves(numbers)) > 50:
        return {}
    name = ft.partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = jax.tree_util.tree_leaves_with_path(numbers)
    return dict(hyperparameters={name(path): x.tolist() for path, x in leaves})


def keep(name, rows):
    kept = read("experiments")
    command = f"python benchmarks/experiments/run.py {name} --keep"
    runs = {row["seed"]: row for row in kept.get(name, {}).get("runs", []) + rows}
    runs = [runs[seed] for seed in sorted(runs)]
    kept[name] = dict(written=environment(), command=command, runs=runs)
    ordered = {name: kept[name] for name in names if name in kept}
    write("experiments", ordered, table(ordered))


#
# The table
#


def table(kept):
    """Of the results kept, in Markdown: medians over seeds, and the worst of them."""
    heads = ["experiment", "unknown", "untrained", "learned: median", "worst"]
    heads += ["published", "seconds: first", "others", "published"]
    lines = []
    for name, entry in kept.items():
        module, runs = importlib.import_module(name), entry["runs"]
        seconds = [row["seconds"] for row in runs]
        for i, unknown in enumerate(runs[0]["learned"]):
            pairs = {
                which: np.array(
                    [[row[which][unknown][k] for k in ("rms", "max")] for row in runs]
                )
                for which in ("untrained", "learned")
            }
            learned = pairs["learned"]
            ours = (
                _pair(np.median(pairs["untrained"], axis=0)),
                _pair(np.median(learned, axis=0)),
                _pair(np.max(learned, axis=0)),
                _pair(module.published.errors.get(unknown, (None, None))),
            )
            times = ("", "", "", "")
            if i == 0:
                others = f"{np.median(seconds[1:]):.0f}" if seconds[1:] else ""
                theirs = module.published.seconds
                times = (
                    f"{seconds[0]:.0f}",
                    others,
                    "" if theirs is None else f"{theirs:.0f}",
                    f"{sum(row['converged'] for row in runs)} of {len(runs)}",
                )
            lines.append((module.title if i == 0 else "", unknown, *ours, *times))
    return markdown([*heads, "last solve converged"], lines)


def _pair(errors):
    shown = ["" if e is None else f"{e:.1e}" for e in errors]
    return " / ".join(shown) if any(shown) else ""


if __name__ == "__main__":
    parser = command_line(__doc__, names)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--add", action="store_true", help="only those not kept yet")
    parser.add_argument("--table", action="store_true", help="of the results kept")
    arguments = parsed(parser, names)
    if arguments.seeds < 1:
        parser.error(f"--seeds must be positive, got {arguments.seeds}")
    if arguments.table:
        print(table(read("experiments")))
    else:
        for name in arguments.names or names:
            kept = read("experiments").get(name, {}) if arguments.add else {}
            rows = kept.get("runs", [])
            there = {row["seed"] for row in rows}
            for seed in sorted(set(range(arguments.seeds)) - there):
                rows.append(run(name, seed))
                print(json.dumps(rows[-1]), flush=True)
                if arguments.keep:  # Each time: these take long.
                    keep(name, rows)
            print(table({name: dict(runs=rows)}), file=sys.stderr, flush=True)
