# %% [markdown]
# # Kernels for what you know
#
# A Gaussian kernel says that a function varies at the same rate everywhere and that
# anything can depend on everything. Often more is known. Two examples: a function with
# two scales, for a kernel behind a learned change of coordinates, and a function of
# many coordinates that do not interact, for a sum of kernels.

# %%
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

keys = jax.random.split(jax.random.key(0), 4)


def value(u, x):
    return u.value


# %% [markdown]
# ## Two scales
#
# The equation $u'' = f$ on $[-1, 1]$ has the solution
#
# $$
# u(x) = \sin(\pi x) + \tanh(20 x) ,
# $$
#
# a slow wave and a fast step. The 40 points are dense where the step is, as an adaptive
# method would place them.


# %%
def step(x):
    return jnp.sin(jnp.pi * x[0]) + jnp.tanh(20 * x[0])


def source(x):
    return jnp.trace(jax.hessian(step)(x))


def denser_inside(x):
    return (x**3 + 0.3 * x) / 1.3


def laplacian(u, x):
    return u.laplacian


line = eb.Box(-1.0, 1.0)
points, others = (line.interior(n, method="grid") for n in (40, 81))
conditions = [
    eb.Condition(laplacian, denser_inside(points), source),
    eb.Condition(value, line.boundary(2), step),
]
objective = eb.ValidationResidual(denser_inside(others))

# %% [markdown]
# A *warped* kernel is a kernel of $w(x)$, with a function $w$ that is learned. Here
# that is $x$ plus a small network, and any other Equinox module would do as well. Where
# $w$ is steep, functions may vary fast. The equation is linear: for it the frozen
# gradient is exact, and compiles faster.


# %%
class Warp(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, x):
        return x + self.mlp(x)


warp = Warp(eqx.nn.MLP(1, 1, 8, 1, activation=jnp.tanh, key=keys[0]))
kernels = dict(Gaussian=eb.Gaussian(0.2), warped=eb.Warped(eb.Gaussian(0.2), warp))
grid = line.grid(401)
learned, errors = {}, {}
for name, kernel in kernels.items():
    prior = eb.GaussianProcess(kernel)
    learned[name] = eb.learn(prior, conditions, objective, gradient="frozen", steps=400)
    solution = learned[name].solution
    errors[name] = jnp.max(jnp.abs(solution(grid) - jax.vmap(step)(grid)))
    print(f"{name:8s}  largest error {errors[name]:.1e}")

# %%
warped = eb.unwrap(learned["warped"].prior).kernel
slope = jax.vmap(jax.jacfwd(warped.warp))(grid)[:, 0, 0]
local = warped.kernel.lengthscale / jnp.abs(slope)

figure, (left, right) = plot.subplots(1, 2)
plot.solution(learned["warped"], line, exact=step, ax=left)
right.semilogy(grid, local)
right.set(xlabel="$x$", ylabel="local lengthscale")

# %% [markdown]
# No single lengthscale serves both the dense points and the others: one that is short
# enough for the step forgets what it knows between the outer points. The warped kernel
# has learned to be short where the step is, and long elsewhere. Its local lengthscale
# is that of the kernel inside, divided by the slope of $w$.
#
# ## Many coordinates
#
# In many dimensions points are always few. What helps is structure, if there is some.
# This function of four coordinates is a sum of functions of one each:
#
# $$
# u(x) = \sin(\pi x_0) + \cos(2 \pi x_1) + e^{-x_2} + x_3^3 ,
# $$
#
# and solves $-\Delta u + u = f$. An *additive* kernel is a sum of kernels of one
# coordinate each, which [`eqx_bilevel.Subspace`][] picks.


# %%
def waves(x):
    parts = (
        jnp.sin(jnp.pi * x[0]),
        jnp.cos(2 * jnp.pi * x[1]),
        jnp.exp(-x[2]),
        x[3] ** 3,
    )
    return sum(parts)


def screened(u, x):
    return u.value - u.laplacian


cube = eb.Box([0.0] * 4, [1.0] * 4)
conditions = [
    eb.Condition(
        screened,
        cube.interior(60, key=keys[1]),
        lambda x: waves(x) - jnp.trace(jax.hessian(waves)(x)),
    ),
    eb.Condition(value, cube.boundary(80, key=keys[2]), waves),
]
objective = eb.ValidationResidual(cube.interior(100, key=keys[3]))
single = tuple(eb.Subspace(eb.Gaussian(0.5), i) for i in range(4))
kernels = {"Gaussian": eb.Gaussian([0.5] * 4), "additive": eb.Sum(single)}
inside = cube.interior(1000, method="random", key=keys[0])
for name, kernel in kernels.items():
    prior = eb.GaussianProcess(kernel)
    learned[name] = eb.learn(prior, conditions, objective, gradient="frozen")
    solution = learned[name].solution
    errors[name] = jnp.max(jnp.abs(solution(inside) - jax.vmap(waves)(inside)))
    print(f"{name:8s}  largest error {errors[name]:.1e}")

lengthscales = eb.unwrap(learned["Gaussian"].prior).kernel.lengthscale
print("lengthscales of the Gaussian:", *(f"{length:.2f}" for length in lengthscales))

# %% [markdown]
# The Gaussian kernel has learned along which coordinate the function varies fastest.
# But it must still be ready for any interaction between them, and so few points in four
# dimensions cannot exclude one. The additive kernel knows that there is none.
#
# ## For your problem
#
# Kernels are added and multiplied, and [`eqx_bilevel.Subspace`][] picks coordinates:
# for a function that is periodic in one of them, say, or for pairs that interact.
# Whether what you assumed is so, the objective tells: compare `learned.objective`.
