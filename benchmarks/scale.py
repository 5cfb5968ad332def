"""A nonlinear elliptic equation at many points, by sparse inverse Cholesky factors.

-Lap u + u^3 = f on the unit square with u = sum_k sin(k pi x) sin(k pi y) / k^6 over
k <= 600, zero on the boundary, on a regular grid, with a Matern kernel of order 7/2.
Each measurement runs in a process of its own and is one line of JSON on standard
output; a table follows. Warm is everything but compiling: orderings and patterns, the
factor, and all steps of Gauss-Newton. Errors are at the collocation points.

    python benchmarks/scale.py             # all
    python benchmarks/scale.py 49 99       # with so many inner nodes in each direction
    python benchmarks/scale.py --keep      # writes the results kept
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel._linearised import linearise
from eqx_bilevel._problem import build
from eqx_bilevel._sparse import plan, regress
from measuring import compiled, in_own_process, peak_mb


sys.path.insert(0, str(pathlib.Path(__file__).parent / "experiments"))
from reporting import environment, write


jax.config.update("jax_enable_x64", True)


class Case(NamedTuple):
    inner: int  # nodes in each direction
    lengthscale: float = 0.3
    nugget: float = 1e-10
    rho: tuple[float, float] = (6.0, 3.0)
    rho_conditions: float = 4.0


cases = (
    Case(31),
    Case(49),
    Case(99),
    Case(99, lengthscale=0.9, nugget=1e-12),
    Case(99, lengthscale=0.9, nugget=1e-12, rho=(8.0, 4.0)),
    Case(199, nugget=1e-12),
    Case(315, nugget=1e-12),
    Case(315, nugget=1e-12, rho=(8.0, 4.0)),
)


def operator(u, x):
    return -u.laplacian + u.value**3


def value(u, x):
    return u.value


def stated(case: Case):
    axis = np.arange(case.inner + 2) / (case.inner + 1)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    inside = np.all((points > 0) & (points < 1), axis=1)
    k = np.arange(1, 601)
    sines = np.sin(np.pi * np.outer(axis, k))
    series = lambda weights: ((sines * weights) @ sines.T).reshape(-1)[inside]
    exact = series(1.0 / k**6)
    target = series(2 * np.pi**2 / k**4) + exact**3
    nugget = case.nugget
    conditions = [
        eb.Condition(operator, points[inside], jnp.asarray(target), nugget=nugget),
        eb.Condition(value, points[~inside], nugget=nugget),
    ]
    prior = eb.GaussianProcess(eb.Matern(case.lengthscale, nu=3.5))
    return build(*eb.unwrap((prior, conditions))), exact


def step(problem, made, factors, z, weights):
    linearised, jitter = linearise(problem, z), jnp.zeros(())
    return regress(problem, made, factors, linearised, jitter, weights)


def measure(case: Case) -> dict:
    clock = lambda: np.array([time.perf_counter(), time.process_time()])
    problem, exact = stated(case)
    start = clock()
    made = plan(problem, rho=case.rho, rho_conditions=case.rho_conditions)
    planned = clock() - start
    factorise = lambda made, problem: made.factorise(problem, case.nugget)
    factorise, compile_factor = compiled(factorise, made, problem)
    start = clock()
    factors = jax.block_until_ready(factorise(made, problem))
    factored = clock() - start
    z, weights = jnp.zeros(problem.z_size), jnp.zeros(problem.size)
    one_step, compile_step = compiled(step, problem, made, factors, z, weights)
    iterations, change, start = [], np.inf, clock()
    while change > 1e-7 and len(iterations) < 10:
        new = jax.block_until_ready(one_step(problem, made, factors, z, weights))
        change = float(jnp.max(jnp.abs(new.z - z)))
        z, weights = new.z, new.weights
        iterations.append(int(new.num_steps))
    stepped = clock() - start
    wall, cpu = planned + factored + stepped
    error = np.asarray(z) - exact
    return dict(
        points=problem.size,
        lengthscale=case.lengthscale,
        nugget=case.nugget,
        rho=[*case.rho, case.rho_conditions],
        error_l2=float(np.sqrt(np.mean(error**2))),
        error_max=float(np.max(np.abs(error))),
        iterations=iterations,
        plan_s=round(planned[0], 2),
        factor_s=round(factored[0], 2),
        steps_s=round(stepped[0], 2),
        warm_s=round(wall, 2),
        warm_cpu_s=round(cpu, 2),
        compile_s=round(compile_factor + compile_step, 2),
        factor_mb=round(sum(map(_mb, jax.tree.leaves(factors)))),
        peak_mb=peak_mb(),
        load=round(os.getloadavg()[0], 1),
    )


def _mb(x) -> float:
    return x.nbytes / 2**20 if eqx.is_array(x) else 0.0


def table(rows: list[dict]) -> str:
    head = (
        "| points | lengthscale | nugget | radii | error (L2) | error (max) "
        "| CG iterations | warm, s | of this CPU, s | compiling, s | factor, MB "
        "| peak, MB | load |"
    )
    lines = [head, "|" + "---|" * 13]
    for r in rows:
        radii = ", ".join(f"{x:g}" for x in r["rho"])
        iterations = ", ".join(map(str, r["iterations"]))
        lines.append(
            f"| {r['points']} | {r['lengthscale']} | {r['nugget']:.0e} | {radii} "
            f"| {r['error_l2']:.1e} | {r['error_max']:.1e} | {iterations} "
            f"| {r['warm_s']} | {r['warm_cpu_s']} | {r['compile_s']} "
            f"| {r['factor_mb']} | {r['peak_mb']} | {r['load']} |"
        )
    # Where most of the time is not overhead.
    same = [r for r in rows if r["points"] > 1e4 and r["rho"][0] == 6]
    if len(same) > 1:
        logs = [np.log([r[name] for r in same]) for name in ("points", "warm_cpu_s")]
        exponent = np.polyfit(*logs, 1)[0]
        lines += ["", f"CPU time grows as the number of points to the {exponent:.2f}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inner", nargs="*", type=int)
    parser.add_argument("--keep", action="store_true", help="write the results")
    parser.add_argument("--case", type=int, help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(cases[arguments.case])))
        return
    rows = [
        in_own_process(__file__, "--case", i)
        for i, case in enumerate(cases)
        if case.inner in (arguments.inner or [case.inner])
    ]
    print(table(rows))
    if arguments.keep:
        write("scale", dict(**environment(), runs=rows), table(rows))


if __name__ == "__main__":
    main()
