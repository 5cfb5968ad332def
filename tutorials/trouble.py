# %% [markdown]
# # When it goes wrong
#
# Seven ways to get a wrong answer, on purpose: what each looks like, and what to do.
# The quick check is the same for all. Look at `result`, at `stats`, at `residuals()`,
# at the residual *between* the points and, with data, at `standardised_errors`.

# %%
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

line = eb.Box(0.0, 1.0)
ends = line.boundary(2)
grid = line.grid(101)


def value(u, x):
    return u.value


# %% [markdown]
# ## A problem without a solution
#
# Bratu's equation $-u'' = \lambda \mathrm{e}^u$, with $u = 0$ at both ends, has
# solutions for $\lambda$ up to about 3.51, and none beyond. A solve that fails raises
# an error. With `throw=False` it returns, and says what happened.

# %%
interior = line.interior(20, method="grid")
between = line.interior(30, key=jax.random.key(0))


class Bratu(eqx.Module):
    strength: jax.Array

    def __call__(self, u, x):
        return -u.d(0, 0) - self.strength * jnp.exp(u.value)


@eqx.filter_jit
@eqx.filter_vmap
def diagnose(strength, lengthscale):
    bratu = Bratu(strength)
    conditions = [
        eb.Condition(bratu, interior, name="bratu"),
        eb.Condition(value, ends, name="ends"),
    ]
    prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
    solution = eb.solve(prior, conditions, throw=False)
    left = jnp.abs(solution.apply(bratu, between)).max()
    return solution.result, solution.stats, left, solution(grid)


strengths = jnp.array([0.5, 1.0, 2.0, 3.0, 3.5, 3.6, 4.0])
results, stats, left, _ = diagnose(strengths, jnp.full(7, 0.5))
for i, strength in enumerate(strengths):
    result = jax.tree.map(lambda r: r[i], results)  # Of many, the one at i.
    message = eb.RESULTS[result].partition(". ")[0] or "successful"
    norm = stats["rkhs_norm"][i]
    steps = stats["num_steps"][i]
    print(f"{strength:3.1f}  {steps:3d} steps, norm {norm:7.1e}  {message}")

# %% [markdown]
# Steps that run out mean that there is no solution, or that the way to it is too far:
# then start from the solution of an easier problem, `initial=`. More steps seldom help.
# The norm of the solution in the kernel's own space (`rkhs_norm`) is a good witness: a
# function that has to bend like this is not one that the prior believes in.
#
# ## A lengthscale that is too small, or too large
#
# All of these solves succeed, and the equation holds at its points in each of them. For
# $\lambda = 2$ the solution is known, and so we can see what else can be told without
# knowing it.

# %%
theta = jnp.array(1.0)
for _ in range(100):  # theta = sqrt(lambda / 8) cosh(theta)
    theta = jnp.sqrt(2.0 / 8) * jnp.cosh(theta)
exact = 2 * jnp.log(jnp.cosh(theta) / jnp.cosh(theta * (1 - 2 * grid[:, 0])))

lengthscales = jnp.array([0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0])
results, stats, left, found = diagnose(jnp.full(7, 2.0), lengthscales)
errors = jnp.abs(found - exact[None, :]).max(axis=1)
solved = results == eb.RESULTS.successful
print(f"all successful: {jnp.all(solved)}")
print("lengthscale     error   residual between   at points     norm")
at_points, norms = stats["residual_norm"], stats["rkhs_norm"]
for row in zip(lengthscales, errors, left, at_points, norms):
    print("{:11.2f} {:9.1e} {:18.1e} {:11.1e} {:8.1e}".format(*row))

# %% [markdown]
# - *Too small*, less than the distance of the points (0.05 here): the residual is tiny
#   at the points and large between them. The norm is small, since the solution is the
#   prior's mean almost everywhere.
# - *Too large*: the residual is no longer small even at the points, because the nugget
#   that keeps the matrix invertible has become the limit. The norm is enormous.
#
# Either way the cure is to learn it, with [`eqx_bilevel.ValidationResidual`][] at
# points such as `between`.
#
# ## Conditions that contradict each other
#
# The exact slope of this solution at the left end is $4 \theta \tanh \theta$. Let
# somebody claim that it is 5. The solve succeeds again: the answer is a compromise.


