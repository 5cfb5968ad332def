"""The cost of one outer gradient step, against the published way.

The published way is written here as in the code of arXiv:2510.05568: the Gram matrix of
all derivatives at all points, by nested automatic differentiation of the kernel, which
then also goes through the factorisation. Both ways take one linearised step at the same
points with the same kernel. Each measurement runs in a process of its own, for its peak
memory to be known, and is one line of JSON on standard output; a table goes to standard
error. Here a step can be had in two forms: the gradient of a function that calls
`solve`, as in a program of one's own (also with an option of the compiler), or a step
of `learn`. Everything, or some of it:

    python benchmarks/hypergradient.py
    python benchmarks/hypergradient.py --case burgers --points 300
"""

import argparse
import functools as ft
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import optax
from measuring import compiled, in_own_process, peak_mb, timed


jax.config.update("jax_enable_x64", True)

nugget = 1e-10
square = eb.Box([0.0, 0.0], [1.0, 1.0])
space_time = eb.Box([0.0, -1.0], [1.0, 1.0])
all_faces = [(0, "lower"), (0, "upper"), (1, "lower"), (1, "upper")]
early_faces = [(0, "lower"), (1, "lower"), (1, "upper")]


#
# Cases
#


class Case(NamedTuple):
    operator: Callable  # (u, x), of one unknown or of a dictionary of them
    jets: tuple  # the derivatives in it, as the published way needs to be told
    boundary: Callable  # the target of the values there
    kernel: Callable  # from a random key
    box: eb.Box
    faces: list
    unknowns: tuple[str, ...] = ("u",)


def elliptic(u, x):
    return -u.laplacian + u.value**3


def burgers(u, x):
    return u.d(0) + u.value * u.d(1) - 0.02 * u.d(1, 1)


def eikonal(u, x):
    return u.d(0) ** 2 + u.d(1) ** 2 - 0.1 * (u.d(0, 0) + u.d(1, 1)) - 1.0


def schroedinger(u, x):
    p, q = u["p"], u["q"]
    density = p.value**2 + q.value**2
    return jnp.stack(
        [
            p.d(0) + 0.5 * q.d(1, 1) + density * q.value,
            q.d(0) - 0.5 * p.d(1, 1) - density * p.value,
        ]
    )


def network(key):
    return eb.Gibbs(eb.LengthscaleNetwork(2, 2, 50, 2, scale=0.25, key=key))


def additive(key):
    one, two = eb.Gaussian(0.2), eb.Gaussian(0.8)
    return eb.Scaled(one, 1.0) + eb.Scaled(two, 0.5)


def deep(key):
    mlp = eqx.nn.MLP(2, 2, 50, 2, activation=jnp.tanh, key=key)
    return eb.Warped(eb.Gaussian(0.2), mlp)


def wave(x):
    return jnp.where(x[0] == 0.0, -jnp.sin(jnp.pi * x[1]), 0.0)


second = ((0, 0), "laplacian")
parabolic = ((0, 0), (1, 0), (0, 1), (0, 2))
zero = lambda x: jnp.zeros(())
smooth = lambda x: jnp.sin(3 * x[0]) * jnp.cosh(3 * x[1])
gaussian = lambda key: eb.Gaussian(jnp.array([0.3, 0.3]))

cases = dict(
    elliptic=Case(elliptic, second, smooth, gaussian, square, all_faces),
    additive=Case(elliptic, second, smooth, additive, square, all_faces),
    burgers=Case(burgers, parabolic, wave, network, space_time, early_faces),
    deep=Case(burgers, parabolic, wave, deep, space_time, early_faces),
    eikonal=Case(
        eikonal, ((1, 0), (0, 1), (2, 0), (0, 2)), zero, network, square, all_faces
    ),
    schroedinger=Case(
        schroedinger,
        ((0, 0), (1, 0), (0, 2)),
        lambda x: jnp.exp(-4 * x[1] ** 2),
        gaussian,
        space_time,
        [(0, "lower")],
        ("p", "q"),
    ),
)


def points(case: Case, n: int, m: int):
    keys = jax.random.split(jax.random.key(0), 4)
    interior, other = (
        case.box.interior(n, key=keys[0]),
        case.box.interior(n, key=keys[1]),
    )
    return interior, case.box.boundary(m, faces=case.faces, key=keys[2]), other, keys[3]


