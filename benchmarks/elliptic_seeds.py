"""How much the elliptic experiment of `tutorials/elliptic.py` depends on the points.

Prints one line of JSON for each seed and nugget to stdout, and a summary to stderr. The
lengthscale is learned from the validation residual only; errors are reported.

    python benchmarks/elliptic_seeds.py --seeds 5 > elliptic_seeds.jsonl
"""

import argparse
import json
import sys
import time

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np


jax.config.update("jax_enable_x64", True)


def elliptic(u, x):
    return -u.laplacian + u.value**3


def value(u, x):
    return u.value


def exact(x):
    return jnp.sin(jnp.pi * x).prod() + 4 * jnp.sin(4 * jnp.pi * x).prod()


def source(x):
    return -jnp.trace(jax.hessian(exact)(x)) + exact(x) ** 3


square = eb.Box(lower=[0.0, 0.0], upper=[1.0, 1.0])
test_points = square.grid(60)


def run(seed, nugget):
    key1, key2, key3 = jax.random.split(jax.random.key(seed), 3)
    interior = square.interior(900, key=key1)
    boundary = square.boundary(300, key=key2)
    conditions = [
        eb.Condition(elliptic, interior, source, nugget=nugget, name="pde"),
        eb.Condition(value, boundary, nugget=nugget, name="boundary"),
    ]
    objective = eb.ValidationResidual(square.interior(900, key=key3))
    prior = eb.GaussianProcess(eb.Gaussian(0.1))
    began = time.perf_counter()
    learned = eb.learn(prior, conditions, objective, steps=50, throw=False)
    seconds = time.perf_counter() - began
    solution = learned.solution
    error = solution(test_points) - jax.vmap(exact)(test_points)
    return dict(
        seed=seed,
        nugget="automatic" if nugget is None else nugget,
        lengthscale=float(learned.prior.kernel.lengthscale.value),
        max_error=float(jnp.max(jnp.abs(error))),
        rms_error=float(jnp.sqrt(jnp.mean(error**2))),
        seconds=round(seconds, 2),
        steps=len(learned.history["objective"]),
        jitter=float(solution.stats["jitter"]),
        spectral_radius=float(solution.spectral_radius()),
        objective=float(learned.objective),
    )


def summarise(rows):
    nuggets = dict.fromkeys(row["nugget"] for row in rows)
    for nugget in nuggets:
        for name in ("max_error", "rms_error", "seconds"):
            values = [row[name] for row in rows if row["nugget"] == nugget]
            print(
                f"nugget {nugget}, {len(values)} seeds, {name}: "
                f"median {np.median(values):.2g}, worst {np.max(values):.2g}",
                file=sys.stderr,
            )


def main(seeds):
    rows = []
    for nugget in (1e-10, None):
        for seed in range(seeds):
            rows.append(run(seed, nugget))
            print(json.dumps(rows[-1]), flush=True)
    summarise(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    main(parser.parse_args().seeds)
