import pathlib
import re

import eqx_bilevel as eb
import jax.numpy as jnp
import numpy as np


def _cole_hopf(t, x, viscosity):
    nodes, weights = np.polynomial.hermite.hermgauss(80)
    y = x - nodes * np.sqrt(4 * viscosity * t)
    heat = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * viscosity))
    return -np.sum(np.sin(np.pi * y) * heat) / np.sum(heat)


def test_example():
    readme = pathlib.Path(__file__).parent.parent / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    grid = eb.Box([0.1, -0.9], [1.0, 0.9]).grid(12)
    exact = np.array([_cole_hopf(*x, 0.1) for x in np.asarray(grid)])
    error = lambda solution: jnp.max(jnp.abs(solution(grid) - exact))
    assert error(names["learned"].solution) < 3e-3
    assert error(names["learned"].solution) < 0.5 * error(names["solution"])
