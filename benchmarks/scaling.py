"""How the cost of one outer gradient step grows.

With the number of scalar conditions, of hyperparameters, of dimensions, and with the
size of a network in the kernel. A step is as in `hypergradient.py`: one linearised
solve, the value of the validation objective, and its gradient, frozen or implicit. Each
measurement runs in a process of its own, for its peak memory to be known, and is one
line of JSON on standard output; a table goes to standard error. At its end are the
exponents of power laws, fitted to the upper half of the sizes. The memory of a step is
what the compiled code allocates. The peak of the process has Python and the compilation
in it, and they are most of it at small sizes. Everything, some of it, or the picture of
what was measured earlier:

    python benchmarks/scaling.py > scaling.jsonl 2> scaling.md
    python benchmarks/scaling.py --study dimension --study network
    python benchmarks/scaling.py --from scaling.jsonl --plot scaling.png
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from hypergradient import Case, cases, ours
from jaxtyping import Array, Float
from measuring import buffers_mb, compiled, in_own_process, peak_mb, timed


jax.config.update("jax_enable_x64", True)

adjoints = dict(frozen=eb.FrozenAdjoint(), implicit=eb.FixedPointAdjoint())


#
# Studies
#


class Problem(NamedTuple):
    case: Case
    conditions: int = 400


class Study(NamedTuple):
    along: str  # the column of the results that grows
    label: str  # what a picture calls it
    sizes: dict[str, tuple[int, ...]]  # for each curve
    problem: Callable[[str, int], Problem]  # from a curve and a size


def with_conditions(curve: str, size: int) -> Problem:
    return Problem(cases[curve], size)


class MeanLengthscale(eqx.Module):
    # All hyperparameters matter, but no point has more work with them than with one.
    # So this counts hyperparameters, whereas a network costs something at each point.
    logarithms: Float[Array, " p"]

    def __call__(self, x):
        return jnp.exp(jnp.mean(self.logarithms))


def with_hyperparameters(curve: str, size: int) -> Problem:
    kernel = lambda key: eb.Gibbs(MeanLengthscale(jnp.full(size, jnp.log(0.3))))
    return Problem(cases[curve]._replace(kernel=kernel))


def with_dimension(curve: str, size: int) -> Problem:
    box = eb.Box([0.0] * size, [1.0] * size)
    case = cases[curve]._replace(
        box=box,
        faces=[(axis, side) for axis in range(size) for side in ("lower", "upper")],
        boundary=lambda x: jnp.sum(jnp.sin(3 * x)),
        # Points are further apart in more dimensions.
        kernel=lambda key: eb.Gaussian(0.3 * math.sqrt(size)),
    )
    return Problem(case)


def with_network(curve: str, size: int) -> Problem:
    width, depth = (size, 2) if curve == "width" else (50, size)

    def kernel(key):
        network = eb.LengthscaleNetwork(2, 2, width, depth, scale=0.25, key=key)
        return eb.Gibbs(network)

    return Problem(cases["burgers"]._replace(kernel=kernel))


many = (300, 600, 1200, 2500, 5000, 10000)
powers = tuple(10**i for i in range(7))
studies = dict(
    conditions=Study(
        "conditions",
        "conditions",
        dict(elliptic=many, burgers=many),
        with_conditions,
    ),
    hyperparameters=Study(
        "hyperparameters",
        "hyperparameters",
        dict(elliptic=powers),
        with_hyperparameters,
    ),
    dimension=Study(
        "dimension",
        "dimension",
        dict(elliptic=tuple(range(1, 9))),
        with_dimension,
    ),
    network=Study(
        "hyperparameters",
        "weights of the network",
        dict(width=(10, 30, 100, 300, 1000), depth=(1, 2, 3, 4, 5)),
        with_network,
    ),
)


#
# Measuring
#


def measure(study: str, curve: str, size: int, way: str) -> dict[str, Any]:
    case, conditions = studies[study].problem(curve, size)
    # A quarter of them on the boundary; an interval has only two points there.
    dimension = case.box.dim
    boundary = 2 if dimension == 1 else conditions // 4
    loss, k = ours(adjoints[way], case, conditions - boundary, boundary)
    weights = jax.tree.leaves(eqx.filter(k, eqx.is_inexact_array))
    # Points become arguments of the step, as they are in `eqx_bilevel.learn`. What
    # depends on constants only, the compiler computes itself, slowly if there are many.
    loss = eqx.filter_closure_convert(loss, k)
    step, compile_s = compiled(eqx.filter_value_and_grad(loss), k)
    (value, gradient), times = timed(step, k, repeats=6 if conditions < 3000 else 2)
    # A solve that fails returns nan.
    if not all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, gradient))):
        raise RuntimeError(f"No finite gradient: {study}, {curve}, {size}, {way}.")
    return dict(
        study=study,
        curve=curve,
        size=size,
        way=way,
        conditions=conditions,
        hyperparameters=sum(x.size for x in weights),
        dimension=dimension,
        objective=float(value),
        **times,
        compile_s=round(compile_s, 1),
        step_mb=buffers_mb(step),
        peak_mb=peak_mb(),
    )


def measured(names, curve, sizes) -> Iterator[dict[str, Any]]:
    for name in names:
        for each, usual in studies[name].sizes.items():
            if curve not in (None, each):
                continue
            for size in sizes or usual:
                for way in adjoints:
                    one = ("--study", name, "--curve", each, "--size", size)
                    yield in_own_process(__file__, *one, "--way", way)


def saved(path, names) -> Iterator[dict[str, Any]]:
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    yield from (row for row in rows if row["study"] in names)


#
# Fitting
#


class Curve(NamedTuple):
    study: str
    name: str
    way: str
    rows: list[dict[str, Any]]

    def column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows])

    def sizes(self) -> np.ndarray:
        return self.column(studies[self.study].along)

    def fit(self, column: str) -> tuple[np.ndarray, np.ndarray, float]:
        # Over the upper half of the sizes, as fixed costs hide the slope at small ones:
        # those sizes, the power law there, and its exponent.
        half = max(2, math.ceil(len(self.rows) / 2))
        x, y = self.sizes()[-half:], self.column(column)[-half:]
        slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
        return x, np.exp(intercept) * x**slope, slope


def curves(rows: list[dict[str, Any]]) -> list[Curve]:
    found: dict[tuple[str, str, str], list] = {}
    for row in rows:
        found.setdefault((row["study"], row["curve"], row["way"]), []).append(row)
    in_order = lambda rows: sorted(rows, key=lambda row: row["size"])
    return [Curve(*k, in_order(each)) for k, each in found.items() if len(each) > 1]


#
# Showing
#


columns = dict(
    study="study",
    curve="curve",
    size="size",
    conditions="conditions",
    hyperparameters="hyperparameters",
    way="gradient",
    step_s="a step, s",
    compile_s="compile, s",
    step_mb="a step, MB",
    peak_mb="process, MB",
)


def print_row(cells) -> None:
    # Markdown that can be read as it is.
    print("|", " | ".join(f"{cell:>15}" for cell in cells), "|", file=sys.stderr)


def print_exponents(found: list[Curve]) -> None:
    print("\nExponents, over the upper half of the sizes:\n", file=sys.stderr)
    print_row(["study", "along", "curve", "gradient", "time", "memory"])
    print_row(["--:"] * 6)
    for curve in found:
        exponents = [f"{curve.fit(name)[2]:z.2f}" for name in ("step_s", "step_mb")]
        along = studies[curve.study].along
        print_row([curve.study, along, curve.name, curve.way, *exponents])


def plot(found: list[Curve], path: str) -> None:
    # Not needed, nor in memory, where something is measured.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.study for curve in found))
    labels = dict(step_s="a gradient step (s)", step_mb="its memory (MB)")
    figure = Figure(figsize=(8, 2.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, sharey="col", squeeze=False)
    for panels, name in zip(axes, names):
        curves = [curve for curve in found if curve.study == name]
        for panel, (column, label) in zip(panels, labels.items()):
            draw(panel, curves, column)
            panel.set(xlabel=studies[name].label, ylabel=label)
    figure.savefig(path, dpi=200)


def draw(panel, found: list[Curve], column: str) -> None:
    styles = dict(frozen=dict(marker="o"), implicit=dict(marker="s", mfc="white"))
    names = list(dict.fromkeys(curve.name for curve in found))
    panel.set(xscale="log", yscale="log")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    for curve in found:
        color = ("tab:blue", "tab:orange")[names.index(curve.name)]
        x, law, slope = curve.fit(column)
        panel.plot(x, law, color=color, alpha=0.5)
        panel.plot(
            curve.sizes(),
            curve.column(column),
            label=f"{curve.name}, {curve.way}: slope {slope:z.2f}",
            color=color,
            linestyle="none",
            markersize=4.5,
            **styles[curve.way],
        )
        if max(curve.sizes()) < 10:  # Too few of a logarithmic axis's own labels.
            panel.set_xticks(curve.sizes(), map(str, curve.sizes()))
            panel.set_xticks([], minor=True)
    panel.legend(fontsize="x-small", frameon=False)


def main(names, curve, sizes, path, picture):
    print_row(columns.values())
    print_row(["--:"] * len(columns))
    rows = []
    for row in saved(path, names) if path else measured(names, curve, sizes):
        print_row([row[name] for name in columns])
        rows.append(row)
    found = curves(rows)
    print_exponents(found)
    if picture:
        plot(found, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=studies, action="append")
    parser.add_argument("--curve", help="one of a study's curves only")
    parser.add_argument("--size", type=int, action="append", help="not the usual ones")
    parser.add_argument("--from", dest="path", help="show these results")
    parser.add_argument("--plot", dest="picture", help="a file, for a picture")
    parser.add_argument("--way", choices=adjoints, help="one measurement, right here")
    given = parser.parse_args()
    if given.way:
        (name,), (size,) = given.study, given.size
        print(json.dumps(measure(name, given.curve, size, given.way)))
    else:
        names = given.study or list(studies)
        main(names, given.curve, given.size, given.path, given.picture)
