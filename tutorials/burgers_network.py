# %% [markdown]
# # A lengthscale that varies: Burgers' equation
#
# Burgers' equation $u_t + u u_x = \nu u_{xx}$ starts from a sine wave and makes a front
# of it. Next to the front the solution changes fast, and elsewhere slowly: no single
# lengthscale is right. Here it is a small neural network of the point, learned from
# what is left of the equation.
#
# The exact solution, to compare with, is that of Cole and Hopf: a quotient of two
# Gaussian integrals.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

viscosity = 0.05
nodes, weights = map(jnp.asarray, np.polynomial.hermite.hermgauss(100))


def exact(x):
    t, x = x
    y = x - jnp.sqrt(4 * viscosity * t) * nodes
    exponent = (1 + jnp.cos(jnp.pi * y)) / (2 * jnp.pi * viscosity)
    density = weights * jnp.exp(-exponent)
    return -jnp.sum(density * jnp.sin(jnp.pi * y)) / jnp.sum(density)


def burgers(u, x):
    return u.d(0) + u.value * u.d(1) - viscosity * u.d(1, 1)


def value(u, x):
    return u.value


domain = eb.Box([0.0, -1.0], [1.0, 1.0])  # (t, x)
keys = jax.random.split(jax.random.key(0), 5)
walls = [(1, "lower"), (1, "upper")]
start = domain.face(0, "lower", 20, key=keys[1])
conditions = [
    eb.Condition(burgers, domain.interior(150, key=keys[0]), name="burgers"),
    eb.Condition(value, start, lambda x: -jnp.sin(jnp.pi * x[1])),
    eb.Condition(value, domain.boundary(40, faces=walls, key=keys[2])),
]

# %% [markdown]
# ## One lengthscale for each dimension
#
# First the best that a Gaussian kernel can do. The objective is the residual at points
# where the equation is not imposed. There are twice as many of them: a network has many
# weights, and should find no place to hide.

# %%
objective = eb.ValidationResidual(domain.interior(300, key=keys[3]))
prior = eb.GaussianProcess(eb.Gaussian([0.3, 0.3]))
gaussian = eb.learn(prior, conditions, objective)
print("lengthscales in t and x:", eb.unwrap(gaussian.prior).kernel.lengthscale)

# %% [markdown]
# ## A network
#
# The kernel of Gibbs takes any positive function of the point for its lengthscale. A
# [`eqx_bilevel.LengthscaleNetwork`][] is one. Its weights are learned like all other
# hyperparameters.

# %%
network = eb.LengthscaleNetwork(2, "scalar", 8, 1, scale=0.3, key=keys[4])
prior = eb.GaussianProcess(eb.Gibbs(network))
neural = eb.learn(prior, conditions, objective, steps=100)

plot.learning(neural)

# %%
grid = domain.grid((31, 81))
truth = jax.vmap(exact)(grid)
errors = {}
print("           objective   RMS error   largest error")
for name, learned in dict(Gaussian=gaussian, network=neural).items():
    error = learned.solution(grid) - truth
    errors[name] = jnp.sqrt(jnp.mean(error**2))
    row = learned.objective, errors[name], jnp.max(jnp.abs(error))
    print("{:8s}   {:9.1e}   {:9.1e}   {:13.1e}".format(name, *row))

# %%
names = ("t", "x")
plot.slices(neural, domain, at=[0.0, 0.25, 0.5, 1.0], exact=exact, names=names)

# %%
figure, (left, right) = plot.subplots(1, 2)
plot.solution(neural, domain, names=names, ax=left)
plot.lengthscales(eb.unwrap(neural.prior).kernel, domain, names=names, ax=right)

# %% [markdown]
# Nobody told the network where the front is. It has made the lengthscale short there
# and longer elsewhere. That this is better than any single lengthscale, the objective
# says without an exact solution.
#
# ## For your equation
#
# - Few points are enough to learn a kernel. Then solve with many:
#   `eb.solve(learned.prior, more_conditions)`.
# - A sharper front needs more points than this: go there in steps, each from the kernel
#   that was learned at the last one, and place points where that kernel needs them, see
#   the [experiments](../experiments.md#sharp-fronts).
# - `eb.LengthscaleNetwork(2, 2, ...)` has a lengthscale for each dimension.
