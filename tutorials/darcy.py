# %% [markdown]
# # Darcy flow: a permeability from pressures
#
# Water seeps through a square of soil that is fed from above,
#
# $$
# -\operatorname{div}(\mathrm{e}^{a} \nabla u) = 1, \qquad u = 0 \text{ at the edge.}
# $$
#
# The pressure $u$ was measured in sixty places. What is the permeability
# $\mathrm{e}^{a}$, which nobody measured? This is the inverse problem of
# [arXiv:2510.05568](https://arxiv.org/abs/2510.05568), with data of our own. If you
# have not seen [an unknown field](inverse.md) in one dimension, begin there.

# %%
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
from eqx_bilevel import plot
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse.linalg import spsolve


jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The data
#
# They are made up: the pressure by finite differences on a fine grid, with errors of
# 0.001, which is 4 % of the largest pressure.

# %%
square = eb.Box([0.0, 0.0], [1.0, 1.0])
noise = 1e-3


def log_permeability(x, y):
    s = np.sin(2 * np.pi * x) + np.sin(2 * np.pi * y)
    return np.log(2 * np.cosh(s))


def pressure(n=200):
    # Differences, and the permeability in the middle between two nodes.
    nodes, middles = np.linspace(0, 1, n + 1), (np.arange(n) + 0.5) / n
    difference = sparse.csr_array(n * (np.eye(n, n - 1) - np.eye(n, n - 1, -1)))
    along_x = sparse.kron(difference, sparse.eye(n - 1))
    along_y = sparse.kron(sparse.eye(n - 1), difference)
    inside = nodes[1:-1]
    at_x = log_permeability(middles[:, None], inside[None]).ravel()
    at_y = log_permeability(inside[:, None], middles[None]).ravel()
    flow = lambda d, a: d.T @ sparse.diags(np.exp(a)) @ d
    operator = flow(along_x, at_x) + flow(along_y, at_y)
    u = np.zeros((n + 1, n + 1))
    found = np.asarray(spsolve(operator.tocsc(), np.ones((n - 1) ** 2)))
    u[1:-1, 1:-1] = found.reshape(n - 1, n - 1)
    return RegularGridInterpolator((nodes, nodes), u, method="cubic")


true_pressure = pressure()
keys = jax.random.split(jax.random.key(0), 4)
places = square.interior(60, key=keys[0])
errors = noise * jax.random.normal(keys[1], (60,))
data = jnp.asarray(true_pressure(np.asarray(places))) + errors

# %% [markdown]
# ## The model
#
# The equation is divided by the permeability. The pressure follows from it, so that its
# own prior should say nothing: that is vague, and frozen. What is learned are the
# lengthscale, the variance and the mean of $a$, and the noise.


# %%
def balance(u, x):
    a, u = u["a"], u["u"]
    return -u.laplacian - a.grad @ u.grad - jnp.exp(-a.value)


def value(u, x):
    return u["u"].value


conditions = [
    eb.Condition(balance, square.interior(200, key=keys[2]), name="balance"),
    eb.Condition(value, square.boundary(60, key=keys[3]), name="edge"),
    eb.Condition(value, places, data, noise=eb.Positive(1e-2), name="data"),
]
vague = eb.Scaled(eb.Gaussian(eb.Frozen(0.3)), eb.Frozen(1e4))
prior = {
    "u": eb.GaussianProcess(vague),
    "a": eb.GaussianProcess(
        eb.Scaled(eb.Gaussian(0.3), 1.0), mean=eb.Unconstrained(0.0)
    ),
}

# %% [markdown]
# ## Learning
#
# By the evidence of the data, given that the equation holds. (The paper looks at the
# residual of the equation instead, and of the data that it fits, which cannot tell how
# far to trust them.)

# %%
objective = eb.NegativeLogEvidence("data")
objective += eb.NegativeLogHyperprior(prior, conditions)
learned = eb.learn(prior, conditions, objective, scale_search=False)
solution = learned.solution
print(f"noise: {learned.conditions[2].noise.value:.1e}, true: {noise:.1e}")
print(f"lengthscale of a: {learned.prior['a'].kernel.kernel.lengthscale.value:.2f}")

# %% [markdown]
# ## What came out

# %%
axis = np.linspace(0.02, 0.98, 40)
x, y = np.meshgrid(axis, axis, indexing="ij")
where = np.stack([x.ravel(), y.ravel()], axis=-1)
true = log_permeability(x, y).ravel()
found, std = solution(where)["a"], solution.std(where)["a"]
relative = lambda found, true: np.linalg.norm(found - true) / np.linalg.norm(true)
measured = noise / np.sqrt(np.mean(true_pressure(where) ** 2))
print(
    f"pressure: off by {relative(solution(where)['u'], true_pressure(where)):.1%}",
    end="",
)
print(f" (a measurement: {measured:.1%})")
print(f"log-permeability: off by {relative(found, true):.1%}")
inside = np.mean(np.abs(found - true) < 1.645 * std)
print(f"within the 90 % bars: {inside:.0%} of the square")

figure, panels = plot.subplots(1, 3)
limits = dict(vmin=0.5, vmax=2.1)
for axes, title, field, options in (
    (panels[0], "true", true, limits),
    (panels[1], "found", found, limits),
    (panels[2], "standard deviation", std, {}),
):
    image = axes.pcolormesh(x, y, np.reshape(field, x.shape), **options)
    axes.set(title=title, aspect="equal", xlim=(0, 1), ylim=(0, 1))
    figure.colorbar(image, ax=axes, shrink=0.6)
_ = panels[2].plot(*places.T, ".", color="white", markersize=3)

# %% [markdown]
# Bars are narrow near the middles of the edges, through which most of the water leaves,
# and wide in the corners and in the middle, where hardly any flows.
#
# More on this problem, with ten draws of the errors, other objectives and the way of
# the paper: [experiments](../experiments.md#inverse-problems).
