# %% [markdown]
# # An unknown field, with error bars
#
# A rod is heated evenly, insulated at its left end and cooled to zero at its right
# end. Its temperature $u$ was measured at thirty places, with errors of unknown size.
# What is its conductivity $\mathrm{e}^{a(x)}$, and how well do the data determine it?
#
# All heat that is made to the left of $x$ must flow through $x$, so that
#
# $$ -\mathrm{e}^{a(x)} \, u'(x) = x, \qquad u(1) = 0 . $$
#
# Both functions, $u$ and $a$, are unknowns. Where no heat flows, at the left end,
# temperatures say nothing about the conductivity. Error bars that are any good show it.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
from eqx_bilevel import plot


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The data
#
# They are made up, so that we can compare in the end: the temperature is an integral of
# the true conductivity, by the trapezoidal rule on a fine grid.

# %%
rod = eb.Box(0.0, 1.0)
noise = 3e-3


def log_conductivity(x):
    return np.sin(2 * np.pi * x) + 0.5 * x


def temperature(x, n=20001):
    grid = np.linspace(0.0, 1.0, n)
    slope = grid * np.exp(-log_conductivity(grid))
    pieces = 0.5 * (slope[1:] + slope[:-1]) / (n - 1)
    to_the_right = np.cumsum(pieces[::-1])[::-1]
    return np.interp(x, grid, np.append(to_the_right, 0.0))


key1, key2, key3 = jax.random.split(jax.random.key(1), 3)
places = rod.interior(30, key=key1)
errors = noise * jax.random.normal(key2, (30,))
data = jnp.asarray(temperature(places[:, 0])) + errors

# %% [markdown]
# ## The model
#
# The prior is a dictionary, and so operators get a dictionary of jets. The equation is
# divided by the conductivity, which is positive whatever $a$ is.
#
# Two choices matter. The noise is a parameter: it is learned, from a start that is ten
# times too large. And the temperature's own prior should say nothing, since the
# temperature follows from the conductivity: its variance is far above what temperatures
# are, and it is frozen. If it were learned too, it would bias the conductivity.


# %%
def flow(u, x):
    return u["u"].d(0) + x[0] * jnp.exp(-u["a"].value)


def value(u, x):
    return u["u"].value


conditions = [
    eb.Condition(flow, rod.interior(60, key=key3), name="flow"),
    eb.Condition(value, rod.face(0, "upper", 1), name="end"),
    eb.Condition(value, places, data, noise=eb.Positive(0.03), name="data"),
]
vague = eb.Scaled(eb.Gaussian(eb.Frozen(0.2)), eb.Frozen(100.0))
prior = {
    "u": eb.GaussianProcess(vague),
    "a": eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.3), 1.0)),
}

# %% [markdown]
# ## Learning what tells noise from signal
#
# A residual cannot tell how far to trust data: a function that runs through all of them
# satisfies the equation just as well as one that does not. The evidence of the data
# can. The second term says what is credible: a factor of fifty away from where we
# started, for any hyperparameter, is not. It keeps those from drifting off about which
# the data say little.

# %%
objective = eb.NegativeLogEvidence("data")
objective += eb.NegativeLogHyperprior(prior, conditions)
learned = eb.learn(prior, conditions, objective, scale_search=False)
solution = learned.solution
posterior = eb.laplace(learned, objective)

found = learned.conditions[2].noise.value
bar = posterior.std_of(lambda prior, conditions: conditions[2].noise)
print(f"noise: {found:.1e} +- {bar:.1e}, true: {noise:.1e}")

# %% [markdown]
# ## What came out
#
# `solution.std` is for the learned hyperparameters, as if these were known.
# `posterior.std` also counts what [`eqx_bilevel.laplace`][] found to be open about
# them. The dots are the data and the bands should contain the truth, which is dashed,
# in nine places out of ten.

# %%
x = np.linspace(0.0, 1.0, 101)
a, std = solution(x[:, None])["a"], posterior.std(x[:, None])["a"]
given = solution.std(x[:, None])["a"]
error = a - log_conductivity(x)

figure, (left, right) = plot.subplots(1, 2)
for axes, name, true in ((left, "u", temperature), (right, "a", log_conductivity)):
    plot.solution(posterior, rod, unknown=name, bars=0.9, resolution=101, ax=axes)
    axes.plot(x, true(x), "--", color="#7f7f7f")
_ = left.plot(places[:, 0], data, ".", color="#7f7f7f")
# %%
print("   x   a found            given hyperparameters   true")
for i in (0, 2, 5, 10, 30, 50, 70, 90):
    row = x[i], a[i], 1.645 * std[i], 1.645 * given[i], log_conductivity(x[i])
    print("{:4.2f} {:6.2f} +- {:4.2f}   +- {:4.2f} {:20.2f}".format(*row))
inside = jnp.mean(jnp.abs(error) < 1.645 * std)
print(f"share of the rod on which the truth is inside the 90 % bars: {inside:.2f}")

# %% [markdown]
# At the left end the bars are wide. That is the answer to the question, and no failure:
# no heat flows there. What is open about the hyperparameters adds little to that here.
#
# ## Is the model right?
#
# Each measurement can be predicted from all others and the equation. If model and noise
# are right then the errors of these predictions, divided by their error bars, are like
# draws from a standard normal distribution, with a mean square of about one. Let us see
# whether a *constant* conductivity would do as well. A number is a function whose
# kernel is constant.

# %%
one_number = {**learned.prior, "a": eb.GaussianProcess(eb.Constant(4.0))}
constant = eb.solve(one_number, learned.conditions)
for name, found in (("a field", solution), ("a number", constant)):
    square = jnp.mean(found.standardised_errors("data") ** 2)
    here = jnp.array([0.7])
    spread = found(here)["a"], 1.645 * found.std(here)["a"]
    print("{:8}  a(0.7) = {:5.2f} +- {:.3f}".format(name, *spread), end="")
    print(f"   mean square of standardised errors: {square:.1f}")

# %% [markdown]
# The single number comes with a tiny error bar, which is worth nothing: the data
# contradict the model. Look at the standardised errors before you believe an error bar.
#
# ## For your problem
#
# - Replace `flow` by your equation, and `"a"` by your unknown: in more dimensions, or
#   with a coefficient of time. A quantity that is positive is best represented by its
#   logarithm.
# - If the conditions on the unknown are weak then keep the priors of everything that
#   *follows* from it vague and frozen.
# - If [`eqx_bilevel.laplace`][] says that hyperparameters are not determined then it is
#   right: freeze them, or say more about them in the hyperprior.
# - Data that are averages or derivatives: see the [examples](../examples.md#averages).
