"""Runs the experiments of arXiv:2510.05568, and prints a table.

    python benchmarks/experiments/run.py                      # all, which takes hours
    python benchmarks/experiments/run.py burgers --seeds 5
    python benchmarks/experiments/run.py --table              # of the results kept here

Each seed has points and initial networks of its own. Every run is one line of JSON on
standard output; `--keep` puts them into the results of the repository.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import equinox as eqx
import eqx_bilevel as eb
import jax
import numpy as np


names = (
    "elliptic",
    "additive",
    "ten_parameters",
    "schroedinger",
    "gray_scott",
    "gray_scott_reuse",
    "gray_scott_anew",
    "eikonal",
    "burgers",
    "burgers_reuse",
    "deep_burgers",
    "deep_eikonal",
)
results = pathlib.Path(__file__).parents[1] / "results"


#
# Running
#


def errors(pairs):
    rows = {}
    for name, (found, truth) in pairs.items():
        difference = np.asarray(found) - np.asarray(truth)
        rms = np.sqrt(np.mean(difference**2))
        rows[name] = dict(
            rms=float(rms),
            max=float(np.max(np.abs(difference))),
            relative=float(rms / np.sqrt(np.mean(np.asarray(truth) ** 2))),
        )
    return rows


def converged(solutions) -> bool:
    is_solution = lambda x: isinstance(x, eb.Solution)
    each = jax.tree.leaves(solutions, is_leaf=is_solution)
    return all(np.all(one.result == eb.RESULTS.successful) for one in each)


def nugget(solutions) -> float:
    is_solution = lambda x: isinstance(x, eb.Solution)
    each = jax.tree.leaves(solutions, is_leaf=is_solution)
    return float(max(np.max(one.stats["jitter"]) for one in each))


def run(name, seed, **size):
    module = importlib.import_module(name)
    began = time.perf_counter()
    found = module.run(jax.random.key(seed), **size)
    solution, learned = found.solution, found.learned
    jax.block_until_ready(eqx.filter(solution, eqx.is_array))
    seconds = time.perf_counter() - began
    return dict(
        experiment=name,
        seed=seed,
        learned=errors(module.compare(solution)),
        untrained=errors(module.compare(found.untrained())),
        converged=converged(solution),
        objective=float(learned.objective),
        steps=len(learned.history["objective"]),
        nugget=nugget(solution),
        seconds=round(seconds, 1),
    )


def environment():
    packages = ("jax", "equinox", "optimistix", "lineax", "numpy", "scipy")
    with open("/proc/cpuinfo") as file:
        lines = [line for line in file if line.startswith("model name")]
    return dict(
        date=str(datetime.date.today()),
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in packages},
        hardware=lines[0].split(":")[1].strip(),
        cores=len(os.sched_getaffinity(0)),
    )


def write(name, kept, table):
    """Results as JSON, and the table that the documentation shows."""
    (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (results / f"{name}.md").write_text(table + "\n")


def read(name):
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(rows):
    kept = read("experiments")
    for name in dict.fromkeys(row["experiment"] for row in rows):
        kept[name] = dict(
            **environment(),
            command=f"python benchmarks/experiments/run.py {name} --keep",
            runs=[row for row in rows if row["experiment"] == name],
        )
    ordered = {name: kept[name] for name in names if name in kept}
    write("experiments", ordered, table(ordered))


#
# The table
#


def table(kept):
    """Of the results kept, in Markdown: medians over seeds, and the worst of them."""
    header = (
        "| experiment | unknown | untrained | learned: median | worst | published "
        "| seconds: first | others | published | runs converged |"
    )
    lines = [header, "|---" * 10 + "|"]
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
            cells = (module.title if i == 0 else "", unknown, *ours, *times)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(errors):
    shown = ["" if e is None else f"{e:.1e}" for e in errors]
    return " / ".join(shown) if any(shown) else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--keep", action="store_true", help="write the results")
    parser.add_argument("--table", action="store_true", help="of the results kept")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read("experiments")))
    else:
        for name in arguments.names or names:
            rows = []
            for seed in range(arguments.seeds):
                rows.append(run(name, seed))
                print(json.dumps(rows[-1]), flush=True)
                if arguments.keep:  # Each time: these take long.
                    keep(rows)
            print(table({name: dict(runs=rows)}), file=sys.stderr, flush=True)