#
# This library
#


def stated(case: Case, n: int, m: int):
    interior, boundary, other, key = points(case, n, m)
    single = len(case.unknowns) == 1

    def values(u, x):
        return u.value if single else [u[name].value for name in case.unknowns]

    def known(x):
        return case.boundary(x) if single else [case.boundary(x)] * len(case.unknowns)

    conditions = [
        eb.Condition(case.operator, interior, nugget=nugget),
        eb.Condition(values, boundary, known, nugget=nugget),
    ]
    objective = eb.ValidationResidual(other, misfit_weight=0)  # as published

    def prior(k):
        one = eb.GaussianProcess(k)
        return one if single else dict.fromkeys(case.unknowns, one)

    return prior, conditions, objective, case.kernel(key)


def ours(adjoint, case: Case, n: int, m: int):
    prior, conditions, objective, k = stated(case, n, m)

    # One linearised solve from the prior's mean, as in the published way.
    def loss(k):
        options = dict(adjoint=adjoint, max_steps=1, throw=False)
        return objective(eb.solve(prior(k), conditions, **options))

    return loss, k


def learning(gradient: str, case: Case, n: int, m: int) -> dict[str, Any]:
    # As it is in `learn`, where a solve and its gradient are compiled separately.
    prior, conditions, objective, k = stated(case, n, m)
    clocks = [(time.perf_counter(), time.process_time())]

    def read(progress):
        clocks.append((time.perf_counter(), time.process_time()))

    learned = eb.learn(
        prior(k),
        conditions,
        objective,
        optax.adam(1e-3),
        gradient=gradient,
        steps=8,
        scale_search=False,
        max_inner_steps=1,
        callback=read,
        throw=False,
    )
    first, *steps = [
        (after - before, cpu_after - cpu_before)
        for (before, cpu_before), (after, cpu_after) in zip(clocks, clocks[1:])
    ]
    wall, cpu = min(steps)
    return dict(
        objective=float(learned.history["objective"][0]),
        step_s=round(wall, 4),
        cpu_per_wall=round(cpu / wall, 2),
        compile_s=round(first[0] - wall, 1),
    )


#
# The published way
#


class Values:
    # Numbers that are called like the derivatives of an unknown.
    def __init__(self, table):
        self.table = table
        self.value = table.get((0, 0))

    def d(self, *axes):
        return self.table[axes.count(0), axes.count(1)]

    @property
    def laplacian(self):
        return self.table["laplacian"]


def kernel_function(kernel):
    kernel = eb.unwrap(kernel)
    if not isinstance(kernel, eb.Gibbs):
        return lambda x, y: kernel(x, y)

    # As written there. The way it is written here is three times faster to
    # differentiate.
    def gibbs(x, y):
        a, b = kernel.lengthscale(x), kernel.lengthscale(y)
        s = a**2 + b**2
        return jnp.prod(jnp.sqrt(2 * a * b / s)) * jnp.exp(-jnp.sum((x - y) ** 2 / s))

    return gibbs


