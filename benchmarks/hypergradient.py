"""One outer gradient step on Burgers' equation with a network for its lengthscales.

Against the plain way, written here as in the code published with arXiv:2510.05568: the
Gram matrix of all derivatives at all points by nested automatic differentiation, which
then also goes through the factorisation. Each way runs in a process of its own, for its
memory to be known:

    python benchmarks/hypergradient.py
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import time

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp


jax.config.update("jax_enable_x64", True)

viscosity, nugget = 0.02, 1e-10
box = eb.Box([0.0, -1.0], [1.0, 1.0])
faces = [(0, "lower"), (1, "lower"), (1, "upper")]


def burgers(u, x):
    return u.d(0) + u.value * u.d(1) - viscosity * u.d(1, 1)


def value(u, x):
    return u.value


def initial(x):
    return jnp.where(x[0] == 0.0, -jnp.sin(jnp.pi * x[1]), 0.0)


def points(n: int, m: int):
    keys = jax.random.split(jax.random.key(0), 4)
    interior, other = box.interior(n, key=keys[0]), box.interior(n, key=keys[1])
    return interior, box.boundary(m, faces=faces, key=keys[2]), other, keys[3]


def kernel(key):
    network = eb.LengthscaleNetwork(2, 2, 50, 2, scale=0.25, key=key)
    return eb.Gibbs(network)


def ours(adjoint, n: int, m: int):
    interior, boundary, other, key = points(n, m)
    conditions = [
        eb.Condition(burgers, interior, nugget=nugget),
        eb.Condition(value, boundary, initial, nugget=nugget),
    ]
    objective = eb.ValidationResidual(other)
    first = eb.solve(eb.GaussianProcess(kernel(key)), conditions)

    # Near the solution, as in the course of learning: one linearised solve.
    def loss(k):
        solver = dict(adjoint=adjoint, initial=first, max_steps=1, throw=False)
        return objective(eb.solve(eb.GaussianProcess(k), conditions, **solver))

    return loss, kernel(key)


def plain(n: int, m: int):
    interior, boundary, other, key = points(n, m)
    z = jnp.stack([0.5 * jnp.sin(jnp.pi * interior[:, 1])] * 2, 1)

    def jets(f, argnum):  # The value, and along t, x, xx.
        along_t = lambda *xy: jax.jacfwd(f, argnum)(*xy)[..., 0]
        along_x = lambda *xy: jax.jacfwd(f, argnum)(*xy)[..., 1]
        along_xx = lambda *xy: jax.jacfwd(along_x, argnum)(*xy)[..., 1]
        return [f, along_t, along_x, along_xx]

    def rows(k, left, right):
        pairs = lambda f, x, y: jax.vmap(lambda a: jax.vmap(lambda b: f(a, b))(y))(x)
        one = [jets(f, 1) for f in jets(k, 0)]

        def inside(i):
            blocks = [pairs(g, left, right) for g in one[i]]
            return jnp.concatenate([*blocks, pairs(one[i][0], left, boundary)], axis=1)

        return inside, pairs, one

    def loss(k):
        inside, pairs, one = rows(k, interior, interior)
        edge = [pairs(g, boundary, interior) for g in one[0]]
        edge = jnp.concatenate([*edge, pairs(one[0][0], boundary, boundary)], axis=1)
        gram = jnp.concatenate([*map(inside, range(4)), edge])
        gram = gram + nugget * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
        # The linearised equation, as a matrix.
        one_each = lambda c: jnp.diag(jnp.broadcast_to(c, (n,)))
        terms = (z[:, 1], 1.0, z[:, 0], -viscosity)
        pde = jnp.concatenate([*map(one_each, terms), jnp.zeros((n, m))], axis=1)
        data = jnp.eye(len(gram))[4 * n :]
        jacobian = jnp.concatenate([pde, data])
        rhs = jnp.concatenate([z[:, 0] * z[:, 1], jax.vmap(initial)(boundary)])
        matrix = jacobian @ gram @ jacobian.T
        matrix = matrix + nugget * jnp.diag(jnp.diagonal(matrix))
        factor = jax.scipy.linalg.cho_factor(matrix)
        weights = jacobian.T @ jax.scipy.linalg.cho_solve(factor, rhs)
        inside, _, _ = rows(k, other, interior)
        u, u_t, u_x, u_xx = (inside(i) @ weights for i in range(4))
        return 0.5 * jnp.sum((u_t + u * u_x - viscosity * u_xx) ** 2)

    return loss, kernel(key)


ways = dict(
    plain=plain,
    frozen=lambda n, m: ours(eb.FrozenAdjoint(), n, m),
    implicit=lambda n, m: ours(eb.FixedPointAdjoint(), n, m),
)


def measure(way: str, n: int, m: int) -> None:
    loss, k = ways[way](n, m)
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    start = time.perf_counter()
    compiled = step.lower(k).compile()
    compile_time = time.perf_counter() - start
    seconds = []
    for _ in range(2 if way == "plain" else 6):
        start = time.perf_counter()
        jax.block_until_ready(compiled(k))
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| {way} | {n} + {m} | {min(seconds):.3f} s | {compile_time:.1f} s "
        f"| {memory:.2f} GiB |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", nargs="?", choices=ways)
    parser.add_argument("--points", nargs=2, type=int, default=(300, 100))
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, *arguments.points)
    else:
        print("| way | points | a step | compilation | memory of the process |")
        print("|---|---|---|---|---|", flush=True)
        for way, n, m in [(w, 300, 100) for w in ways] + [
            (w, 900, 300) for w in ways if w != "plain"
        ]:
            command = [sys.executable, str(pathlib.Path(__file__)), way, "--points"]
            subprocess.run([*command, str(n), str(m)], check=True)