# %%
def slope(u, x):
    return u.d(0)


bratu = Bratu(jnp.array(2.0))
true_slope = 4 * theta * jnp.tanh(theta)
prior = eb.GaussianProcess(eb.Gaussian(0.5))
objective = eb.ValidationResidual(between)
for claim in (true_slope, 5.0):
    conditions = [
        eb.Condition(bratu, interior, name="bratu"),
        eb.Condition(value, ends, name="ends"),
        eb.Condition(slope, ends[:1], claim, name="slope"),
    ]
    solution = eb.solve(prior, conditions)
    largest = {k: f"{jnp.abs(r).max():.0e}" for k, r in solution.residuals().items()}
    total = objective(solution)
    print(f"slope {claim:.2f}: objective {total:.0e}, residuals {largest}")

# %% [markdown]
# The objective shows it, and `residuals()`: they are large, and stay so whatever kernel
# is learned. Which of the conditions is to blame? Give the suspect a `noise`, as if it
# had been measured, and ask by how many standard deviations it differs from what all
# others predict. (Without noise that is often nan, since the others leave nothing
# open.)

# %%
suspect = eb.Condition(slope, ends[:1], 5.0, noise=0.1, name="slope")
solution = eb.solve(prior, [*conditions[:2], suspect])
off = jnp.abs(solution.standardised_errors("slope")[0, 0])
print(f"the slope is off by {off:.0f} standard deviations")

# %% [markdown]
# ## An objective that ignores boundary values
#
# Zero satisfies $u'' = 3600 \, u$ perfectly, whatever the boundary values, which are
# one at both ends. A residual between the points does not mind. If the prior is so
# stiff that the nugget outweighs the conditions, zero is what it gets. So
# [`eqx_bilevel.ValidationResidual`][] adds what is left of the conditions at their own
# points. Here is what it looks like with and without, for a nugget of $10^{-6}$.


# %%
def layers(u, x):
    return u.d(0, 0) / 3600 - u.value


layered = [
    eb.Condition(layers, line.interior(40, method="grid"), nugget=1e-6),
    eb.Condition(value, ends, 1.0, nugget=1e-6, name="ends"),
]
truth = jnp.cosh(60 * (grid[:, 0] - 0.5)) / jnp.cosh(30)
objectives = {
    "without": eb.ValidationResidual(between, misfit_weight=0),
    "with": eb.ValidationResidual(between),
}


@eqx.filter_jit
@eqx.filter_vmap
def judge(lengthscale):
    prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
    solution = eb.solve(prior, layered, throw=False)
    curves = [objective(solution) for objective in objectives.values()]
    at_ends = jnp.abs(solution.residuals()["ends"]).max()
    return curves, jnp.abs(solution(grid) - truth).max(), at_ends


candidates = jnp.geomspace(0.02, 200.0, 60)
curves, wrong, at_ends = judge(candidates)
best = [int(jnp.argmin(curve)) for curve in curves]
for name, i in zip(objectives, best):
    print(f"{name:8} smallest at {candidates[i]:6.2f}: ", end="")
    print(f"largest error {wrong[i]:.2f}, at the ends {at_ends[i]:.0e}")

figure, (left_axes, right_axes) = plot.subplots(1, 2)
for name, curve in zip(objectives, curves):
    left_axes.loglog(candidates, curve, label=name)
right_axes.loglog(candidates, wrong)
left_axes.set(xlabel="lengthscale", ylabel="objective", ylim=(1e-3, 1e5))
right_axes.set(xlabel="lengthscale", ylabel="largest error")
_ = left_axes.legend(frameon=False, labelcolor="#7f7f7f")

# %% [markdown]
# Without them the best lengthscale is on the plateau at the far right, where the error
# is that of a function that is almost zero. The valley that one would want is there
# too, but it is not the lowest place, and what starts beyond the ridge runs away. An
# objective of your own has no such safeguard: look at `residuals()`, or add a
# `ValidationResidual` to it. The automatic nugget is much smaller, and pushes the ridge
# far away.
#
# ## Hyperparameters that run away
#
# In $u' = -1.5 \, u$ with $u(0) = 1$, the equation determines $u$ alone. Data for $u$
# then say nothing about the prior's variance. An optimiser that walks on such a plain
# ends anywhere, and error bars, which are proportional to the square root of the
# variance, end anywhere with it.

