# %% [markdown]
# # Optimisers of second order

# %%
import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from scipy.integrate import solve_ivp


jax.config.update("jax_enable_x64", True)


class Duffing(eqx.Module):
    damping: eb.AbstractParameter
    stiffness: eb.AbstractParameter
    hardening: eb.AbstractParameter

    def __call__(self, u, t):
        force = self.stiffness * u.value + self.hardening * u.value**3
        return u.d(0, 0) + self.damping * u.d(0) + force


def value(u, t):
    return u.value


truth = dict(damping=0.3, stiffness=2.0, hardening=1.5)


def exact(times):
    rates = lambda t, y: [
        y[1],
        -truth["damping"] * y[1]
        - truth["stiffness"] * y[0]
        - truth["hardening"] * y[0] ** 3,
    ]
    options = dict(rtol=1e-10, atol=1e-10)
    return solve_ivp(rates, (0, 6), [1.5, 0.0], t_eval=times, **options).y[0]


noise = 0.01
times = jnp.linspace(0.0, 6.0, 41)[:, None]
data = exact(np.asarray(times[:, 0])) + noise * np.random.default_rng(0).normal(size=41)
measured = eb.Condition(value, times, data, noise=noise, name="data")
measured, held_out = eb.hold_out(measured, 0.4, key=jax.random.key(0))
span = eb.Box(0.0, 6.0)
law = Duffing(eb.Positive(0.1), eb.Positive(1.5), eb.Positive(1.0))
conditions = [eb.Condition(law, span.interior(60, method="grid"), nugget=1e-6, name="duffing"), measured]
prior = eb.GaussianProcess(eb.Scaled(eb.Gaussian(0.7), eb.Frozen(1.0)))

# %%
optimisers = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-6, 1e-6),
    "BoundedBFGS": eb.BoundedBFGS(1e-5, 1e-5, max_length=0.3),
    "Adam": optax.adam(5e-2),
}
test_points = span.grid(200)
runs, errors = {}, {}
for name, optimiser in optimisers.items():
    for ls in (False,):
        runs[name] = eb.learn(prior, conditions, held_out, optimiser, steps=200, scale_search=ls)
        found = runs[name].solution(test_points)
        errors[name] = np.max(np.abs(found - exact(test_points[:, 0])))
        history = runs[name].history
        print(
        f"{name:20} steps: {len(history['objective']):4d}, "
        f"seconds: {history['seconds'][-1] - history['seconds'][0]:5.2f}, "
        f"objective: {history['best'][-1]:.1e}, error: {errors[name]:.1e}, {history['seconds'][0]}"
        )
        print(runs[name].conditions[0].operator, runs[name].prior, history["objective"][::5])
