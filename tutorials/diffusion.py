"""Finds a diffusion coefficient from noisy temperatures, with an error bar.

A rod loses its heat through both ends. Its temperature obeys u_t = kappa u_xx, is zero
at the ends and known at the beginning, and was measured at forty places and times. Both
kappa and the size of the errors of measurement are unknown. It takes a minute, and
leaves a picture in `diffusion.png`.
"""

import pathlib

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Gram matrices of differential operators need double precision.
jax.config.update("jax_enable_x64", True)

box = eb.Box(lower=[0.0, 0.0], upper=[1.0, 1.0])  # (t, x)


def beginning(x):
    return jnp.sin(jnp.pi * x) + 0.5 * jnp.sin(3 * jnp.pi * x)


def exact(x, kappa):
    # Each of the two waves decays at its own rate.
    t, x = x
    decay = lambda k: jnp.exp(-kappa * (k * jnp.pi) ** 2 * t)
    waves = decay(1) * jnp.sin(jnp.pi * x), decay(3) * jnp.sin(3 * jnp.pi * x)
    return waves[0] + 0.5 * waves[1]


def measure(key, kappa=0.1, noise=0.02, num=40):
    key1, key2 = jax.random.split(key)
    points = box.interior(num, key=key1)
    errors = noise * jax.random.normal(key2, (num,))
    return points, jax.vmap(lambda x: exact(x, kappa))(points) + errors


# There are two unknowns: the temperature, and the logarithm of kappa. A number is a
# function whose kernel is constant. This one is normally distributed, beforehand, with
# mean log 0.3 and standard deviation 2: kappa is between 0.006 and 15, most likely.
def heat(u, x):
    kappa = jnp.exp(u["log_kappa"].value)
    return u["u"].d(0) - kappa * u["u"].d(1, 1)


def temperature(u, x):
    return u["u"].value


def known(x):
    return jnp.where(x[0] == 0, beginning(x[1]), 0.0)


def state(points, data):
    key1, key2 = jax.random.split(jax.random.key(0))
    faces = [(0, "lower"), (1, "lower"), (1, "upper")]
    conditions = [
        eb.Condition(heat, box.interior(200, key=key1), name="heat"),
        eb.Condition(temperature, box.boundary(60, faces=faces, key=key2), known),
        # The noise is learned, from here.
        eb.Condition(temperature, points, data, noise=eb.Positive(0.1), name="data"),
    ]
    prior = {
        "u": eb.GaussianProcess(eb.Scaled(eb.Gaussian([0.5, 0.5]), 1.0)),
        # Frozen: what is believed of kappa is not a hyperparameter.
        "log_kappa": eb.GaussianProcess(
            eb.Constant(eb.Frozen(4.0)), mean=eb.Frozen(jnp.log(0.3))
        ),
    }
    return prior, conditions


def draw(points, data, solution, posterior, truth, path):
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    t = jnp.linspace(0, 1, 60)
    grid = jnp.stack(jnp.meshgrid(t, t, indexing="ij"), axis=-1)
    found = solution(grid.reshape(-1, 2))["u"].reshape(60, 60)
    image = panels[0].pcolormesh(t, t, found.T, shading="gouraud", cmap="RdBu_r")
    panels[0].scatter(*points.T, c="black", s=8, label="measured")
    panels[0].set(title="Temperature", xlabel="$t$", ylabel="$x$")
    panels[0].legend(loc="upper right")
    figure.colorbar(image, ax=panels[0])

    line = jnp.stack([jnp.full(60, 0.3), t], axis=1)
    u, bar = solution(line)["u"], 1.645 * posterior.std(line)["u"]
    panels[1].fill_between(t, u - bar, u + bar, alpha=0.3, label="90 %")
    panels[1].plot(t, u, label="found")
    exactly = jax.vmap(lambda x: exact(x, truth))(line)
    panels[1].plot(t, exactly, "k--", label="exact")
    panels[1].set(title="At $t = 0.3$", xlabel="$x$", ylabel="temperature")
    panels[1].legend()

    here = jnp.zeros(2)
    centre, std = solution(here)["log_kappa"], posterior.std(here)["log_kappa"]
    log_kappa = centre + std * jnp.linspace(-4, 4, 200)
    density = jnp.exp(-0.5 * ((log_kappa - centre) / std) ** 2)
    panels[2].plot(jnp.exp(log_kappa), density)
    panels[2].axvline(truth, color="black", linestyle="--", label="true")
    panels[2].set(title=r"What is known of $\kappa$", xlabel=r"$\kappa$", yticks=[])
    panels[2].legend()
    figure.savefig(path, dpi=150)


def main(picture="diffusion.png", kappa=0.1, noise=0.02):
    points, data = measure(jax.random.key(1), kappa, noise)
    prior, conditions = state(points, data)

    # The evidence of the data tells noise from signal. Nothing beyond a factor of fifty
    # is credible for any hyperparameter: without saying so, those of which data say
    # nothing drift off.
    objective = eb.NegativeLogEvidence("data")
    objective += eb.NegativeLogHyperprior(prior, conditions)
    learned = eb.learn(prior, conditions, objective)
    solution = learned.solution

    # Error bars that include what is left open of the hyperparameters.
    posterior = eb.laplace(learned, objective)
    here = jnp.zeros(2)  # It is the same everywhere.
    centre, std = solution(here)["log_kappa"], posterior.std(here)["log_kappa"]
    low, high = jnp.exp(centre - 1.96 * std), jnp.exp(centre + 1.96 * std)
    sigma = eb.unwrap(learned.conditions[2].noise)
    print(f"kappa: {jnp.exp(centre):.4f}, between {low:.4f} and {high:.4f} with 95 %")
    print(f"       true: {kappa}")
    print(f"noise: {sigma:.4f}, true: {noise}")

    # Is the model right? Then these are like draws from a normal distribution.
    errors = solution.standardised_errors("data")
    print(
        f"mean square of the errors, in units of their bars: {jnp.mean(errors**2):.2f}"
    )
    draw(points, data, solution, posterior, kappa, picture)
    print(f"Picture: {pathlib.Path(picture).resolve()}")
    return learned, posterior


if __name__ == "__main__":
    main()
