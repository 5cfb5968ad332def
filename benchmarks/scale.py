"""Many points: nonlinear equations with sparse inverse Cholesky factors.

`solve` and `learn`: -Lap u + u^3 = f on the unit square, u = sum_k sin(k pi x)
sin(k pi y) / k^6 over k <= 600, zero on the boundary, on a regular grid, with a Matern
kernel of order 7/2. `smooth`: the same with k <= 4 and a Gaussian kernel, without a
matrix, with rows shared between virtual devices or processes; and with a matrix.
`gradient`: Burgers' equation at quasi-random points, with a warped kernel whose warp is
a network. Each measurement runs in a process of its own and is one line of JSON on
standard output; tables follow.

    python benchmarks/scale.py             # all
    python benchmarks/scale.py 0 1         # some of the cases below
    python benchmarks/scale.py --keep      # writes the results kept: those that are new
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from measuring import in_own_process, peak_mb


sys.path.insert(0, str(pathlib.Path(__file__).parent / "experiments"))
from reporting import environment, markdown, num_cores, read, stamp, write


jax.config.update("jax_enable_x64", True)


class Case(NamedTuple):
    what: str
    size: int  # nodes in each direction, without the boundary; or points
    lengthscale: float = 0.3
    rho: tuple[float, float] = eb.SparseCholesky().rho
    rho_conditions: float = eb.SparseCholesky().rho_conditions
    devices: int = 1
    processes: int = 1
    dense: bool = False


cases = (
    Case("solve", 31),
    Case("solve", 49),
    Case("solve", 99),
    Case("solve", 99, lengthscale=0.9),
    Case("solve", 99, rho=(8.0, 5.0)),
    Case("solve", 99, lengthscale=0.9, rho=(5.0, 3.0), rho_conditions=5.0),
    Case("solve", 199),
    Case("solve", 315),
    Case("smooth", 49, lengthscale=0.2),
    Case("smooth", 49, lengthscale=0.2, dense=True),
    Case("smooth", 99, lengthscale=0.2),
    Case("smooth", 99, lengthscale=0.2, dense=True),
    Case("smooth", 99, lengthscale=0.2, devices=2),
    Case("smooth", 99, lengthscale=0.2, devices=4),
    Case("smooth", 99, lengthscale=0.2, processes=2),
    Case("learn", 99, lengthscale=0.1),
    Case("gradient", 5000),
    Case("gradient", 20000),
)


def operator(u, x):
    return -u.laplacian + u.value**3


def value(u, x):
    return u.value


def series(points, weights):
    sines = lambda x: np.sin(np.pi * np.outer(x, np.arange(1, 601)))
    return np.concatenate(
        [
            np.einsum("nk,nk,k->n", sines(x[:, 0]), sines(x[:, 1]), weights)
            for x in np.array_split(points, max(1, len(points) // 10000))
        ]
    )


K = np.arange(1.0, 601.0)


def truth(case: Case):
    return np.where(K <= 4, K**-6, 0) if case.what == "smooth" else K**-6


def elliptic(case: Case):
    axis = np.arange(case.size + 2) / (case.size + 1)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    inside = np.all((points > 0) & (points < 1), axis=1)
    weights = truth(case)
    exact = series(points[inside], weights)
    target = series(points[inside], 2 * np.pi**2 * K**2 * weights) + exact**3
    conditions = [
        eb.Condition(operator, points[inside], target),
        eb.Condition(value, points[~inside]),
    ]
    matern = eb.Matern(case.lengthscale, nu=3.5)
    kernel = eb.Gaussian(case.lengthscale) if case.what == "smooth" else matern
    return eb.GaussianProcess(kernel), conditions, exact


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def timed(fn, *args, **kwargs):
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(fn(*args, **kwargs))
    return out, time.perf_counter() - wall, time.process_time() - cpu


def sparse(case: Case) -> eb.GaussNewton:
    radii = dict(rho=case.rho, rho_conditions=case.rho_conditions)
    return eb.GaussNewton(linear_solver=eb.SparseCholesky(**radii))


def errors(case: Case, solution, exact) -> dict:
    # At the points of the equation, and at others.
    elsewhere = np.random.default_rng(0).random((1000, 2))
    expected = series(elsewhere, truth(case))
    points = solution.conditions[0].points
    at_points = solution._z.reshape(-1) - exact
    assert len(points) == len(exact)
    off_points, seconds, _ = timed(solution, elsewhere)
    return dict(
        error_l2=rms(at_points),
        error_max=float(np.max(np.abs(at_points))),
        elsewhere_l2=rms(np.asarray(off_points) - expected),
        elsewhere_max=float(np.max(np.abs(np.asarray(off_points) - expected))),
    )


def measure_solve(case: Case) -> dict:
    prior, conditions, exact = elliptic(case)
    solve = lambda: eb.solve(prior, conditions, sparse(case))
    _, cold, _ = timed(solve)
    solution, warm, cpu = timed(solve)
    return dict(
        points=sum(len(c.points) for c in conditions),
        lengthscale=case.lengthscale,
        rho=[*case.rho, case.rho_conditions],
        **errors(case, solution, exact),
        steps=int(solution.stats["num_steps"]),
        products=int(solution.stats["num_products"]),
        cold_s=round(cold, 2),
        warm_s=round(warm, 2),
        warm_cpu_s=round(cpu, 2),
    )


def measure_smooth(case: Case) -> dict:
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("points",), axis_types=(auto,))
    prior, conditions, exact = elliptic(case)
    system = lx.Cholesky() if case.dense else eb.MatrixFree()
    solve = lambda: eb.solve(prior, conditions, eb.GaussNewton(linear_solver=system))
    with jax.set_mesh(mesh):
        _, cold, _ = timed(solve)
        solution, warm, cpu = timed(solve)
    found = dict(
        points=sum(len(c.points) for c in conditions),
        matrix="dense" if case.dense else "none",
        devices=case.devices,
        processes=case.processes,
        **errors(case, solution, exact),
        steps=int(solution.stats["num_steps"]),
        products=int(solution.stats["num_products"]),
        nugget=float(solution.stats["jitter"]),
        cold_s=round(cold, 1),
        warm_s=round(warm, 1),
        warm_cpu_s=round(cpu, 1),
    )
    if not case.dense:
        share = solution._factor.basis.addressable_shards[0].data
        found["share_mb"] = round(share.nbytes / 1e6)
    return found


def measure_learn(case: Case) -> dict:
    prior, conditions, exact = elliptic(case)
    box = eb.Box([0.0, 0.0], [1.0, 1.0])
    objective = eb.ValidationResidual(
        box.interior(500, key=jax.random.key(0)),
        target=lambda x: _source(x),
    )
    learned, seconds, cpu = timed(eb.learn, prior, conditions, objective, subset=2000)
    return dict(
        points=sum(len(c.points) for c in conditions),
        lengthscale=case.lengthscale,
        learned=float(eb.unwrap(learned.prior).kernel.lengthscale),
        **errors(case, learned.solution, exact),
        seconds=round(seconds, 1),
        cpu_s=round(cpu, 1),
    )


def _source(x):
    sines = lambda x: jnp.sin(jnp.pi * K * x)
    both = sines(x[0]) * sines(x[1])
    return jnp.sum(2 * jnp.pi**2 * K**-4 * both) + jnp.sum(K**-6 * both) ** 3


def burgers(num: int):
    box = eb.Box([0.0, -1.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(0), 5)
    equation = lambda u, x: u.d(0) + u.value * u.d(1) - 0.05 * u.d(1, 1)
    sine = lambda x: -jnp.sin(jnp.pi * x[1])
    face = lambda *where, key: box.face(*where, num // 40, key=key)
    conditions = [
        eb.Condition(equation, box.interior(num * 37 // 40, key=keys[0])),
        eb.Condition(value, face(0, "lower", key=keys[1]), sine),
        eb.Condition(value, face(1, "lower", key=keys[2])),
        eb.Condition(value, face(1, "upper", key=keys[3])),
    ]
    validation = eb.ValidationResidual(box.interior(1000, key=keys[4]))
    return conditions, validation


class Warp(eqx.Module):
    network: eqx.nn.MLP

    def __call__(self, x):
        return x + 0.1 * self.network(x)


def measure_gradient(case: Case) -> dict:
    # Steps of the paper: one linearised solve, and the frozen gradient.
    conditions, objective = burgers(case.size)
    network = eqx.nn.MLP(2, 2, 16, 2, activation=jnp.tanh, key=jax.random.key(0))
    warped = eb.Warped(eb.Matern([0.5, 0.3], nu=3.5), Warp(network))
    ends, objectives = [time.perf_counter()], []

    def tick(progress):
        ends.append(time.perf_counter())
        objectives.append(float(progress.objective))

    learned = eb.learn(
        eb.GaussianProcess(warped),
        conditions,
        objective,
        optax.adam(1e-3),
        gradient="frozen",
        solver=sparse(case),
        scale_search=False,
        max_inner_steps=1,
        steps=4,
        callback=tick,
        throw=False,
    )
    seconds, arrays = np.diff(ends), eqx.filter(learned.prior, eqx.is_array)
    return dict(
        points=sum(len(c.points) for c in conditions),
        hyperparameters=sum(map(jnp.size, jax.tree.leaves(arrays))),
        objectives=objectives,
        step_s=round(float(np.median(seconds[1:])), 1),
        first_step_s=round(float(seconds[0]), 1),
    )


measures = dict(
    solve=measure_solve,
    smooth=measure_smooth,
    learn=measure_learn,
    gradient=measure_gradient,
)


def join(number: int, address: str, which: int) -> None:
    # One of the processes that solve a problem together. The first starts the others.
    case = cases[number]
    jax.config.update("jax_num_cpu_devices", case.devices)
    if case.processes == 1:
        return
    for other in range(1, case.processes) if which == 0 else ():
        command = [sys.executable, __file__, "--case", str(number), "--join", address]
        subprocess.Popen([*command, str(other)], stdout=subprocess.DEVNULL)
    # Of the cores of one machine each has its share: XLA starts so many threads.
    os.environ["NPROC"] = str(max(1, num_cores() // case.processes))
    jax.distributed.initialize(address, case.processes, which)


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def measure(case: Case) -> dict:
    found = dict(what=case.what, **measures[case.what](case))
    return dict(found, peak_mb=peak_mb(), load=round(os.getloadavg()[0], 1))


def table(rows: list[dict], **columns: tuple[str, str]) -> str:
    # By the name of a number: how to head its column, and how to write it.
    heads = [head for head, _ in columns.values()]
    cells = [
        [format(row[name], spec) for name, (_, spec) in columns.items()] for row in rows
    ]
    return markdown(heads, cells)


ERRORS = dict(
    error_l2=("error (L2)", ".1e"),
    error_max=("(max)", ".1e"),
    elsewhere_l2=("elsewhere (L2)", ".1e"),
    elsewhere_max=("(max)", ".1e"),
)
POINTS, LAST = (
    dict(points=("points", "d")),
    dict(peak_mb=("peak, MB", "d"), load=("load", ".1f")),
)


COUNTS = dict(steps=("steps", "d"), products=("CG steps", "d"))
TIMES = dict(
    cold_s=("first, s", ".1f"),
    warm_s=("again, s", ".1f"),
    warm_cpu_s=("CPU, s", ".1f"),
)
LEARNED = dict(
    lengthscale=("lengthscale", "g"),
    learned=("learned", ".3g"),
    **ERRORS,
    seconds=("all, s", ".1f"),
    cpu_s=("CPU, s", ".1f"),
)
STEP = dict(
    hyperparameters=("hyperparameters", "d"),
    step_s=("step, s", ".1f"),
    first_step_s=("first step, compiling, s", ".1f"),
)


def tables(rows: list[dict]) -> str:
    of = lambda what: [r for r in rows if r["what"] == what]
    solves = [dict(r, radii=", ".join(f"{x:g}" for x in r["rho"])) for r in of("solve")]
    parts = [
        table(
            solves,
            **POINTS,
            lengthscale=("lengthscale", "g"),
            radii=("`rho`, `rho_conditions`", "s"),
            **ERRORS,
            **COUNTS,
            **TIMES,
            **LAST,
        )
    ]
    # Where most of the time is not overhead.
    same = [r for r in solves if r["points"] > 1e4 and r["rho"] == solves[0]["rho"]]
    same = [r for r in same if r["lengthscale"] == solves[0]["lengthscale"]]
    if len(same) > 1:
        logs = [np.log([r[name] for r in same]) for name in ("points", "warm_cpu_s")]
        exponent = np.polyfit(*logs, 1)[0]
        parts.append(f"CPU time grows as the number of points to the {exponent:.2f}.")
    if of("smooth"):
        parts.append("A smooth solution, with a Gaussian kernel:")
        parts.append(
            table(
                [dict(share_mb=0) | r for r in of("smooth")],
                **POINTS,
                matrix=("matrix", "s"),
                devices=("devices", "d"),
                processes=("processes", "d"),
                elsewhere_l2=ERRORS["elsewhere_l2"],
                nugget=("nugget", ".0e"),
                **COUNTS,
                share_mb=("share of the factor, MB", "d"),
                **TIMES,
                **LAST,
            )
        )
    if of("learn"):
        parts += [
            "Learning the lengthscale with 2000 of the points:",
            table(of("learn"), **POINTS, **LEARNED, **LAST),
        ]
    if of("gradient"):
        parts += [
            "A step of learning, with the frozen gradient:",
            table(of("gradient"), **POINTS, **STEP, **LAST),
        ]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", type=int)
    parser.add_argument("--keep", action="store_true", help="write the results")
    parser.add_argument("--case", type=int, help="only this one, in this process")
    parser.add_argument("--join", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        address, which = arguments.join or (free_address(), 0)
        join(arguments.case, address, int(which))
        print(json.dumps(measure(cases[arguments.case])))
        return
    chosen = arguments.cases or range(len(cases))
    found = [in_own_process(__file__, "--case", i) for i in chosen]
    rows = [dict(case=i, **row, **stamp()) for i, row in zip(chosen, found)]
    print(tables(rows))
    if arguments.keep:
        others = [r for r in read("scale").get("runs", []) if r["case"] not in chosen]
        rows = sorted(others + rows, key=lambda row: row["case"])
        write("scale", dict(written=environment(), runs=rows), tables(rows))


if __name__ == "__main__":
    main()
