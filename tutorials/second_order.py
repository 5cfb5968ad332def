# %% [markdown]
# # Optimisers of second order
#
# [`eqx_bilevel.learn`][] takes Optax optimisers, Optimistix minimisers and, for
# objectives that are sums of squares, Optimistix least-squares solvers. Here three of
# them learn the same things from the same start: the coefficients of a Duffing
# oscillator, from noisy data, together with the lengthscale of its motion,
#
# $$ u'' + c \, u' + k \, u + \beta \, u^3 = 0 . $$

# %%
import diffrax
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The problem
#
# An operator that is an Equinox module has parameters in its fields. The data are made
# by Diffrax, with errors of one percent.


# %%
class Duffing(eqx.Module):
    damping: eb.AbstractParameter
    stiffness: eb.AbstractParameter
    hardening: eb.AbstractParameter

    def __call__(self, u, t):
        force = self.stiffness * u.value + self.hardening * u.value**3
        return u.d(0, 0) + self.damping * u.d(0) + force


def value(u, t):
    return u.value


true = dict(damping=0.3, stiffness=2.0, hardening=1.5)


def exact(times):
    c, k, beta = true.values()

    def slopes(t, y, args):
        u, velocity = y
        return velocity, -c * velocity - k * u - beta * u**3

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slopes),
        diffrax.Dopri8(),
        0.0,
        6.0,
        0.1,
        (jnp.array(1.5), jnp.array(0.0)),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
    )
    assert solution.ys is not None
    return solution.ys[0]


span, noise = eb.Box(0.0, 6.0), 0.01
times = span.grid(41)
errors = noise * np.random.default_rng(0).normal(size=41)
data = exact(times[:, 0]) + errors

# %% [markdown]
# Four data in ten are held out. How well the others predict them is the objective, a
# sum of squares.

# %%
measured = eb.Condition(value, times, data, noise=noise, name="data")
measured, held_out = eb.hold_out(measured, 0.4, key=jax.random.key(0))
law = Duffing(eb.Positive(0.1), eb.Positive(1.5), eb.Positive(1.0))
points = span.interior(60, method="grid")
equation = eb.Condition(law, points, nugget=1e-6, name="equation")
prior = eb.GaussianProcess(eb.Gaussian(0.7))

# %% [markdown]
# ## Three optimisers
#
# `LevenbergMarquardt` sees each residual and its derivatives, `BoundedBFGS` their sum
# and its gradient, from which it estimates second derivatives, and `adam` the gradient
# alone.

# %%
optimisers = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6),
    "BoundedBFGS": eb.BoundedBFGS(rtol=1e-5, atol=1e-5, max_length=0.3),
    "adam": optax.adam(5e-2),
}
runs = {
    name: eb.learn(
        prior,
        [equation, measured],
        held_out,
        optimiser,
        steps=200,
        scale_search=False,
    )
    for name, optimiser in optimisers.items()
}
print("                      steps   objective    damping  stiffness  hardening")
for name, run in runs.items():
    found = eb.unwrap(run.conditions[0].operator)
    row = len(run.history["best"]), run.history["best"][-1]
    row += found.damping, found.stiffness, found.hardening
    print("{:20} {:6d} {:11.5f} {:10.3f} {:10.3f} {:10.3f}".format(name, *row))
print("{:40} {:9.3f} {:10.3f} {:10.3f}".format("true", *true.values()))

# %%
figure, (left, right) = plot.subplots(1, 2, sharey=True)
for name, run in runs.items():
    best = run.history["best"]
    seconds = run.history["seconds"] - run.history["seconds"][0]
    left.semilogy(np.arange(1, len(best) + 1), best, label=name)
    right.semilogy(seconds, best)
left.set(xlabel="step", ylabel="objective (best so far)")
right.set(xlabel="seconds since the first step")
_ = left.legend(frameon=False, labelcolor="#7f7f7f")

# %% [markdown]
# The seconds are counted from the end of the first step, and so do not include
# compiling.
#
# The first two end in the same place, and Adam is on its way there. Close to the
# minimum residuals are small and the Gauss-Newton matrix is nearly that of second
# derivatives: steps then gain digits. BFGS has to learn the matrix first, step by step;
# Adam never does.
#
# What is found differs from the true coefficients by what the noise allows: stiffness
# and hardening, which both pull back, are hard to tell apart.
#
# ## Which one?
#
# - *A sum of squares and few hyperparameters*, such as held-out data or a residual, and
#   a start that is not too far away: `optimistix.LevenbergMarquardt` or
#   `optimistix.GaussNewton`. A step costs one linearised solve for each hyperparameter,
#   and all residuals are kept.
# - *Anything else with up to some thousand hyperparameters*: leave it to the default,
#   [`eqx_bilevel.BoundedBFGS`][]. It minimises the logarithm of a sum of squares, which
#   looks the same from near and far, and limits its steps: residuals of equations can
#   change by orders of magnitude from one lengthscale to the next.
# - *More*, or batches (`batch_size` of [`eqx_bilevel.ValidationResidual`][]): Optax.
