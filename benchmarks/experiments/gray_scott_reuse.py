"""The kernel learned for Gray-Scott, reused for three other initial values.

They are solved at once, by one solve under `jax.vmap`.
"""

import equinox as eqx
import eqx_bilevel as eb
import gray_scott
import jax
import jax.numpy as jnp
from common import Published, Run, values
from references import gray_scott as reference, gray_scott_starts


title = "Gray-Scott, kernel reused"
# Against an exact reference. The learned kernel is that of the published code.
published = Published(
    {
        "a: u": (1.2e-4, None),
        "a: v": (2.2e-4, None),
        "b: u": (1.6e-4, None),
        "b: v": (1.5e-4, None),
        "c: u": (6.7e-4, None),
        "c: v": (9.6e-4, None),
    },
    58.5,
)


class Start(eqx.Module):
    # The coefficients of cos(k pi x) in the initial values of u and v.
    u: jax.Array
    v: jax.Array

    def __call__(self, x):
        modes = jnp.cos(jnp.pi * x[1] * jnp.arange(9.0))
        return {"u": jnp.sum(self.u * modes), "v": jnp.sum(self.v * modes)}


def unit(k):
    return jnp.zeros(9).at[k].set(1.0)


starts = Start(
    u=jnp.stack([unit(7), -unit(4), unit(8)]),
    v=jnp.stack([-unit(2), unit(5), unit(5)]),
)


@eqx.filter_jit
def solve_all(prior, conditions, starts):
    equation, early, sides = conditions

    def solve(start):
        early_with = eb.Condition(values, early.points, start)
        return eb.solve(prior, [equation, early_with, sides], throw=False)

    return eqx.filter_vmap(solve)(starts)


def run(key, n=600):
    learned = gray_scott.run(key, n).learned
    everything = lambda prior: solve_all(prior, learned.conditions, starts)
    untrained = lambda: everything(gray_scott.prior)
    return Run(untrained, everything(learned.prior), learned)


def compare(solutions):
    return beside_truth(eqx.filter_vmap(gray_scott.on_grid)(solutions))


def beside_truth(found):
    pairs = {}
    for i, case in enumerate("abc"):
        truth = reference(gray_scott.t, gray_scott.x, *gray_scott_starts[case])
        for name, known in zip("uv", truth):
            pairs[f"{case}: {name}"] = (found[name][i], known)
    return pairs
