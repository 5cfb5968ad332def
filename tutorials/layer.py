# %% [markdown]
# # A solve as a layer of a larger model
#
# [`eqx_bilevel.solve`][] is a differentiable function like any other in JAX. So a PDE
# can be a layer: here a network says how strongly a rod reacts, given what it is made
# of; the layer solves for the temperature; and the only thing that was ever measured is
# the temperature in the middle of some rods. From that the network has to find the law,
#
# $$ -u'' + \kappa(z) \, u^3 = 10, \qquad u(0) = u(1) = 0, \qquad
#    z \mapsto \kappa(z) \text{ unknown} . $$

# %%
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
from eqx_bilevel import plot
from scipy.integrate import solve_bvp


jax.config.update("jax_enable_x64", True)


# %% [markdown]
# ## The layer
#
# An Equinox module with a prior and points. `throw=False` belongs to every solve under
# `jax.vmap`: a failure of one is then no error for all. What there is after its last
# step is returned, and `solution.result` tells; here, such values are made nan.


# %%
def value(u, x):
    return u.value


class Rod(eqx.Module):
    prior: eb.GaussianProcess
    points: jax.Array
    ends: jax.Array

    def conditions(self, strength):
        def balance(u, x):
            return -u.d(0, 0) + strength * u.value**3

        return [
            eb.Condition(balance, self.points, 10.0, nugget=1e-9, name="balance"),
            eb.Condition(value, self.ends, nugget=1e-9),
        ]

    def __call__(self, strength):
        solution = eb.solve(self.prior, self.conditions(strength), throw=False)
        solved = solution.result == eb.RESULTS.successful
        return jnp.where(solved, solution(jnp.array([0.5])), jnp.nan)


rod = eb.Box(0.0, 1.0)
guess = eb.GaussianProcess(eb.Gaussian(0.1))
layer = Rod(guess, rod.interior(12, method="grid"), rod.boundary(2))

# %% [markdown]
# Its kernel need not be a guess. We learn it once, for one typical rod, and put it into
# the layer. As the reference there is SciPy's `solve_bvp`, which is also what the
# "measurements" are made with.


# %%
def reference(strength):
    slopes = lambda x, y: np.stack([y[1], strength * y[0] ** 3 - 10])
    ends = lambda left, right: np.array([left[0], right[0]])
    x = np.linspace(0, 1, 21)
    return solve_bvp(slopes, ends, x, np.zeros((2, 21)), tol=1e-8).sol(0.5)[0]


between = eb.ValidationResidual(rod.interior(20, key=jax.random.key(0)))
learned = eb.learn(guess, layer.conditions(jnp.array(1.0)), between)
better = eqx.tree_at(lambda layer: layer.prior, layer, learned.prior)
for name, candidate in (("guess", layer), ("learned", better)):
    error = abs(candidate(jnp.array(5.0)) - reference(5.0))
    print(f"{name:8} {candidate.prior.kernel}   error: {error:.1e}")
layer = better

# %% [markdown]
# It was learned at a strength of 1, and this is the error at 5. The derivative of what
# the layer returns is the right one too, here against differences of the reference:

# %%
slope = jax.grad(layer)(jnp.array(5.0))
difference = (reference(5.01) - reference(4.99)) / 0.02
print(f"slope of the layer: {slope:.6f}, of the reference: {difference:.6f}")

# %% [markdown]
# ## Data
#
# The true law depends on two features. The network sees them, and the temperature in
# the middle, for 60 rods.


# %%
def law(z):
    return np.exp(1.0 + np.sin(3 * z[..., 0]) * z[..., 1])


def rods(num, key):
    features = jax.random.uniform(key, (num, 2), minval=-1.0)
    return features, jnp.array([reference(k) for k in law(np.asarray(features))])


features, measured = rods(60, jax.random.key(1))
unseen = jax.random.uniform(jax.random.key(2), (40, 2), minval=-1.0)

# %% [markdown]
# ## Training
#
# Nothing here is special to the library. The loss is downstream of the layer, the
# network upstream of it, and gradients flow through the solves: 60 at a time. The layer
# is not an argument of the loss, so its kernel stays as it was learned.

# %%
network = eqx.nn.MLP(2, "scalar", 32, 2, jax.nn.gelu, key=jax.random.key(3))
optimiser = optax.adam(optax.cosine_decay_schedule(2e-2, 600))


def loss(network):
    predicted = jax.vmap(lambda z: layer(jnp.exp(network(z))))(features)
    return jnp.mean((predicted - measured) ** 2)


@eqx.filter_jit
def step(network, state):
    found, gradient = eqx.filter_value_and_grad(loss)(network)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(network, updates), state, found


state = optimiser.init(eqx.filter(network, eqx.is_inexact_array))
untrained, losses = network, []
for _ in range(600):
    network, state, found = step(network, state)
    losses.append(float(found) ** 0.5)
print(f"RMS error of temperatures: {losses[0]:.1e} at first, {losses[-1]:.1e} at last")

# %% [markdown]
# ## The law, which was never measured
#
# For rods that the network has not seen:

# %%
truth = np.log(law(np.asarray(unseen)))
figure, axes = plot.subplots()
axes.axline((0, 0), slope=1, color="#7f7f7f", linewidth=1)
errors = {}
for name, model in (("before training", untrained), ("after training", network)):
    log_strength = jax.vmap(model)(unseen)
    errors[name] = np.sqrt(np.mean((log_strength - truth) ** 2))
    print(f"{name}: RMS error of log kappa {errors[name]:.3f}")
    axes.plot(truth, log_strength, ".", label=name)
axes.set(xlabel=r"true $\log \kappa$", ylabel=r"$\log \kappa$ of the network")
_ = axes.legend(frameon=False, labelcolor="#7f7f7f")

# %% [markdown]
# The network was told temperatures, and found reaction strengths.
#
# ## For your model
#
# - The upstream part may be anything that makes numbers for a condition or a prior: a
#   network for a source, evaluated at the points and passed as a `target`; one for a
#   coefficient that depends on `u.value`; or the initial state of another solver.
# - To train the kernel along with the rest, make the layer an argument of the loss. Its
#   lengthscale is positive whatever the optimiser does to it.
# - A fixed `nugget`, as here, makes the layer a smooth function. The automatic one is
#   chosen anew in each solve, as small as rounding allows.
# - To backpropagate through one linearised step only, pass
#   `adjoint=eb.FrozenAdjoint()` to the solve: see
#   [the method](../method.md#two-gradients).
