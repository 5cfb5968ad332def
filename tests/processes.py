"""One of several processes that solve a problem together, and write what they found.

python tests/processes.py <directory> <address> <number of them> <which> <what>
"""

import json
import os
import pathlib
import sys

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np


def value(u, x):
    return u.value


def stated(lengthscale):
    square = eb.Box([0.0, 0.0], [1.0, 1.0])
    keys = jax.random.split(jax.random.key(0), 3)
    conditions = [
        eb.Condition(
            lambda u, x: -u.laplacian + u.value**3,
            square.interior(101, key=keys[0]),
            20.0,
            nugget=1e-8,
        ),
        eb.Condition(value, square.boundary(30, key=keys[1]), nugget=1e-8),
    ]
    validation = eb.ValidationResidual(square.interior(20, key=keys[2]), target=20.0)
    return eb.GaussianProcess(eb.Gaussian(lengthscale)), conditions, validation


SOLVER = eb.GaussNewton(linear_solver=eb.MatrixFree(rank=131))


def solved(directory: pathlib.Path | None = None):
    del directory
    prior, conditions, _ = stated(0.4)
    solution = eb.solve(prior, conditions, SOLVER)
    x = jnp.array([[0.3, 0.4], [0.6, 0.9]])
    basis = solution._factor.basis
    return dict(
        values=np.asarray(solution(x)).tolist(),
        share=[list(s.data.shape) for s in basis.addressable_shards],
    )


def learned(directory: pathlib.Path | None = None, *, dies: bool = False):
    seen = []

    def callback(progress):
        seen.append(progress.step)
        if dies and progress.step == 3 and jax.process_index() == 1:
            os._exit(1)

    prior, conditions, validation = stated(0.4)
    found = eb.learn(
        prior,
        conditions,
        validation,
        solver=SOLVER,
        scale_search=False,
        steps=6,
        callback=callback,
        checkpoint=None if directory is None else directory / "run",
    )
    return dict(
        lengthscale=float(eb.unwrap(found.prior).kernel.lengthscale),
        objectives=found.history["objective"].tolist(),
        seen=seen,
    )


TASKS = dict(
    solve=solved,
    learn=learned,
    die=lambda directory: learned(directory, dies=True),
)


def main(where: str, address: str, num: int, which: int, what: str):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # Compiles faster.
    timeouts = dict(heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10)
    jax.distributed.initialize(address, num, which, **timeouts)
    assert jax.device_count() == num and jax.local_device_count() == 1
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((num,), ("points",), axis_types=(auto,))
    with jax.set_mesh(mesh):
        found = TASKS[what](pathlib.Path(where))
    (pathlib.Path(where) / f"{what}-{which}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    where, address, num, which, what = sys.argv[1:]
    main(where, address, int(num), int(which), what)
