"""Finds a conductivity that varies from place to place, with honest error bars.

A rod of unknown conductivity exp(a(x)) is heated evenly, and cooled to zero at both
ends: -(exp(a) u')' = 1. Its temperature was measured at thirty places. Both functions,
u and a, are unknown, and so are the scales of a and the errors of measurement. Where no
heat flows, temperatures say nothing of the conductivity: the error bar shows it. It
takes a minute, and leaves a picture in `conductivity.png`.
"""

import pathlib

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Gram matrices of differential operators need double precision.
jax.config.update("jax_enable_x64", True)

rod = eb.Box(lower=[0.0], upper=[1.0])
ends = jnp.array([[0.0], [1.0]])


def log_conductivity(x):
    return np.sin(2 * np.pi * x) + 0.5 * x


def exact(x, n=20001):
    # The flow of heat is x - c. Trapezoidal rule.
    grid = np.linspace(0, 1, n)

    def integral(values):
        steps = 0.5 * (values[1:] + values[:-1]) / (n - 1)
        return np.concatenate([[0.0], np.cumsum(steps)])

    resistance = np.exp(-log_conductivity(grid))
    total, moment = integral(resistance), integral(grid * resistance)
    c = moment[-1] / total[-1]
    return np.interp(x, grid, c * total - moment)


def measure(key, noise=1e-3, num=30):
    key1, key2 = jax.random.split(key)
    points = rod.interior(num, key=key1)
    errors = noise * jax.random.normal(key2, (num,))
    return points, jnp.asarray(exact(np.asarray(points[:, 0]))) + errors


# Divided by exp(a), which is positive whatever a is.
def balance(u, x):
    a, u = u["a"], u["u"]
    return -u.d(0, 0) - a.d(0) * u.d(0) - jnp.exp(-a.value)


def temperature(u, x):
    return u["u"].value


def state(points, data):
    conditions = [
        eb.Condition(balance, rod.interior(80, key=jax.random.key(0)), name="balance"),
        eb.Condition(temperature, ends, name="ends"),
        # The noise is learned, from here.
        eb.Condition(temperature, points, data, noise=eb.Positive(0.01), name="data"),
    ]
    # The temperature follows from the conductivity. Its own prior should say nothing:
    # a variance that is far above what temperatures are, and a lengthscale that points
    # can resolve. If these were learned too, they would bias the conductivity.
    vague = eb.Scaled(eb.Gaussian(eb.Frozen(0.2)), eb.Frozen(100.0))
    prior = {
        "u": eb.GaussianProcess(vague),
        "a": eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.3), 1.0), mean=0.0),
    }
    return prior, conditions


def draw(points, data, solution, posterior, path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    x = jnp.linspace(0, 1, 200)
    found, std = solution(x[:, None]), posterior.std(x[:, None])
    truth = {"u": exact(x), "a": log_conductivity(x)}
    labels = {"u": "temperature", "a": "logarithm of the conductivity"}
    for panel, name in zip(panels, labels):
        low, high = (found[name] + s * 1.645 * std[name] for s in (-1, 1))
        panel.fill_between(x, low, high, alpha=0.3, label="90 %")
        panel.plot(x, found[name], label="found")
        panel.plot(x, truth[name], "k--", label="exact")
        panel.set(xlabel="$x$", ylabel=labels[name])
    panels[0].scatter(points[:, 0], data, c="black", s=8, label="measured")
    for panel in panels:
        panel.legend()
    figure.savefig(path, dpi=150)


def main(picture="conductivity.png", noise=1e-3):
    points, data = measure(jax.random.key(1), noise)
    prior, conditions = state(points, data)
    objective = eb.NegativeLogEvidence("data")
    objective += eb.NegativeLogHyperprior(prior, conditions)
    learned = eb.learn(prior, conditions, objective)
    solution = learned.solution

    # Error bars that include what is left open of the hyperparameters.
    posterior = eb.laplace(learned, objective)
    sigma = eb.unwrap(learned.conditions[2].noise)
    print(f"noise: {sigma:.1e}, true: {noise:.1e}")
    x = jnp.linspace(0.05, 0.95, 10)
    a, std = solution(x[:, None])["a"], posterior.std(x[:, None])["a"]
    print("    x   log-conductivity   exact")
    for row in zip(x, a, 1.645 * std, log_conductivity(x)):
        print("{:5.2f} {:9.2f} +- {:4.2f} {:8.2f}".format(*row))
    draw(points, data, solution, posterior, picture)
    print(f"Picture: {pathlib.Path(picture).resolve()}")
    return learned, posterior


if __name__ == "__main__":
    main()
