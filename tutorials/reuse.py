# %% [markdown]
# # A learned kernel on new data
#
# What is learned are hyperparameters: they say how long the features of solutions are,
# and not what the solution is. So a kernel that was learned once serves for other
# initial data too. We learn the two lengthscales for Burgers' equation with one initial
# condition, and then solve for six others at once.

# %%
import time

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A family of problems
#
# Initial conditions are $u(0, x) = a_1 \sin \pi x + a_2 \sin 2 \pi x$. They enter as
# *numbers* at fixed points, `target=u0(...)`, and not as functions: then all of the
# family share one compiled program.

# %%
domain = eb.Box([0.0, -1.0], [1.0, 1.0])  # (t, x)
viscosity = 0.1
keys = jax.random.split(jax.random.key(0), 4)
interior = domain.interior(150, key=keys[0])
start = domain.face(0, "lower", 24, key=keys[1])
sides = domain.boundary(24, faces=[(1, "lower"), (1, "upper")], key=keys[2])
more = eb.ValidationResidual(domain.interior(150, key=keys[3]))


def burgers(u, x):
    return u.d(0) + u.value * u.d(1) - viscosity * u.d(1, 1)


def value(u, x):
    return u.value


def beginning(a, x):
    return a[0] * jnp.sin(jnp.pi * x) + a[1] * jnp.sin(2 * jnp.pi * x)


def conditions(a):
    return [
        eb.Condition(burgers, interior, name="burgers"),
        eb.Condition(value, start, beginning(a, start[:, 1])),
        eb.Condition(value, sides),
    ]


# %% [markdown]
# The exact solution is due to Cole and Hopf: a ratio of two integrals against a
# Gaussian, for which Gauss-Hermite quadrature is made. It is used for errors only.

# %%
nodes, weights = map(jnp.asarray, np.polynomial.hermite.hermgauss(120))


def exact(a, point):
    t, x = point
    y = x - jnp.sqrt(4 * viscosity * t) * nodes
    potential = sum(
        a[k] * (1 - jnp.cos((k + 1) * jnp.pi * y)) / ((k + 1) * jnp.pi) for k in (0, 1)
    )
    mass = weights * jnp.exp(-potential / (2 * viscosity))
    return jnp.sum(mass * beginning(a, y)) / jnp.sum(mass)


test_points = domain.grid(40)


def error(a, found):
    difference = found - jax.vmap(lambda x: exact(a, x))(test_points)
    return jnp.sqrt(jnp.mean(difference**2))


# %% [markdown]
# ## Learning once

# %%
guess = eb.GaussianProcess(eb.Gaussian([0.5, 0.5]))
first = jnp.array([-1.0, 0.0])
learned = eb.learn(guess, conditions(first), more)
print(learned.prior.kernel)
print(f"RMS error: {error(first, learned.solution(test_points)):.1e}")

# %% [markdown]
# ## Solving for six others at once
#
# `jax.vmap` over the initial data, with the prior as an argument. Under it a failed
# solve must not raise: `throw=False`, and we look at each result.

# %%
family = jnp.array(
    [[1.0, 0.0], [-0.5, 0.0], [0.0, 0.7], [-0.8, 0.4], [0.6, 0.5], [-0.3, -0.6]]
)


@jax.jit
def solve_all(prior):
    def one(a):
        solution = eb.solve(prior, conditions(a), throw=False)
        ok = solution.result == eb.RESULTS.successful
        found = solution(test_points)
        return ok, found, error(a, found)

    return jax.vmap(one)(family)


def timed(fn, *args):
    tick = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return out, time.perf_counter() - tick


solve_all(guess)  # Compiles.
(ok_guess, _, error_guess), _ = timed(solve_all, guess)
(ok, found, error_reused), seconds_reused = timed(solve_all, learned.prior)
print(f"all solved: {jnp.all(ok_guess & ok)}")

# %%
figure, axes = plot.subplots()
x = test_points[-40:]  # At the last time.
for a, one in zip(family, found):
    axes.plot(x[:, 1], one[-40:], label=f"$a = ({a[0]:g}, {a[1]:g})$")
    true = jax.vmap(lambda x: exact(a, x))(x)
    axes.plot(x[:, 1], true, "--", color="#7f7f7f", linewidth=1)
axes.set(xlabel="$x$", ylabel="$u(1, x)$", ylim=(-0.65, 0.4))
_ = axes.legend(loc="lower center", frameon=False, labelcolor="#7f7f7f", ncols=2)

# %% [markdown]
# Dashed: the exact solutions.

#
# ## And learning anew?
#
# Since the initial data are numbers of the same shape, nothing is compiled again, and
# the comparison of times is fair.

# %%
error_anew, seconds_anew = [], 0.0
for a in family:
    anew, took = timed(lambda a: eb.learn(guess, conditions(a), more).solution, a)
    error_anew.append(float(error(a, anew(test_points))))
    seconds_anew += took

print(" a_1   a_2      guess    reused    learned anew    (RMS errors)")
for a, *row in zip(family, error_guess, error_reused, error_anew):
    print("{:4.1f} {:5.1f} {:10.1e} {:9.1e} {:15.1e}".format(*a, *row))
saved = seconds_anew / seconds_reused
print(f"{seconds_reused:.2f} s against {seconds_anew:.1f} s: {saved:.0f} times faster")

# %% [markdown]
# Reused lengthscales are about as good as those that were learned for the very problem,
# for a small fraction of the time. What limits all of them are the points.
#
# ## For your problem
#
# - Learn for a typical member of the family. Whether the kernel suits another one can
#   be told without an exact solution: by `more(solution)`, the objective that it was
#   learned with.
# - Between problems that differ more, let learning start from the last kernel:
#   `eb.learn(learned.prior, conditions(a), more, scale_search=False)`.
# - Under `jax.vmap` points must be the same for all; only numbers may differ, such as
#   targets, coefficients and lengthscales.
