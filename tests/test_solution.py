"""What a solution can tell, against closed formulas for Gaussian processes."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest


#
# Regression in closed form, in NumPy
#
# A linear operator is a list of terms (coefficient, unknown, derivative): coefficients
# are functions of all points at once, and derivatives say how often to differentiate
# along each dimension. Kernels are Gaussian, given as (variance, lengthscale).
#


def _entry(kernel, a, x, b, y):
    # The derivative `a` in x and `b` in y of the kernel, by Hermite polynomials.
    variance, length = kernel
    out = np.full((len(x), len(y)), variance)
    for d, (i, j) in enumerate(zip(a, b)):
        r = (np.asarray(x)[:, None, d] - np.asarray(y)[None, :, d]) / length
        hermite = np.polynomial.hermite_e.hermeval(r, [0] * (i + j) + [1])
        out = out * (-1 / length) ** (i + j) * hermite * np.exp(-(r**2) / 2) * (-1) ** j
    return out


def _covariance(kernels, a, x, b, y):
    return sum(
        np.outer(f(x), g(y)) * _entry(kernels[name], i, x, j, y)
        for f, name, i in a
        for g, other, j in b
        if name == other
    ) + np.zeros((len(x), len(y)))


class Regression:
    # Of linear conditions `(operator, points, target, noise)`. The mean is a function
    # of an unknown, a derivative and points.

    def __init__(self, kernels, mean, conditions):
        self.kernels, self.prior_mean, self.conditions = kernels, mean, conditions
        rows = [self._with_conditions(a, x) for a, x, _, _ in conditions]
        noise = [np.full(len(x), s**2) for _, x, _, s in conditions]
        matrix = np.concatenate(rows) + np.diag(np.concatenate(noise))
        self.inverse = np.linalg.inv(matrix)
        left = [t - self._mean(a, x) for a, x, t, _ in conditions]
        self.weights = self.inverse @ np.concatenate(left)

    def _mean(self, a, x):
        return sum(f(x) * self.prior_mean(name, i, x) for f, name, i in a)

    def _with_conditions(self, a, x):
        rows = [_covariance(self.kernels, a, x, b, y) for b, y, _, _ in self.conditions]
        return np.concatenate(rows, axis=1)

    def mean(self, a, x):
        return self._mean(a, x) + self._with_conditions(a, x) @ self.weights

    def covariance(self, a, x, b, y):
        left, right = self._with_conditions(a, x), self._with_conditions(b, y)
        prior = _covariance(self.kernels, a, x, b, y)
        return prior - left @ self.inverse @ right.T

    def std(self, a, x):
        return np.sqrt(np.diagonal(self.covariance(a, x, a, x)))


def _constant(c):
    return lambda x: np.full(len(x), c)


#
# One unknown in two dimensions
#

interior = jax.random.uniform(jax.random.key(1), (6, 2))
observed = jax.random.uniform(jax.random.key(2), (4, 2))
elsewhere = jax.random.uniform(jax.random.key(3), (5, 2))
sources = jnp.cos(3 * interior[:, 0])
values = jnp.sin(2 * observed[:, 1])


def _mean(x):
    return 0.3 + x[0] * x[1] ** 2


def _value(u, x):
    return u.value


def _single():
    prior = eb.GaussianProcess(1.5 * eb.Gaussian(0.6), _mean)
    operator = lambda u, x: -u.laplacian + (1 + x[0]) * u.value
    conditions = [
        eb.Condition(operator, interior, sources, noise=0.3, name="pde"),
        eb.Condition(_value, observed, values, noise=0.05, name="data"),
    ]
    return prior, conditions


def _mean_derivatives(name, index, x):
    x, y = np.asarray(x).T
    return {
        (0, 0): 0.3 + x * y**2,
        (0, 1): 2 * x * y,
        (2, 0): 0 * x,
        (0, 2): 2 * x,
        (1, 1): 2 * y,
    }[index]


# Operators, for the library and for the closed form.
operators = dict(
    value=(_value, [(_constant(1.0), "u", (0, 0))]),
    slope=(lambda u, x: u.d(1), [(_constant(1.0), "u", (0, 1))]),
    laplacian=(
        lambda u, x: u.laplacian,
        [(_constant(1.0), "u", (2, 0)), (_constant(1.0), "u", (0, 2))],
    ),
    mixed=(
        lambda u, x: u.d(0, 1) - 2 * x[1] * u.value,
        [(_constant(1.0), "u", (1, 1)), (lambda x: -2 * x[:, 1], "u", (0, 0))],
    ),
)


def _single_in_closed_form():
    value, laplacian = operators["value"][1], operators["laplacian"][1]
    pde = [(_constant(-1.0), *term[1:]) for term in laplacian]
    pde.append((lambda x: 1 + x[:, 0], "u", (0, 0)))
    conditions = [(pde, interior, sources, 0.3), (value, observed, values, 0.05)]
    return Regression({"u": (1.5, 0.6)}, _mean_derivatives, conditions)


@pytest.fixture(scope="module")
def single():
    return eb.solve(*_single())


@pytest.mark.parametrize("name", list(operators))
def test_posterior_of_one_unknown(single, name):
    ours, theirs = operators[name]
    truth = _single_in_closed_form()
    mean, std = truth.mean(theirs, elsewhere), truth.std(theirs, elsewhere)
    np.testing.assert_allclose(single.apply(ours, elsewhere), mean, rtol=1e-9)
    np.testing.assert_allclose(single.std(elsewhere, ours), std, rtol=1e-8)
    assert np.all(std > 0)


def test_one_and_many_points(single):
    x = elsewhere[2]
    call = lambda x: single(x)
    for fn in (call, single.d(1), single.d(0, 0), single.std):
        many = fn(elsewhere)
        assert many.shape == (5,) and fn(x).shape == ()
        np.testing.assert_allclose(fn(x), many[2], rtol=1e-10)
    gradient = lambda u, x: {"gradient": u.grad, "point": x}
    many, one = single.apply(gradient, elsewhere), single.apply(gradient, x)
    assert many["gradient"].shape == (5, 2) and one["gradient"].shape == (2,)
    np.testing.assert_allclose(one["gradient"], many["gradient"][2], rtol=1e-10)
    np.testing.assert_array_equal(many["point"], elsewhere)
    # No points at all are many points.
    assert single(jnp.zeros((0, 2))).shape == (0,)


def test_derivatives_are_derivatives(single):
    h, x = 1e-3, elsewhere
    step = jnp.broadcast_to(jnp.array([h, 0.0]), x.shape)
    difference = lambda f: (
        8 * (f(x + step) - f(x - step)) - f(x + 2 * step) + f(x - 2 * step)
    )
    np.testing.assert_allclose(single.d(0)(x), difference(single) / (12 * h), rtol=1e-8)
    np.testing.assert_allclose(
        single.d(1, 0)(x), difference(single.d(1)) / (12 * h), rtol=1e-7
    )
    # And it can be differentiated like any function.
    np.testing.assert_allclose(
        jax.vmap(jax.grad(single))(x),
        jnp.stack([single.d(0)(x), single.d(1)(x)], axis=1),
        rtol=1e-9,
    )
    hessian = jax.vmap(jax.hessian(single))(x)
    np.testing.assert_allclose(
        hessian, single.apply(lambda u, x: u.hessian, x), rtol=1e-7, atol=1e-9
    )


def test_residuals_are_noise_times_weights(single):
    residuals = single.residuals()
    assert {k: v.shape for k, v in residuals.items()} == {"pde": (6, 1), "data": (4, 1)}
    np.testing.assert_allclose(
        residuals["data"][:, 0], single(observed) - values, atol=1e-12
    )
    truth = _single_in_closed_form()
    np.testing.assert_allclose(
        residuals["pde"][:, 0], -(0.3**2) * truth.weights[:6], rtol=1e-8
    )
    # Conditions are solved in an order of the library's own.
    np.testing.assert_allclose(
        np.sort(single.weights), np.sort(truth.weights), rtol=1e-8
    )


def test_samples(single):
    num = 20000
    truth = _single_in_closed_form()
    for ours, theirs in (operators["value"], operators["slope"]):
        draws = single.sample(
            elsewhere, key=jax.random.key(4), num_samples=num, operator=ours
        )
        assert draws.shape == (num, 5)
        mean = truth.mean(theirs, elsewhere)
        covariance = truth.covariance(theirs, elsewhere, theirs, elsewhere)
        variance = np.diagonal(covariance)
        assert np.all(np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / num))
        # The standard error of an entry of a sample covariance.
        error = np.sqrt((covariance**2 + np.outer(variance, variance)) / num)
        assert np.all(np.abs(np.cov(draws.T) - covariance) < 5 * error)
        # The bounds would notice if correlations were forgotten.
        off = covariance - np.diag(variance)
        assert np.max(np.abs(off) / error) > 20
    again = single.sample(elsewhere, key=jax.random.key(4), num_samples=2)
    same = single.sample(elsewhere, key=jax.random.key(4), num_samples=2)
    np.testing.assert_array_equal(again, same)
    assert np.all(again[0] != again[1])


#
# Two unknowns in one dimension
#

points = jnp.linspace(0.0, 1.0, 6)[:, None]
ends = jnp.array([[0.0], [0.8]])
between = jnp.linspace(0.07, 0.95, 4)[:, None]


def _coupled():
    prior = {
        "v": eb.GaussianProcess(eb.Gaussian(0.4), 0.5),
        "a": eb.GaussianProcess(2.0 * eb.Gaussian(0.7)),
    }
    first = lambda u, x: u["v"].d(0) - u["a"].value
    conditions = [
        eb.Condition(first, points, jnp.sin(points[:, 0]), noise=0.1, name="ode"),
        eb.Condition(lambda u, x: u["v"].value, ends, 1.0, noise=0.02, name="ends"),
    ]
    return prior, conditions


_of = {
    "v": [(_constant(1.0), "v", (0,))],
    "a": [(_constant(1.0), "a", (0,))],
    "v'": [(_constant(1.0), "v", (1,))],
    "a'": [(_constant(1.0), "a", (1,))],
    "v' - a": [(_constant(1.0), "v", (1,)), (_constant(-1.0), "a", (0,))],
    "v' + a": [(_constant(1.0), "v", (1,)), (_constant(1.0), "a", (0,))],
}


def _coupled_in_closed_form():
    mean = lambda name, index, x: _constant(0.5 * (name == "v" and index == (0,)))(x)
    conditions = [
        (_of["v' - a"], points, np.sin(points[:, 0]), 0.1),
        (_of["v"], ends, np.ones(2), 0.02),
    ]
    return Regression({"v": (1.0, 0.4), "a": (2.0, 0.7)}, mean, conditions)


def test_posterior_of_several_unknowns():
    solution, truth = eb.solve(*_coupled()), _coupled_in_closed_form()
    found, slopes = solution(between), solution.d(0)(between)
    stds = solution.std(between)
    assert set(found) == set(slopes) == set(stds) == {"v", "a"}
    for name in found:
        value, slope = _of[name], _of[name + "'"]
        np.testing.assert_allclose(found[name], truth.mean(value, between), rtol=1e-9)
        np.testing.assert_allclose(slopes[name], truth.mean(slope, between), rtol=1e-8)
        np.testing.assert_allclose(stds[name], truth.std(value, between), rtol=1e-8)
    assert solution(between[0])["v"].shape == ()
    mixed = lambda u, x: u["v"].d(0) + u["a"].value
    np.testing.assert_allclose(
        solution.std(between, mixed), truth.std(_of["v' + a"], between), rtol=1e-8
    )
    residuals = solution.residuals()
    np.testing.assert_allclose(residuals["ends"][:, 0], solution(ends)["v"] - 1.0)


def test_samples_of_several_unknowns_are_joint():
    num, x = 20000, between[:2]
    solution, truth = eb.solve(*_coupled()), _coupled_in_closed_form()
    draws = solution.sample(x, key=jax.random.key(5), num_samples=num)
    v, a = _of["v"], _of["a"]
    cross = truth.covariance(v, x, a, x)
    found = np.cov(draws["v"].T, draws["a"].T)[:2, 2:]
    variances = truth.std(v, x)[:, None] ** 2 * truth.std(a, x)[None, :] ** 2
    error = np.sqrt((variances + cross**2) / num)
    assert np.all(np.abs(found - cross) < 5 * error)
    assert np.max(np.abs(cross) / error) > 20


#
# Nonlinear
#


def _nonlinear(lengthscale=0.5):
    operator = lambda u, x: -u.d(0, 0) + u.value**3
    source = lambda x: 8 * jnp.sin(3 * x[0])
    prior = eb.GaussianProcess(eb.Gaussian(lengthscale))
    conditions = [
        eb.Condition(operator, points, source, noise=0.2, name="pde"),
        eb.Condition(_value, ends, noise=0.01, name="ends"),
    ]
    return prior, conditions


@pytest.fixture(scope="module")
def nonlinear():
    return eb.solve(*_nonlinear())


def test_posterior_is_of_the_linearised_problem(nonlinear):
    u = nonlinear
    assert jnp.max(jnp.abs(u(points))) > 0.3
    value = [(_constant(1.0), "u", (0,))]
    pde = [(_constant(-1.0), "u", (2,)), (lambda x: 3 * u(x) ** 2, "u", (0,))]
    target = 8 * np.sin(3 * points[:, 0]) + 2 * u(points) ** 3
    truth = Regression(
        {"u": (1.0, 0.5)},
        lambda name, index, x: np.zeros(len(x)),
        [(pde, points, target, 0.2), (value, ends, np.zeros(2), 0.01)],
    )
    np.testing.assert_allclose(u(between), truth.mean(value, between), rtol=1e-7)
    np.testing.assert_allclose(u.std(between), truth.std(value, between), rtol=1e-7)
    # A nonlinear operator is linearised at the solution.
    np.testing.assert_allclose(
        u.std(between, lambda u, x: u.value**2),
        2 * jnp.abs(u(between)) * truth.std(value, between),
        rtol=1e-7,
    )


def test_nonlinear_residuals(nonlinear):
    u = nonlinear
    by_hand = -u.d(0, 0)(points) + u(points) ** 3 - 8 * jnp.sin(3 * points[:, 0])
    np.testing.assert_allclose(u.residuals()["pde"][:, 0], by_hand, atol=1e-9)
    assert jnp.max(jnp.abs(by_hand)) > 1e-4
    np.testing.assert_allclose(
        u.stats["residual_norm"],
        jnp.sqrt(jnp.mean(jnp.concatenate([by_hand, u(ends)]) ** 2)),
        rtol=1e-6,
    )


def test_std_where_the_value_is_known():
    # Without noise there is no doubt left at the points, and much between them.
    prior = eb.GaussianProcess(eb.Gaussian(jnp.asarray(0.15)))
    condition = eb.Condition(_value, points, lambda x: jnp.sin(x[0]))

    def std(prior, x):
        return eb.solve(prior, [condition]).std(x)

    assert np.all(std(prior, points) < 1e-6)
    middle = 0.5 * (points[1:] + points[:-1])
    assert np.all(std(prior, middle) > 1e-2)
    gradient = jax.grad(lambda p, x: jnp.sum(std(p, x)), (0, 1))
    by_prior, by_x = gradient(prior, points)
    assert np.all(np.isfinite(by_prior.kernel.lengthscale.raw))
    assert np.all(np.isfinite(by_x))


def test_what_rounding_leaves():
    # As the FAQ says: of a prior with a variance of one, in a domain that is covered.
    line = eb.Box(0.0, 1.0)
    conditions = [
        eb.Condition(lambda u, x: -u.laplacian, line.interior(10, method="grid")),
        eb.Condition(_value, line.boundary(2)),
    ]
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian(1.0)), conditions)
    std = solution.std(line.grid(51))
    assert jnp.all((std >= 0) & (std < 1e-7))
    # The solution is the prior's mean.
    assert solution.stats["rkhs_norm"] == 0


#
# Save and load
#


def test_save_and_load(nonlinear, tmp_path):
    path = str(tmp_path / "solution.eqx")
    eqx.tree_serialise_leaves(path, nonlinear)
    # To load, build the same problem, with whatever hyperparameters. Nothing is solved:
    # only shapes are needed.
    like = eqx.filter_eval_shape(eb.solve, *_nonlinear(lengthscale=3.0))
    loaded = eqx.tree_deserialise_leaves(path, like)
    for fn in (lambda u: u(between), lambda u: u.std(between), lambda u: u.residuals()):
        jax.tree.map(np.testing.assert_array_equal, fn(loaded), fn(nonlinear))
    np.testing.assert_allclose(loaded.prior.kernel.lengthscale.value, 0.5)
    assert loaded.result == eb.RESULTS.successful
    assert loaded.stats["num_steps"] == nonlinear.stats["num_steps"] > 1


#
# Wrong use
#


@pytest.mark.parametrize("shape", [(3,), (5, 1), (2, 2, 2)])
def test_wrong_points(single, shape):
    x = jnp.ones(shape)
    for fn in (single, single.d(0), single.std, lambda x: single.apply(_value, x)):
        with pytest.raises(ValueError, match=r"one point of shape \(2,\) or many of"):
            fn(x)


def test_wrong_operators(single):
    gradient = lambda u, x: u.grad
    with pytest.raises(ValueError, match=r"must return one number here.*\(2,\)"):
        single.std(elsewhere, gradient)
    with pytest.raises(ValueError, match=r"must return one number here.*\(2,\)"):
        single.sample(elsewhere, key=jax.random.key(0), operator=gradient)
    with pytest.raises(ValueError, match=r"must return one number here.*\(1,\)"):
        single.sample(
            elsewhere, key=jax.random.key(0), operator=lambda u, x: u.value[None]
        )
    with pytest.raises(ValueError, match="along dimension 2"):
        single.d(2)(elsewhere)
    with pytest.raises(ValueError, match="does not depend on the unknown"):
        single.std(elsewhere, lambda u, x: x[0])


def test_repr(nonlinear):
    # What a user knows, and nothing of how it was solved.
    shown = repr(nonlinear)
    assert shown.startswith("Solution(") and "Gaussian(" in shown
    assert "_factor" not in shown and "code object" not in shown
    assert len(shown.splitlines()) < 60