# %%
span = eb.Box(0.0, 2.0)
times = span.grid(15)
errors_of_data = 0.05 * np.random.default_rng(0).normal(size=15)
data = jnp.exp(-1.5 * times[:, 0]) + errors_of_data


def decay(u, x):
    return u.d(0) + 1.5 * u.value


def prior_and_conditions(variance, noise):
    prior = eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.5), variance))
    return prior, [
        eb.Condition(decay, span.interior(20, method="grid"), name="decay"),
        eb.Condition(value, span.face(0, "lower", 1), 1.0, name="start"),
        eb.Condition(value, times, data, noise=eb.Positive(noise), name="data"),
    ]


evidence = eb.NegativeLogEvidence("data")
hyperprior = eb.NegativeLogHyperprior(*prior_and_conditions(1.0, 0.05))


@eqx.filter_jit
@eqx.filter_vmap
def weigh(variance, noise):
    solution = eb.solve(*prior_and_conditions(variance, noise), throw=False)
    squares = jnp.mean(solution.standardised_errors("data") ** 2)
    both = evidence(solution), (evidence + hyperprior)(solution)
    return *both, solution.std(times[5]), squares


variances = jnp.array([1e-2, 1.0, 1e2, 1e4])
flat, curved, bars, _ = weigh(variances, jnp.full(4, 0.05))
print("variance   evidence (-log)   with hyperprior   error bar of u")
for row in zip(variances, flat, curved, bars):
    print("{:8.0e} {:17.3f} {:17.3f} {:16.1e}".format(*row))

# %% [markdown]
# The cure is to say what was known before, as [`eqx_bilevel.NegativeLogHyperprior`][]
# does in the second column: nothing beyond a factor of fifty is credible. Or hold the
# variance, with [`eqx_bilevel.Frozen`][]. [`eqx_bilevel.laplace`][] raises an error if
# the objective has no curvature in some direction.
#
# ## Error bars that are too small
#
# Most often the declared noise is. Standardised errors have a mean square of about one
# if data agree with the model. The data have errors of 0.05; let us claim other sizes.

# %%
claims = jnp.array([0.005, 0.02, 0.05, 0.2])
_, _, _, squares = weigh(jnp.ones(4), claims)
for claim, square in zip(claims, squares):
    print(f"noise {claim:5.3f}: mean square of standardised errors {square:6.2f}")

# %% [markdown]
# Too large: the noise is larger than claimed, or the model is wrong. Much below one:
# the noise was overestimated. To learn it, minimise the evidence with a noise that is a
# parameter, as in the [inverse problem](./inverse.md).
#
# ## Error bars without data
#
# A solve without data has error bars too: they say what the conditions leave open
# between their points, for functions like those of the prior. But the solution does not
# depend on the prior's variance, and nothing here has told what it is. The equation
# does, at points where it was not imposed: what is left of it there should be as large
# as its own error bar.

# %%
few = line.interior(10, method="grid")
bars_of = {}
print("variance   largest error   largest bar   factor   bar times factor")
for variance in (1e-4, 1.0, 1e4):
    prior = eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.3), variance))
    conditions = [eb.Condition(bratu, few), eb.Condition(value, ends)]
    solution = eb.solve(prior, conditions)
    ratios = solution.apply(bratu, between) / solution.std(between, bratu)
    factor = jnp.sqrt(jnp.mean(ratios**2))
    deviations, bar = solution(grid) - exact, solution.std(grid)
    bars_of[variance] = factor * bar
    row = jnp.abs(deviations).max(), bar.max(), factor, (factor * bar).max()
    print(f"{variance:8.0e}" + "{:16.1e} {:13.1e} {:8.1e} {:18.1e}".format(*row))

# %% [markdown]
# Whatever the variance was, the factor puts it right. That ends where bars are smaller
# than about $10^{-7}$ of the prior's own standard deviation: they are differences of
# numbers that agree in all digits, and what is left is rounding.
#
# ## More
#
# The [FAQ](../faq.md) has other symptoms: gradients that are zero or that differ from
# finite differences, learning that stops early, programs that compile again and again.
