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


def _run(file: str) -> dict:
    path = pathlib.Path(__file__).parent.parent / file
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(code, names)
    return names


def test_example():
    names = _run("README.md")
    grid = eb.Box([0.1, -0.9], [1.0, 0.9]).grid(12)
    exact = np.array([_cole_hopf(*x, 0.1) for x in np.asarray(grid)])
    error = lambda solution: jnp.max(jnp.abs(solution(grid) - exact))
    assert error(names["learned"].solution) < 3e-3
    assert error(names["learned"].solution) < 0.5 * error(names["solution"])


def test_examples_of_the_documentation():
    names = _run("docs/examples.md")
    assert abs(names["waves"]["pressure"] - names["exact"]) < 1e-4
    assert names["deflection_error"] < 1e-6
    assert abs(names["rate"] - 1.5) < 0.05
    at = names["times"][3]
    assert names["posterior"].std(at) > names["learned"].solution.std(at)
    assert abs(names["solution"](names["times"][7]) - np.exp(-1.5)) < 2e-3
    error = names["error"]
    assert error(names["adapted"]) < min(0.02, 0.3 * error(names["current"]))
    assert abs(names["peaks"][0] - 1.25) < 1e-4  # 5 x (1 - x)
    assert np.all(np.diff(names["peaks"]) < 0)
