"""Errors, and results that are kept: as JSON, and as tables for the documentation."""

import argparse
import datetime
import importlib.metadata
import itertools as it
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


results = pathlib.Path(__file__).parents[1] / "results"


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
    (results / f"{name}.md").write_text(aligned(table) + "\n")


def aligned(text):
    """With columns of numbers to the right."""
    lines = text.split("\n")
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    is_rule = lambda line: line.startswith("|") and set(line) <= set("|-:")
    for i in filter(lambda i: is_rule(lines[i]), range(len(lines))):
        rows = it.takewhile(lambda line: line.startswith("|"), lines[i + 1 :])
        columns = zip(*map(cells, rows), strict=True)
        rules = ["---:" if all(map(_is_number, c)) else "---" for c in columns]
        lines[i] = f"|{'|'.join(rules)}|"
    return "\n".join(lines)


def _is_number(cell):
    # Or two of them, or nothing.
    return all(c in "0123456789.+-e/ ,%" or cell in ("inf", "nan") for c in cell)


def read(name):
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def study(
    name: str,
    key: str,
    description: str,
    choices: Iterable[str],
    rows: Callable[[Sequence[str]], Iterable[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """The command line of a study: runs all or some of what can be chosen. Rows have
    what was chosen at `key`. Those of other choices are kept."""
    choices = tuple(choices)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(choices)}")
    parser.add_argument("--keep", action="store_true", help="write the results")
    arguments = parser.parse_args()
    chosen, here, found = arguments.names or choices, environment(), []
    for row in rows(chosen):
        found.append(dict(**row, date=here["date"]))
        print(json.dumps(found[-1]), flush=True)
    print(table(found))
    if arguments.keep:
        kept = [r for r in read(name).get("runs", []) if r[key] not in chosen]
        found = sorted(kept + found, key=lambda row: choices.index(row[key]))
        write(name, dict(**here, runs=found), table(found))
