# %% [markdown]
# # A system: flow behind a grid
#
# The stationary Navier-Stokes equations couple two velocities and a pressure:
#
# $$
# u u_x + v u_y + p_x = \nu \Delta u, \qquad
# u v_x + v v_y + p_y = \nu \Delta v, \qquad
# u_x + v_y = 0 .
# $$
#
# Kovasznay found the flow behind a grid of rods in closed form. Here it is computed
# from the velocity on the boundary of a rectangle, and from one value of the pressure,
# which is otherwise determined only up to a constant.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

viscosity = 1 / 20
rate = 0.5 / viscosity - (0.25 / viscosity**2 + 4 * jnp.pi**2) ** 0.5


def exact(x):
    x, y = x
    decay = jnp.exp(rate * x)
    u = 1 - decay * jnp.cos(2 * jnp.pi * y)
    v = rate / (2 * jnp.pi) * decay * jnp.sin(2 * jnp.pi * y)
    return dict(u=u, v=v, p=0.5 * (1 - decay**2))


# %% [markdown]
# With several unknowns, operators get a dictionary of them. They may return several
# numbers: here three equations are one condition, and two velocities another.


# %%
def navier_stokes(f, x):
    u, v, p = f["u"], f["v"], f["p"]
    along = lambda w: u.value * w.d(0) + v.value * w.d(1) - viscosity * w.laplacian
    return along(u) + p.d(0), along(v) + p.d(1), u.d(0) + v.d(1)


def velocity(f, x):
    return f["u"].value, f["v"].value


def pressure(f, x):
    return f["p"].value


def inflow(x):
    flow = exact(x)
    return flow["u"], flow["v"]


box = eb.Box([-0.5, -0.5], [1.0, 0.5])
keys = jax.random.split(jax.random.key(0), 3)
conditions = [
    eb.Condition(navier_stokes, box.interior(80, key=keys[0]), name="flow"),
    eb.Condition(velocity, box.boundary(48, key=keys[1]), inflow, name="boundary"),
    eb.Condition(pressure, jnp.zeros((1, 2)), 0.0, name="pressure"),
]

# %% [markdown]
# ## A prior for each
#
# The prior is a dictionary as well. Velocities and pressure need not be alike, so each
# has a kernel of its own, with a lengthscale for each dimension. All six are learned
# together, from what is left of the equations between the points.

# %%
start = {name: eb.GaussianProcess(eb.Gaussian([0.5, 0.5])) for name in ("u", "v", "p")}
objective = eb.ValidationResidual(box.interior(80, key=keys[2]), "flow")
learned = eb.learn(start, conditions, objective)
guessed = eb.solve(start, conditions)

# %%
grid = box.grid((31, 21))
truth = jax.vmap(exact)(grid)
errors = {}
print("    largest error         learned lengthscales")
print("    guessed   learned     along x   along y")
for name in start:
    both = guessed(grid)[name], learned.solution(grid)[name]
    errors[name] = [jnp.max(jnp.abs(found - truth[name])) for found in both]
    lengths = eb.unwrap(learned.prior)[name].kernel.lengthscale
    row = (*errors[name], *lengths)
    print("{}   {:7.1e}   {:7.1e}   {:9.2f} {:9.2f}".format(name, *row))

# %%
plot.solution(learned, box, names=("x", "y"))

# %%
plot.error(learned, exact, box, names=("x", "y"))

# %% [markdown]
# The velocities are known on the whole boundary, and the pressure at a single point:
# everything else about it follows from the equations. So its kernel matters most, and
# learning has improved the pressure most. Its lengthscale along $y$ has become longer
# than the box is wide: the pressure of this flow does not depend on $y$ at all.
#
# ## For your system
#
# - Any number of unknowns, and kernels of any kind: a pressure that is rougher than the
#   velocities could have an `eb.Matern`.
# - Data of one unknown say something about the others: with velocities that are
#   measured inside (a condition with a `noise`), this finds the pressure as well.
# - Each unknown has its error bar: `learned.solution.std(x)["p"]`.