def published(case: Case, n: int, m: int):
    interior, boundary, other, key = points(case, n, m)
    jets, unknowns = case.jets, case.unknowns
    p = len(jets)

    def residual(values, x):  # values: (unknowns, jets)
        u = {name: Values(dict(zip(jets, v))) for name, v in zip(unknowns, values)}
        return jnp.ravel(case.operator(u["u"] if unknowns == ("u",) else u, x))

    def along(f, argnum, index):
        if index == "laplacian":
            second = [along(f, argnum, index) for index in ((2, 0), (0, 2))]
            return lambda *xy: second[0](*xy) + second[1](*xy)
        for axis, order in enumerate(index):
            for _ in range(order):
                f = lambda *xy, f=f, axis=axis: jax.grad(f, argnum)(*xy)[axis]
        return f

    def pairs(f, x, y):
        return jax.vmap(lambda a: jax.vmap(lambda b: f(a, b))(y))(x)

    # All derivatives at `x`, and values at `edge`, against those at the conditions.
    def rows(k, x, edge):
        at = [(along(k, 0, i), x) for i in jets] + [(k, edge)]
        return jnp.concatenate(
            [
                jnp.concatenate(
                    [pairs(along(f, 1, j), a, interior) for j in jets]
                    + [pairs(f, a, boundary)],
                    axis=1,
                )
                for f, a in at
            ]
        )

    def loss(k):
        fn = kernel_function(k)
        gram = rows(fn, interior, boundary)
        gram = gram + nugget * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
        # The equation linearised at zero, as a matrix; the unknowns are independent.
        start = jnp.zeros((n, len(unknowns), p))
        slopes = jax.vmap(jax.jacfwd(residual))(start, interior)  # (n, q, unknowns, p)
        equation = [
            [
                jnp.concatenate([jnp.diag(slopes[:, q, i, j]) for j in range(p)], 1)
                for i in range(len(unknowns))
            ]
            for q in range(slopes.shape[1])
        ]
        data = jnp.eye(len(gram))[p * n :]
        per_unknown = []
        for i in range(len(unknowns)):
            edge = [data if j == i else 0 * data for j in range(len(unknowns))]
            columns = [jnp.pad(row[i], ((0, 0), (0, m))) for row in equation]
            per_unknown.append(jnp.concatenate(columns + edge))
        offset = jax.vmap(residual)(start, interior).T.reshape(-1)
        rhs = [-offset] + [jax.vmap(case.boundary)(boundary)] * len(unknowns)
        matrix = sum(jacobian @ gram @ jacobian.T for jacobian in per_unknown)
        matrix = matrix + nugget * jnp.diag(jnp.diagonal(matrix))
        factor = jax.scipy.linalg.cho_factor(matrix)
        weights = jax.scipy.linalg.cho_solve(factor, jnp.concatenate(rhs))
        cross = rows(fn, other, boundary)[: p * n]
        values = [(cross @ (j.T @ weights)).reshape(p, n).T for j in per_unknown]
        return 0.5 * jnp.sum(jax.vmap(residual)(jnp.stack(values, 1), other) ** 2)

    return loss, case.kernel(key)


#
# Measuring
#


# See "Compile time" in docs/performance.md.
FEWER_MODULES = {"xla_cpu_use_fusion_emitters": False}


def alone(fn: Callable, repeats: int, compiler_options=None) -> Callable:
    def measured(*arguments) -> dict[str, Any]:
        loss, k = fn(*arguments)
        gradient = eqx.filter_value_and_grad(loss)
        step, compile_s = compiled(gradient, k, compiler_options=compiler_options)
        (value, _), times = timed(step, k, repeats=repeats)
        return dict(objective=float(value), **times, compile_s=round(compile_s, 1))

    return measured


ways: dict[str, Callable] = {
    "published": alone(published, 2),
    "frozen": alone(ft.partial(ours, eb.FrozenAdjoint()), 6),
    "implicit": alone(ft.partial(ours, eb.FixedPointAdjoint()), 6),
    "frozen, less memory": alone(
        ft.partial(ours, eb.FrozenAdjoint()), 6, FEWER_MODULES
    ),
    "learn frozen": ft.partial(learning, "frozen"),
    "learn implicit": ft.partial(learning, "implicit"),
}


def measure(name: str, way: str, n: int) -> dict[str, Any]:
    return dict(
        case=name,
        points=n,
        boundary=n // 3,
        who="published" if way == "published" else "this",
        way=way,
        **ways[way](cases[name], n, n // 3),
        peak_mb=peak_mb(),
    )


# Beyond this it does not fit into 24 GiB.
largest_published = dict(burgers=300, deep=300, eikonal=300)


def main(names, sizes):
    header = ("case", "points", "way", "a step", "compile", "memory")
    print("{:13}{:>12}{:>21}{:>11}{:>10}{:>10}".format(*header), file=sys.stderr)
    for name in names:
        for n in sizes:
            for way in ways:
                if way == "published" and n > largest_published.get(name, 900):
                    continue
                row = in_own_process(
                    __file__, "--case", name, "--points", n, "--way", way
                )
                print(
                    f"{name:13}{f'{n} + {n // 3}':>12}{way:>21}{row['step_s']:9.3f} s"
                    f"{row['compile_s']:8.1f} s{row['peak_mb']:7d} MB",
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=cases, action="append")
    parser.add_argument("--points", type=int, action="append")
    parser.add_argument("--way", choices=ways, help="one measurement, in this process")
    given = parser.parse_args()
    if given.way:
        (name,), (n,) = given.case, given.points
        print(json.dumps(measure(name, given.way, n)))
    else:
        main(given.case or cases, given.points or (99, 300, 900))
