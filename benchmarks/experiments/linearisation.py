"""When is the frozen gradient, of the linearised inner problem, good enough?

    python benchmarks/experiments/linearisation.py            # prints a table
    python benchmarks/experiments/linearisation.py --keep     # writes the results kept

For Burgers' equation over viscosities, the elliptic equation over strengths of its
nonlinearity, and both over numbers of points: near where learning ends (at nine tenths
of the lengthscales; at the end itself both vanish) and farther off (at half of them),
how far is the frozen gradient from the exact one? Where does learning end with each,
and with the way of the paper: frozen gradients, and one linearised solve for each step?
The exact one is checked by central differences of converged solves. The predictor is
the spectral radius of the Gauss-Newton map, which a solution knows. Medians over seeds
of the points.
"""

import time

import burgers
import elliptic
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from reporting import errors, markdown, study


class Elliptic(eqx.Module):
    strength: jax.Array

    def __call__(self, u, x):
        return -u.laplacian + self.strength * u.value**3


class Source(eqx.Module):
    strength: jax.Array

    def __call__(self, x):
        linear = -jnp.trace(jax.hessian(elliptic.exact)(x))
        return linear + self.strength * elliptic.exact(x) ** 3


def burgers_stated(viscosity, key, n):
    return burgers.stated(key, n, burgers.Burgers(viscosity))


def elliptic_stated(strength, key, n):
    return elliptic.stated(key, n, Elliptic(strength), Source(strength))


def burgers_error(viscosity, solution):
    return errors(burgers.compare(solution, float(viscosity)))["u"]["max"]


def elliptic_error(strength, solution):
    return errors(elliptic.compare(solution))["u"]["max"]


problems = dict(
    burgers=(burgers_stated, burgers_error, (0.1, 0.05, 0.02, 0.01)),
    elliptic=(elliptic_stated, elliptic_error, (0.1, 1.0, 10.0, 100.0)),
)


@eqx.filter_jit
def gradient(prior, conditions, objective, adjoint):
    def loss(prior):
        solution = eb.solve(prior, conditions, adjoint=adjoint, throw=False)
        return jnp.log(objective(solution)), solution

    (_, solution), found = eqx.filter_value_and_grad(loss, has_aux=True)(prior)
    return ravel_pytree(found)[0], solution


@eqx.filter_jit
def difference(prior, conditions, objective, direction, step=1e-3):
    # Of converged solves.
    vector, unravel = ravel_pytree(eqx.filter(prior, eqx.is_array))
    static = eqx.filter(prior, eqx.is_array, inverse=True)

    def loss(vector):
        moved = eqx.combine(unravel(vector), static)
        return jnp.log(objective(eb.solve(moved, conditions, throw=False)))

    ahead, behind = loss(vector + step * direction), loss(vector - step * direction)
    return (ahead - behind) / (2 * step)


def compare(prior, conditions, objective):
    frozen, solution = gradient(prior, conditions, objective, eb.FrozenAdjoint())
    exact, _ = gradient(prior, conditions, objective, eb.FixedPointAdjoint())
    length = jnp.linalg.norm(exact)
    check = difference(prior, conditions, objective, exact / length)
    cosine = frozen @ exact / (jnp.linalg.norm(frozen) * length)
    return dict(
        {"spectral radius": float(solution.spectral_radius())},
        angle=float(jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))),
        difference=float(jnp.linalg.norm(frozen - exact) / length),
        check=float(jnp.abs(check - length) / length),
        converged=bool(solution.result == eb.RESULTS.successful),
    )


ways = {
    "one step": dict(gradient="frozen", max_inner_steps=1),
    "frozen": dict(gradient="frozen"),
    "implicit": dict(gradient="implicit"),
}


def run(name, regime, n, seed=0):
    stated, error, _ = problems[name]
    regime = jnp.array(regime)
    conditions, objective = stated(regime, jax.random.key(seed), n)
    prior = eb.GaussianProcess(eb.Scaled(eb.Gaussian([0.3, 0.3]), 1.0))
    row = dict(problem=name, regime=float(regime), points=n, seed=seed)
    learned = {}
    for way, options in ways.items():
        began = time.perf_counter()
        options = dict(steps=40, throw=False) | options
        learned[way] = eb.learn(prior, conditions, objective, **options)
        row[way] = dict(
            objective=float(learned[way].objective),
            error=error(regime, learned[way].solution),
            steps=len(learned[way].history["objective"]),
            seconds=round(time.perf_counter() - began, 2),
        )
    best = learned["implicit"].prior.kernel
    for where, factor in (("near", 0.9), ("far", 0.5)):
        there = eb.GaussianProcess(eb.rescale(best, factor))
        row[where] = compare(there, conditions, objective)
    return row


# Columns of two tables: what of which part of a row, and how to write it.
def _columns(parts, *keys):
    return {f"{key}: {part}": (part, key, form) for key, form in keys for part in parts}


gradients = _columns(
    ("near", "far"),
    ("spectral radius", ".1e"),
    ("angle", ".1f"),
    ("difference", ".1e"),
    ("check", ".1e"),
)
learning = _columns(tuple(ways), ("error", ".1e"), ("steps", ".0f"), ("seconds", ".1f"))


def table(rows):
    return "\n\n".join(_table(rows, columns) for columns in (gradients, learning))


def _table(rows, columns):
    lines = []
    case = lambda row: (row["problem"], row["regime"], row["points"])
    for each in dict.fromkeys(map(case, rows)):
        some = [row for row in rows if case(row) == each]
        cells = [
            format(np.median([row[part][key] for row in some]), form)
            for part, key, form in columns.values()
        ]
        lines.append((*each, *cells))
    return markdown(["problem", "regime", "points", *columns], lines)


def rows(names, sizes=(100, 300), seeds=5):
    for name in names:
        *_, regimes = problems[name]
        for n in sizes:
            for regime in regimes:
                for seed in range(seeds):
                    yield run(name, regime, n, seed)


if __name__ == "__main__":
    study("linearisation", "problem", __doc__, problems, rows, table)
