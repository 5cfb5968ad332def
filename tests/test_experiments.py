"""The experiments, at sizes that a test can afford, and the results that are kept."""

import functools as ft
import importlib
import itertools as it
import operator as operators
import pathlib
import sys

import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest


benchmarks = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(benchmarks / "experiments"), str(benchmarks)]

import breadth  # pyright: ignore[reportMissingImports]
import dimensions  # pyright: ignore[reportMissingImports]
import hypergradient  # pyright: ignore[reportMissingImports]
import inverse  # pyright: ignore[reportMissingImports]
import linearisation  # pyright: ignore[reportMissingImports]
import profile_step  # pyright: ignore[reportMissingImports]
import reporting  # pyright: ignore[reportMissingImports]
import robustness  # pyright: ignore[reportMissingImports]
import run  # pyright: ignore[reportMissingImports]
import sensitivity  # pyright: ignore[reportMissingImports]


# The number of points, the largest error that is allowed for each unknown, and the
# share of its root mean square that may be left of the one before learning.
small = dict(
    elliptic=(dict(n=200), 1e-3, 1e-4),
    gray_scott_reuse=(dict(n=90), 0.3, 0.5),
    burgers=(dict(n=120, steps=(40, 10)), 0.4, 0.3),
)


@pytest.mark.parametrize("name", small)
def test_learning_improves(name):
    size, largest, share = small[name]
    row = run.run(name, 0, **size)
    assert row["converged"]
    for unknown, learned in row["learned"].items():
        assert learned["max"] < largest
        assert learned["rms"] < share * row["untrained"][unknown]["rms"]
    module = importlib.import_module(name)
    *_, first = run.table({name: dict(runs=[row, row])}).splitlines()[:3]
    assert module.title in first and "2 of 2" in first


@pytest.mark.parametrize("name", sorted(set(run.names) - set(small)))
def test_without_learning(name, monkeypatch):
    # All stages of it, and a search of one scale. Without learning, and with so few
    # points, the inner solve need not converge where the equation is hard.
    learn = eb.learn

    def quickly(*args, scale_search=1, **options):
        few = dict(steps=0, scale_search=min(scale_search, 1))
        return learn(*args, **(options | few))

    monkeypatch.setattr(eb, "learn", quickly)
    row = run.run(name, 0, n=36)
    hard = ("eikonal", "deep_eikonal", "burgers_front", "burgers_small", "allen_cahn")
    assert row["converged"] or name in hard
    assert np.isfinite(row["objective"])
    module = importlib.import_module(name)
    assert module.title and set(module.published.errors) <= set(row["learned"])
    for errors in row["learned"].values():
        assert 0 < errors["rms"] <= errors["max"] < np.inf


def test_sources_follow_from_exact_solutions():
    x = jnp.array([0.3, 0.8])
    # Derivatives of the exact solutions, by hand.
    wave = lambda x: np.e ** (2 * x[0]) * x[1] ** 3
    mixed = breadth.applied(lambda u, x: u.d(0, 1), wave)
    np.testing.assert_allclose(mixed(x), 6 * np.exp(0.6) * 0.64, rtol=1e-12)
    laplacian = np.exp(0.6) * (4 * 0.512 + 6 * 0.8)
    found = breadth.applied(lambda u, x: u.laplacian, wave)(x)
    np.testing.assert_allclose(found, laplacian, rtol=1e-12)
    waves = breadth.applied(
        lambda u, x: u.d(0, 0) - u.d(1, 1), lambda x: x[0] * x[1] ** 3
    )
    np.testing.assert_allclose(waves(x), -6 * 0.3 * 0.8, rtol=1e-12)
    known = {"p": lambda x: x[0] ** 2, "q": lambda x: x[1]}
    both = breadth.applied(lambda u, x: u["p"].d(0) * u["q"].value, known)
    np.testing.assert_allclose(both(x), 2 * 0.3 * 0.8, rtol=1e-12)


@pytest.mark.parametrize("name, n", [("beam", 20), ("advection", 80), ("stokes", 50)])
def test_breadth(name, n):
    row = breadth.run(name, n=n)
    assert row["converged"]
    for unknown, learned in row["learned"].items():
        assert learned["relative"] < 0.1
        assert learned["relative"] < 0.9 * row["untrained"][unknown]["relative"]
    assert row["kind"] in breadth.table([row])


def test_six_dimensions():
    # What is a sum over dimensions is found with few points by a kernel that is one.
    only = {"a sum": dimensions.solutions["a sum"]}
    row = dimensions.run("additive", n=60, steps=15, solutions=only)["a sum"]
    assert row["untrained"]["relative"] < 1e-3
    assert row["learned"]["relative"] < 1e-5


