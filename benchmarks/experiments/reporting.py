"""Errors, and results that are kept: as JSON, and as tables for the documentation."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
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


packages = ("eqx_bilevel", "jax", "equinox", "optimistix", "lineax", "optax", "scipy")


def num_cores():
    can_be_bound = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_be_bound else os.cpu_count()


def environment():
    return dict(
        date=str(datetime.date.today()),
        commit=_commit(),
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in packages},
        hardware=_processor(),
        cores=num_cores(),
    )


def stamp():
    """What is written into each row, since those of a table may be of several days:
    where the table was `written` last is another matter."""
    here = environment()
    return {name: here[name] for name in ("date", "commit", "cores")}


def _commit():
    # With "-dirty" if files were changed; nothing outside a repository.
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=results, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def write(name, kept, table):
    """Results as JSON, and the table that the documentation shows."""
    (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (results / f"{name}.md").write_text(table + "\n")


def markdown(heads, rows):
    """A table. Columns of numbers are to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    columns = zip(*rows, strict=True)
    rules = ["---:" if all(map(_is_number, cells)) else "---" for cells in columns]
    heads, *rows = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([heads, f"|{'|'.join(rules)}|", *rows])


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
    parser = command_line(description, choices)
    arguments = parsed(parser, choices)
    chosen, found = arguments.names or choices, []
    for row in rows(chosen):
        found.append(row | stamp())
        print(json.dumps(found[-1]), flush=True)
    print(table(found))
    if arguments.keep:
        kept = [r for r in read(name).get("runs", []) if r[key] not in chosen]
        found = sorted(kept + found, key=lambda row: choices.index(row[key]))
        write(name, dict(written=environment(), runs=found), table(found))


def command_line(description: str, choices: Sequence[str]) -> argparse.ArgumentParser:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_it_is)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(choices)}")
    parser.add_argument("--keep", action="store_true", help="write the results")
    return parser


def parsed(
    parser: argparse.ArgumentParser, choices: Sequence[str]
) -> argparse.Namespace:
    # By hand: `choices` of argparse does not allow for no name at all.
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(choices))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)} among {', '.join(choices)}")
    return arguments
