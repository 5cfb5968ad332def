"""Where the time of one outer step goes, and how far each part is from arithmetic.

The cases are those of `hypergradient.py`; Burgers' equation has the network of 2802
weights in its kernel. A step of `eqx_bilevel.learn` is one linearised solve, with the
value of the objective, and then its gradient; their parts are timed on their own as
well. The floor of a part is the number of its floating-point operations, as counted by
the compiler, over what the machine does in a product of large matrices.

    python benchmarks/profile_step.py --case burgers --points 300 --points 900
"""

import argparse
import json
import sys
from typing import Any, NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import optax
from eqx_bilevel import _checks, _gram, _learn, _linearised, _outer
from hypergradient import cases, stated
from measuring import compiled, timed


jax.config.update("jax_enable_x64", True)


line = "{:6}{:>10}{:>15}{:10.4f} s{:10.4f} s{:8.1f} s"


def flops_per_second(n=3000):
    a = jnp.ones((n, n))
    product, _ = compiled(lambda a: a @ a, a)
    _, times = timed(product, a, repeats=4)
    return 2 * n**3 / times["step_s"]


class Part(NamedTuple):
    step: Any  # compiled
    arguments: tuple
    compile_s: float


def parts(case: str, n: int, gradient: str) -> dict[str, Part]:
    prior, conditions, objective, kernel = stated(cases[case], n, n // 3)
    prior, conditions = _checks.checked(prior(kernel), conditions)
    adjoint = _learn._adjoint(gradient)
    one = jnp.array(1)
    task = _outer.Task(None, objective, eb.GaussNewton(), adjoint, one)
    theta, task = _outer.partition(prior, conditions, task)
    found_parts = {}

    def part(name, fn, *arguments):
        step, seconds = compiled(fn, *arguments)
        found_parts[name] = Part(step, arguments, seconds)
        return step(*arguments)

    def problem(theta):
        stated = eqx.combine(theta, task.rest)
        return _checks.sanitised(*_checks.unwrap(stated))[0]

    def network(theta):
        return [r.sides for r in problem(theta).rows]

    def gram(problem):
        z = _linearised.prior_z(problem)
        functionals = _linearised.linearise(problem, z).functionals
        return _gram.covariance(problem.kernels, functionals, functionals)

    part("network", network, theta)
    matrix = part("Gram matrix", gram, eqx.filter_jit(problem)(theta))
    matrix = matrix + 1e-8 * jnp.diag(jnp.diagonal(matrix))
    part("factorisation", jnp.linalg.cholesky, matrix)
    start = _outer.first_start(prior, conditions, None)
    found, _ = part("solve", _outer.evaluate.__wrapped__, theta, task, start)
    optimiser = optax.adam(1e-3)
    state, key = optimiser.init(theta), jax.random.key(0)
    step = _outer.optax_step.__wrapped__
    part("gradient", step, optimiser, state, theta, task, found, key)
    return found_parts


# So few that there is no loop over chunks of pairs, whose body the compiler counts
# once only.
few = 150


def operations(name: str, n: int, small: dict[str, Part]) -> float:
    cube = (n + n // 3) ** 3 / 3
    if name == "factorisation":
        return cube
    counted = small[name].step.compiled.cost_analysis()["flops"]
    pairs = counted * (n / few) ** (1 if name == "network" else 2)
    return pairs + cube if name == "solve" else pairs


def measure(case: str, n: int, gradient: str):
    rate = flops_per_second()
    small = parts(case, few, gradient)
    for name, part in parts(case, n, gradient).items():
        _, times = timed(part.step, *part.arguments, repeats=10)
        row = dict(
            case=case,
            part=name,
            gradient=gradient,
            points=n,
            boundary=n // 3,
            **times,
            floor_s=round(operations(name, n, small) / rate, 5),
            compile_s=round(part.compile_s, 1),
        )
        print(json.dumps(row), flush=True)
        cells = (row[key] for key in ("step_s", "floor_s", "compile_s"))
        print(line.format(n, gradient, name, *cells), file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=cases, default="burgers")
    parser.add_argument("--points", type=int, action="append")
    given = parser.parse_args()
    header = ("points", "gradient", "part", "measured", "floor", "compile")
    print("{:>6}{:>10}{:>15}{:>12}{:>12}{:>10}".format(*header), file=sys.stderr)
    for n in given.points or (300, 900):
        for gradient in ("frozen", "implicit"):
            measure(given.case, n, gradient)