def test_products_in_six_dimensions():
    # Of kernels of one dimension each: the Gaussian kernel, and much like it.
    exact = dimensions.solutions["no sum"]
    keys = jax.random.split(jax.random.key(0), 3)
    cube, operator = dimensions.cube, dimensions.equation
    known = breadth.applied(operator, exact)
    conditions = [
        eb.Condition(operator, cube.interior(60, key=keys[0]), known),
        eb.Condition(dimensions.value, cube.boundary(90, key=keys[1]), exact),
    ]
    x = cube.interior(100, key=keys[2])
    scales = np.linspace(1.2, 0.8, dimensions.dim)

    def solved(kernel):
        return eb.solve(eb.GaussianProcess(kernel), conditions)(x)

    def product(kernel):
        kernels = [eb.Subspace(kernel(s), i) for i, s in enumerate(scales)]
        return ft.reduce(operators.mul, kernels)

    one = solved(eb.Gaussian(scales))
    np.testing.assert_allclose(solved(product(eb.Gaussian)), one, atol=1e-6)
    size = np.sqrt(np.mean(np.square(jax.vmap(exact)(x))))
    assert np.sqrt(np.mean(np.square(one - jax.vmap(exact)(x)))) < 0.1 * size


def test_linearisation():
    mild = linearisation.run("burgers", 0.5, 40)
    strong = linearisation.run("burgers", 0.05, 40)
    for row in (mild, strong):
        # The exact gradient is that of converged solves.
        assert row["far"]["converged"] and row["far"]["check"] < 1e-3
    assert mild["far"]["difference"] < strong["far"]["difference"]
    assert mild["far"]["spectral radius"] < strong["far"]["spectral radius"]
    assert len(linearisation.table([mild, strong]).splitlines()) == 9


def test_sensitivity():
    chosen = ("nugget", "1e-6"), ("nugget", "automatic"), ("validation", "100")
    rows = [sensitivity.run("elliptic", *each, 0, n=60, steps=3) for each in chosen]
    assert rows[0]["error"]["rms"] > max(row["error"]["rms"] for row in rows[1:])
    found, judged = sensitivity.table(rows).split("\n\n")
    assert len(found.splitlines()) == 5
    # The objective knows which nugget is better.
    assert judged.endswith("\n| nugget | elliptic | 1 | 1 | 1 | 1 |")
    for problem in sensitivity.problems.values():
        assert set(sensitivity.choices(problem)) <= set(sensitivity.kinds)


def test_inverse():
    row = inverse.run("source", "leave-one-out", 0, n=60)
    assert row["converged"] and row["bars"] == "conditional"
    assert row["fields"]["u"]["relative"] < 0.05
    assert row["fields"]["f"]["relative"] < 0.5
    assert 0.3 < row["fields"]["f"]["covered"] <= 1
    assert len(inverse.table([row, row]).splitlines()) == 4
    # The logarithm of a number, fitted through the exact solution.
    condition = inverse.heat.stated(jax.random.key(0), 10)[-1]
    found = inverse.heat.most_likely(condition)["log_diffusion"]
    assert abs(found - inverse.heat.numbers["log_diffusion"]) < 0.1


def test_robustness():
    rows = [
        robustness.run("elliptic", 0, start, way, n=60, steps=20)
        for way in robustness.ways(20)
        for start in (0.05, 1.0)
    ]
    lines = robustness.table(rows).splitlines()
    wells = [line.split("|")[3].strip() for line in lines[2:]]
    assert wells[1] == "0 of 2" and wells[-1] == "2 of 2"


@pytest.mark.parametrize(
    "name",
    [
        "experiments",
        "robustness",
        "linearisation",
        "breadth",
        "dimensions",
        "sensitivity",
        "inverse",
    ],
)
def test_tables_are_those_of_the_results(name):
    kept = reporting.read(name)
    module = run if name == "experiments" else importlib.import_module(name)
    table = module.table(kept if name == "experiments" else kept["runs"])
    text = (reporting.results / f"{name}.md").read_text()
    assert text == table + "\n"


def test_a_study_keeps_the_rows_of_other_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "results", tmp_path)
    times = it.count()

    def rows(names):
        return [dict(fruit=name, time=next(times)) for name in names]

    def table(rows):
        cells = [(row["fruit"], row["time"]) for row in rows]
        return reporting.markdown(["fruit", "time"], cells)

    for *names, after in (
        ("pear", [("pear", 0)]),
        ("apple", "fig", [("apple", 1), ("fig", 2), ("pear", 0)]),
        ("fig", [("apple", 1), ("fig", 3), ("pear", 0)]),
    ):
        monkeypatch.setattr("sys.argv", ["study.py", *names, "--keep"])
        fruits = ("apple", "fig", "pear")
        reporting.study("fruits", "fruit", "Fruits.", fruits, rows, table)
        kept = reporting.read("fruits")["runs"]
        assert [(row["fruit"], row["time"]) for row in kept] == after
        assert (tmp_path / "fruits.md").read_text().count("\n") == 2 + len(after)
    assert capsys.readouterr().out.count("| pear |") == 1  # What was run, and no more.


def test_costs_of_a_step(capsys):
    # Both ways have the same objective, up to the effect of their nuggets.
    rows = [hypergradient.measure("elliptic", way, 12) for way in hypergradient.ways]
    objectives = [row["objective"] for row in rows]
    np.testing.assert_allclose(objectives[1:], objectives[0], rtol=1e-4)
    profile_step.measure("elliptic", 12, "frozen")
    assert "factorisation" in capsys.readouterr().out
