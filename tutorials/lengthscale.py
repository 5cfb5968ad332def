# %% [markdown]
# # Learning a lengthscale
#
# Every kernel has a lengthscale, and how good a solution is depends on it more than on
# anything else. This page shows by how much, how it can be told without knowing the
# solution, and that [`eqx_bilevel.learn`][] finds the right one.
#
# The equation is $-\Delta u + u^3 = f$ on the unit square, with $u = 0$ on the
# boundary. The source $f$ is made such that the solution is known.

# %%
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)


def exact(x):
    waves = lambda k, l: jnp.sin(k * jnp.pi * x[0]) * jnp.sin(l * jnp.pi * x[1])
    return waves(1, 1) + 0.5 * waves(3, 2)


def elliptic(u, x):
    return -u.laplacian + u.value**3


def source(x):
    return -jnp.trace(jax.hessian(exact)(x)) + exact(x) ** 3


def value(u, x):
    return u.value


square = eb.Box([0.0, 0.0], [1.0, 1.0])
keys = jax.random.split(jax.random.key(0), 3)
conditions = [
    eb.Condition(elliptic, square.interior(100, key=keys[0]), source),
    eb.Condition(value, square.boundary(40, key=keys[1])),
]

# %% [markdown]
# ## Two curves
#
# At the points where the equation is imposed it holds for every kernel. What tells
# kernels apart is whether it also holds *between* them. So the objective is the
# residual at other points, where it was not imposed: half the sum of its squares. To
# compute it nobody needs to know the solution.

# %%
objective = eb.ValidationResidual(square.interior(100, key=keys[2]))
grid = square.grid(31)
truth = jax.vmap(exact)(grid)


@eqx.filter_jit
def judge(lengthscale):
    prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
    solution = eb.solve(prior, conditions)
    error = jnp.sqrt(jnp.mean((solution(grid) - truth) ** 2))
    return objective(solution), error, solution.spectral_radius()


lengthscales = jnp.geomspace(0.05, 1.0, 25)
objectives, errors, radii = map(jnp.array, zip(*map(judge, lengthscales)))

# %% [markdown]
# ## Learning
#
# `learn` minimises the objective. It starts with a search over a few scales, since the
# curve is flat where lengthscales are shorter than the distance between points; then
# come quasi-Newton steps.

# %%
start = eb.GaussianProcess(eb.Gaussian(0.1))
learned = eb.learn(start, conditions, objective)
# Numbers in kernels are stored as parameters. `unwrap` makes them numbers again.
found = eb.unwrap(learned.prior).kernel.lengthscale
_, error, radius = judge(found)
_, error_before, _ = judge(jnp.array(0.1))
print(f"learned lengthscale {found:.3f}, after {len(learned.history['best'])} steps")
print(f"RMS error at 0.1: {error_before:.1e}, at the learned one: {error:.1e}")

# %%
figure, axes = plot.subplots(1, 2, sharex=True)
for ax, curve, label in zip(axes, (objectives, errors), ("objective", "RMS error")):
    ax.loglog(lengthscales, curve)
    ax.axvline(found, color="C1", linestyle="--")
    ax.set(xlabel="lengthscale", ylabel=label)

# %% [markdown]
# The dashed line is where learning ended: next to the bottom of the right-hand curve,
# although only the left-hand one was looked at. To the left of it the kernel forgets
# what it was told before it reaches the next point. To the right the matrix is so
# ill-conditioned that rounding, and the nugget which keeps it at bay, decide. A
# lengthscale that is off by a factor of two costs orders of magnitude on either side.
#
# ## Which gradient?
#
# The solution depends on the lengthscale in two ways: through the linearised problem,
# and through the function at which the equation was linearised. The *implicit* gradient
# has both, and is the default. The *frozen* one leaves out the second, as the
# [paper](https://arxiv.org/abs/2510.05568) does. The most by which they differ,
# relatively, is about the [spectral radius](../method.md#two-gradients) of what a
# Gauss-Newton step does to changes of that function.

# %%
frozen = eb.learn(start, conditions, objective, gradient="frozen")
print(f"with frozen gradients: {eb.unwrap(frozen.prior).kernel.lengthscale:.3f}")
print(f"spectral radius at the learned lengthscale: {radius:.0e}")
print(f"the largest one of the curves above:        {radii.max():.0e}")

# %% [markdown]
# Where the points resolve the solution, what a step does hardly depends on where it is
# linearised, and both gradients lead to the same place. Where they do not, with too few
# points or a strong nonlinearity, only the implicit one is the gradient of what is
# minimised.
#
# ## For your equation
#
# - A lengthscale for each dimension: `eb.Gaussian([0.1, 0.1])`. For one that varies
#   from place to place see the [next page](./burgers_network.md).
# - `learned.solution` is the solution, and `learned.prior` goes into the next problem.
# - `eb.learn(..., verbose=True)` prints what it does.
