"""Gray-Scott with the three other initial values, and a kernel learned for each."""

import gray_scott
import gray_scott_reuse
import jax
import jax.numpy as jnp
from common import Run
from gray_scott_reuse import starts


title = "Gray-Scott, learned anew"
published = gray_scott_reuse.published._replace(seconds=None)


def run(key, n=600):
    each = [jax.tree.map(lambda s, i=i: s[i], starts) for i in range(3)]
    runs = [gray_scott.run(key, n, start) for start in each]
    untrained = lambda: [one.untrained() for one in runs]
    worst = max((one.learned for one in runs), key=lambda one: one.objective)
    return Run(untrained, [one.solution for one in runs], worst)


def compare(solutions):
    found = [gray_scott.on_grid(solution) for solution in solutions]
    return gray_scott_reuse.beside_truth(
        {name: jnp.stack([one[name] for one in found]) for name in "uv"}
    )
