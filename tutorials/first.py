# %% [markdown]
# # A first equation
#
# Liouville's equation $\Delta u = e^u$ is nonlinear, and on the unit disc one of its
# solutions is known:
#
# $$
# u(x) = \log \frac{8}{(1 - |x|^2)^2} .
# $$
#
# Here it is solved on a square inside the disc, from its values on the boundary. An
# equation and boundary values are both *conditions*: an operator, the points where it
# is imposed, and a target, which is zero if nothing else is said. An operator is a
# function of the unknown `u` and the point `x`.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)


def liouville(u, x):
    return u.laplacian - jnp.exp(u.value)


def value(u, x):
    return u.value


def exact(x):
    return jnp.log(8 / (1 - jnp.sum(x**2)) ** 2)


square = eb.Box([-0.5, -0.5], [0.5, 0.5])
key1, key2 = jax.random.split(jax.random.key(0))
conditions = [
    eb.Condition(liouville, square.interior(80, key=key1)),
    eb.Condition(value, square.boundary(40, key=key2), exact),
]

# %% [markdown]
# What is believed of $u$ beforehand is a Gaussian process. This one has values of a few
# units (their variance is 10), changes over a length of about one, and can be
# differentiated four times. The solution is the most probable function that meets all
# conditions.

# %%
prior = eb.GaussianProcess(10.0 * eb.Matern(1.0, nu=4.5))
solution = eb.solve(prior, conditions)
print(f"{solution.stats['num_steps']} Gauss-Newton steps")

# %% [markdown]
# It is a function: of one point or of many. So are its derivatives, and operators are
# applied to it.

# %%
x = jnp.array([0.3, 0.1])
print(f"u      {solution(x):.4f}, exact {exact(x):.4f}")
print(f"u_x    {solution.d(0)(x):.4f}, exact {jax.grad(exact)(x)[0]:.4f}")
print(f"what is left of the equation: {solution.apply(liouville, x):.4f}")

plot.solution(solution, square)

# %% [markdown]
# ## How wrong is it?
#
# The exact solution says so, but seldom is there one. The error bar `solution.std`
# needs none: it is the standard deviation of what the prior allows once the conditions
# are met, linearised at the solution.

# %%
grid = square.grid(41)
error = jnp.abs(solution(grid) - jax.vmap(exact)(grid))
std = solution.std(grid)
print(f"largest error      {error.max():.1e}")
print(f"largest error bar  {std.max():.1e}")
print(f"error below two bars at {jnp.mean(error < 2 * std):.0%} of the points")

# %%
figure, (left, right) = plot.subplots(1, 2)
plot.error(solution, exact, square, ax=left)
plot.std(solution, square, ax=right)

# %% [markdown]
# The bars are as good as the prior. A variance that is a hundred times too small makes
# them ten times too small, and does not change the solution at all.
#
# ## For your equation
#
# Change the operator: `u.d(0)` and `u.d(0, 1)` are partial derivatives, `u.grad`,
# `u.laplacian` and `u.hessian` more of them at once. Add conditions, with a `noise` if
# they are measured. Then ask which lengthscale is right: that is what the [next
# page](./lengthscale.md) is about.
