"""Gray-Scott with the three other initial values, and a kernel learned for each, from
the one that is reused."""

import eqx_bilevel as eb
import gray_scott
import gray_scott_reuse
import jax
import jax.numpy as jnp
from common import Run
from gray_scott_reuse import starts


title = "Gray-Scott, learned anew"
published = gray_scott_reuse.published._replace(seconds=None)


def run(key, n=600):
    reused = gray_scott.run(key, n).learned.prior
    each = [jax.tree.map(lambda s, i=i: s[i], starts) for i in range(3)]
    stated = [gray_scott.stated(key, n, start) for start in each]
    learn = lambda problem: eb.learn(reused, *problem, scale_search=False, throw=False)
    solve = lambda problem: eb.solve(gray_scott.prior, problem[0], throw=False)
    learned = [learn(problem) for problem in stated]
    untrained = lambda: [solve(problem) for problem in stated]
    worst = max(learned, key=lambda one: one.objective)
    return Run(untrained, [one.solution for one in learned], worst)


def compare(solutions):
    found = [gray_scott.on_grid(solution) for solution in solutions]
    return gray_scott_reuse.beside_truth(
        {name: jnp.stack([one[name] for one in found]) for name in "uv"}
    )
