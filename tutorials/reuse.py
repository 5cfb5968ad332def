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
import matplotlib.pyplot as plt
import numpy as np


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
        return ok, error(a, solution(test_points))

    return jax.vmap(one)(family)


def timed(fn, *args):
    tick = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return out, time.perf_counter() - tick


solve_all(guess)  # Compiles.
(ok_guess, error_guess), _ = timed(solve_all, guess)
(ok, error_reused), seconds_reused = timed(solve_all, learned.prior)
print(f"all solved: {jnp.all(ok_guess & ok)}")

# %% [markdown]
# ## And learning anew?
#
# Since the initial data are numbers of the same shape, nothing is compiled again, and
# the comparison is fair: learning for each of the six takes this long.

# %%
error_anew, seconds_anew = [], 0.0
for a in family:
    anew, took = timed(lambda a: eb.learn(guess, conditions(a), more).solution, a)
    error_anew.append(float(error(a, anew(test_points))))
    seconds_anew += took

print("   a_1    a_2    guess   reused  learned anew   (RMS errors)")
for a, *row in zip(family, error_guess, error_reused, error_anew):
    print("{:6.1f} {:6.1f} {:8.1e} {:8.1e} {:8.1e}".format(*a, *row))
print(f"seconds for all six: {seconds_reused:.2f} reused, {seconds_anew:.2f} anew")
