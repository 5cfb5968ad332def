# %% [markdown]
# # Saving, resuming, continuing
#
# Learning can take minutes or hours. This page watches it, stops it, goes on from where
# it stopped, and keeps what was learned for another program.
#
# The example is the boundary layer of $-\varepsilon u'' + u' = 1$ with $u(0) = u(1) =
# 0$, and a kernel whose lengthscale is a small network.

# %%
import json
import pathlib
import tempfile

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

epsilon = jnp.array(0.02)  # An array: a new value compiles nothing anew.
domain = eb.Box(0.0, 1.0)


def layer(u, x):
    return -epsilon * u.d(0, 0) + u.d(0)


def value(u, x):
    return u.value


def exact(x):
    return x[0] - jnp.expm1(x[0] / epsilon) / jnp.expm1(1 / epsilon)


points = domain.interior(50, method="grid")
conditions = [
    # A nugget somewhat above rounding, so that the objective is smooth.
    eb.Condition(layer, points, 1.0, nugget=1e-12, name="layer"),
    eb.Condition(value, domain.boundary(2), name="ends"),
]
key1, key2 = jax.random.split(jax.random.key(0))
objective = eb.ValidationResidual(domain.interior(60, key=key1))


def make_prior():
    network = eb.LengthscaleNetwork(1, "scalar", 8, 1, scale=0.3, key=key2)
    return eb.GaussianProcess(eb.Gibbs(network))


# %% [markdown]
# ## Watching
#
# `verbose=True` prints a line for each step, `verbose="bar"` shows a progress bar. A
# `callback` gets all there is to know of a step, as an [`eqx_bilevel.Progress`][]. It
# can write a log, draw a picture, or stop learning: here once the objective is small
# enough.

# %%
log = []


def watch(progress):
    log.append((progress.step, progress.objective, progress.best))
    return progress.best < 0.005


learned = eb.learn(
    make_prior(), conditions, objective, scale_search=False, steps=60, callback=watch
)
print(f"{len(log)} steps, objective {learned.objective:.1e}")
plot.learning(learned)

# %% [markdown]
# `learned.history` is a dictionary of arrays, one entry for each step, that
# `pandas.DataFrame` takes as it is.

# %%
{name: values[-3:] for name, values in learned.history.items()}

# %% [markdown]
# ## Resuming
#
# With `checkpoint`, all that the next step depends on is in a file. It is written after
# each step, or less often if writing takes long, and at the end: Ctrl-C keeps all steps
# that were finished. Here learning ends after ten of them, as if the process had died.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
path = folder / "run.eqx"
short = eb.learn(make_prior(), conditions, objective, steps=10, checkpoint=path)

# %% [markdown]
# The same call goes on from there. It ends with the same numbers as a run that was
# never interrupted, to the last bit.

# %%
resumed = eb.learn(make_prior(), conditions, objective, steps=20, checkpoint=path)
whole = eb.learn(make_prior(), conditions, objective, steps=20)
print("the same:", np.array_equal(resumed.history["best"], whole.history["best"]))

# %% [markdown]
# The first line of the file is JSON, for a look from outside:

# %%
with open(path, "rb") as file:
    rows = json.loads(file.readline())["rows"]
print(len(rows), "steps, the last of them:")
rows[-1]

# %% [markdown]
# ## Keeping what was learned
#
# Priors, conditions and solutions are PyTrees, and are saved like any other Equinox
# model. To load one, make one of the same structure. For a learned prior that is the
# one it was learned from; for a solution it is
# `eqx.filter_eval_shape` of the solve, which computes nothing.

# %%
eqx.tree_serialise_leaves(folder / "prior.eqx", resumed.prior)
eqx.tree_serialise_leaves(folder / "solution.eqx", resumed.solution)

prior = eqx.tree_deserialise_leaves(folder / "prior.eqx", make_prior())
like = eqx.filter_eval_shape(eb.solve, prior, conditions)
solution = eqx.tree_deserialise_leaves(folder / "solution.eqx", like)
x = domain.grid(200)
print("the same:", jnp.all(solution(x) == resumed.solution(x)))
plot.error(solution, exact, domain)

# %% [markdown]
# ## Continuing elsewhere
#
# A learned prior is where learning at a related problem starts: here with a layer
# that is half as wide. In several such steps sharp fronts are reached.

# %%
epsilon = jnp.array(0.01)
narrower = eb.learn(prior, conditions, objective, steps=30, scale_search=False)
as_it_is = eb.solve(prior, conditions)
print(f"objective, with the learned prior as it is: {objective(as_it_is):.1e}")
print(f"and learned further:                        {narrower.objective:.1e}")
