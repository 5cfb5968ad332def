# %% [markdown]
# # Your own operator, kernel and objective
#
# The equation of Korteweg and de Vries,
#
# $$
# u_t + 6 u u_x + u_{xxx} = 0 ,
# $$
#
# describes waves in shallow water. One of them is the soliton
#
# $$
# u(t, x) = \frac{c}{2} \cosh^{-2} \Bigl( \frac{\sqrt c}{2} (x - c t) \Bigr) ,
# $$
#
# which travels with a speed $c$ and keeps its shape. Nothing in the library is made for
# this. Here it is found from its initial and boundary values, with a kernel that knows
# of travelling waves, but not how fast they are.
#
# ## An operator
#
# An operator is a function of the unknown and the point. Which derivatives it asks for,
# and which of them enter nonlinearly, is found by tracing it. It may return several
# numbers, and then its target has as many.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

speed = 2.0


def exact(x):
    t, x = x
    return 0.5 * speed / jnp.cosh(0.5 * speed**0.5 * (x - speed * t)) ** 2


def korteweg_de_vries(u, x):
    return u.d(0) + 6 * u.value * u.d(1) + u.d(1, 1, 1)


def value(u, x):
    return u.value


def value_and_slope(u, x):
    return u.value, u.d(1)


domain = eb.Box([0.0, -5.0], [1.0, 7.0])  # (t, x)
keys = jax.random.split(jax.random.key(0), 5)
left, right = (
    domain.face(1, side, 10, key=key) for side, key in zip(("lower", "upper"), keys)
)
conditions = [
    eb.Condition(korteweg_de_vries, domain.interior(80, key=keys[2]), name="equation"),
    eb.Condition(value, domain.face(0, "lower", 24, key=keys[3]), exact),
    eb.Condition(value, left, exact),
    eb.Condition(value_and_slope, right, lambda x: (exact(x), jax.grad(exact)(x)[1])),
]

# %% [markdown]
# ## A kernel
#
# A kernel is a subclass of [`eqx_bilevel.AbstractKernel`][] whose `__call__` returns a
# number for two points, in plain `jax.numpy`. The library takes its derivatives. All
# arrays in it are learned; those in an [`eqx_bilevel.Positive`][] stay positive.
#
# This one is for functions of $x - c t$ that change only slowly while they travel.


# %%
class Travelling(eb.AbstractKernel):
    speed: jax.Array
    width: eb.AbstractParameter
    memory: eb.AbstractParameter

    def __call__(self, x, y):
        t, x = x - y
        along = (x - self.speed * t) / self.width
        return jnp.exp(-0.5 * along**2 - 0.5 * (t / self.memory) ** 2)


kernel = Travelling(jnp.array(0.0), eb.Positive(1.5), eb.Positive(10.0))
prior = eb.GaussianProcess(kernel)

# %% [markdown]
# ## An objective
#
# An objective is a number for each solution. [`eqx_bilevel.ValidationResidual`][] is
# the one to begin with; for another, [`eqx_bilevel.Objective`][] takes any function.
# Waves in water conserve $\int u^2 \, \mathrm{d}x$, and that of the beginning is known.
# So this one adds to what is left of the equation how much of it is lost or gained
# later. The logarithm makes it easier to minimise.

# %%
others = domain.interior(80, key=keys[4])
lines = eb.Box([0.2, -5.0], [1.0, 7.0]).grid((5, 61))
beginning = jnp.stack([jnp.zeros(61), lines[:61, 1]], axis=1)


def momentum(values):
    return jnp.trapezoid(values.reshape(-1, 61) ** 2, dx=0.2, axis=1)


known = momentum(jax.vmap(exact)(beginning))


def unlike_a_wave(solution):
    residual = solution.apply(korteweg_de_vries, others)
    change = momentum(solution(lines)) / known - 1
    return jnp.log(jnp.mean(residual**2) + jnp.mean(change**2))


objective = eb.Objective(unlike_a_wave)
learned = eb.learn(prior, conditions, objective, scale_search=False)

# %%
grid = domain.grid((21, 61))
truth = jax.vmap(exact)(grid)
solutions = {"as given": eb.solve(prior, conditions), "learned": learned.solution}
errors = {k: jnp.max(jnp.abs(s(grid) - truth)) for k, s in solutions.items()}
for name, error in errors.items():
    print(f"largest error, kernel {name}: {error:.1e}")

found = eb.unwrap(learned.prior).kernel
print(f"speed {found.speed:.4f}, width {found.width:.2f}, memory {found.memory:.2f}")

# %%
plot.slices(learned, domain, at=[0.0, 0.5, 1.0], exact=exact, names=("t", "x"))

# %% [markdown]
# The kernel began with waves that stand still, and has found out how fast this one is.
# Then the solution is a function of one variable in all but name, and so few points are
# plenty for that.
#
# ## For your problem
#
# - Start a kernel where it is wrong in as few ways as possible. With a short `memory`
#   it need not care about the speed, and learning ends at a worse minimum.
# - The scale search, turned off here, leaves a kernel of your own as it is. It is given
#   a scale by `eb.Stretched(kernel, 1.0)`, or a length of its own can serve, if
#   [`eqx_bilevel.rescale`][] is registered.
# - A kernel that is not infinitely smooth says so, with [`eqx_bilevel.smoothness`][].
#   One that has something costly for each point, such as a network, is an
#   [`eqx_bilevel.AbstractFeatureKernel`][].
# - An objective that looks at the equation only can be small for a function that
#   ignores initial and boundary values. Here the known momentum prevents that.
