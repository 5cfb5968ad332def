import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import central_difference, relative_error, value


x = jnp.linspace(0.0, 4.0, 40)[:, None]
between = jnp.linspace(0.05, 4.5, 7)[:, None]


def _draw(key, lengthscale=0.7, noise=0.2):
    # A function with this prior, and data.
    keys = jax.random.split(key)
    everywhere = jnp.concatenate([x, between])
    kernel = eb.unwrap(eb.Gaussian(lengthscale))
    pairs = jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b))(everywhere))
    covariance = pairs(everywhere) + 1e-9 * jnp.eye(len(everywhere))
    root = jnp.linalg.cholesky(covariance)
    f = root @ jax.random.normal(keys[0], (len(everywhere),))
    data = f[: len(x)] + noise * jax.random.normal(keys[1], (len(x),))
    return f[len(x) :], data


def _stated(data, lengthscale=0.7, noise=0.2, learned=True):
    kind = eb.Positive if learned else jnp.asarray
    prior = eb.GaussianProcess(eb.Gaussian(eb.Positive(lengthscale)))
    return prior, [eb.Condition(value, x, data, noise=kind(noise), name="data")]


#
# Of the functions
#


def test_bars_cover_the_truth():
    # Ninety per cent, over many data.
    @jax.jit
    @jax.vmap
    def covered(key):
        truth, data = _draw(key)
        # Errors are raised by callbacks, which under `vmap` run for each of these.
        solution = eb.solve(*_stated(data, learned=False), throw=False)
        inside = jnp.abs(truth - solution(between)) < 1.645 * solution.std(between)
        return inside, solution.standardised_errors("data")

    inside, errors = covered(jax.random.split(jax.random.key(0), 400))
    assert 0.88 < np.mean(inside) < 0.92
    np.testing.assert_allclose(np.mean(errors**2), 1.0, atol=0.03)
    assert np.mean(np.abs(errors) > 1.645) == pytest.approx(0.1, abs=0.01)


def test_wrong_noise_is_seen():
    _, data = _draw(jax.random.key(1))
    right = eb.solve(*_stated(data, learned=False)).standardised_errors("data")
    wrong = eb.solve(*_stated(data, noise=0.02, learned=False))
    assert 0.5 < np.mean(right**2) < 1.7
    assert np.mean(wrong.standardised_errors("data") ** 2) > 20


def test_covariance():
    _, data = _draw(jax.random.key(2))
    solution = eb.solve(*_stated(data, learned=False))
    slope = lambda u, x: u.d(0)
    for operator in (None, slope):
        found = solution.covariance(between, operator)
        std = solution.std(between, operator)
        np.testing.assert_allclose(jnp.sqrt(jnp.diagonal(found)), std, rtol=1e-6)
    # Those of differences, by an operator that sees two points is not possible: by
    # hand, from the textbook.
    kernel = eb.unwrap(eb.Gaussian(0.7))
    gram = lambda a, b: jax.vmap(lambda p: jax.vmap(lambda q: kernel(p, q))(b))(a)
    across = gram(between, x)
    inner = gram(x, x) + 0.04 * jnp.eye(len(x))
    expected = gram(between, between) - across @ jnp.linalg.solve(inner, across.T)
    np.testing.assert_allclose(solution.covariance(between), expected, atol=1e-9)


def test_scalar_unknown():
    # A number is a function with a constant kernel. Here everything is linear: the rate
    # is the slope of a regression, whose error bar is known.
    slopes = 2.0 * x[:, 0] + 0.1 * jax.random.normal(jax.random.key(3), (len(x),))
    prior = {"rate": eb.GaussianProcess(eb.Constant(1e4))}
    data = eb.Condition(lambda u, x: u["rate"].value * x[0], x, slopes, noise=0.1)
    solution = eb.solve(prior, [data])
    here = jnp.zeros(1)
    square = jnp.sum(x**2)
    expected = jnp.sum(x[:, 0] * slopes) / square
    np.testing.assert_allclose(solution(here)["rate"], expected, rtol=1e-6)
    expected = 0.1 / jnp.sqrt(square)
    np.testing.assert_allclose(solution.std(here)["rate"], expected, rtol=1e-5)


#
# Of the hyperparameters
#


@pytest.fixture(scope="module")
def learned():
    _, data = _draw(jax.random.key(5))
    objective = eb.NegativeLogEvidence()
    return eb.learn(*_stated(data), objective, scale_search=False, rtol=1e-9), data


def test_laplace(learned):
    learned, data = learned
    posterior = eb.laplace(learned, eb.NegativeLogEvidence())

    # The inverse of second differences of the evidence, in logarithms.
    @eqx.filter_jit
    def gradient(logs):
        def evidence(logs):
            stated = _stated(data, *jnp.exp(logs))
            return eb.NegativeLogEvidence()(eb.solve(*stated))

        return jax.grad(evidence)(logs)

    best = eb.unwrap((learned.prior.kernel.lengthscale, learned.conditions[0].noise))
    logs = jnp.log(jnp.stack(best))
    assert jnp.max(jnp.abs(gradient(logs))) < 1e-2
    rows = [
        central_difference(lambda h, i=i: gradient(logs.at[i].add(h)), 1e-3)
        for i in range(2)
    ]
    covariance = jnp.linalg.inv(jnp.stack(rows))
    std = jnp.sqrt(jnp.diagonal(covariance))
    found = posterior.std_of(lambda p, c: [p.kernel.lengthscale, c[0].noise])
    assert relative_error(jnp.stack(found), std * jnp.exp(logs)) < 1e-5

    # What that adds to the error bars of the function.
    mean = lambda logs: eb.solve(*_stated(data, *jnp.exp(logs)))(between)
    slopes = jax.jacobian(mean)(logs)
    variance = jnp.einsum("np,pq,nq->n", slopes, covariance, slopes)
    expected = jnp.sqrt(learned.solution.std(between) ** 2 + variance)
    assert relative_error(posterior.std(between), expected) < 1e-5
    slope = posterior.std(between, lambda u, x: u.d(0))
    assert np.all(slope > learned.solution.std(between, lambda u, x: u.d(0)))
    one = posterior.std(between[0])
    np.testing.assert_allclose(one, posterior.std(between)[0], rtol=1e-9)


def test_laplace_wants_a_density(learned):
    with pytest.raises(ValueError, match="logarithm of a probability density"):
        eb.laplace(learned[0], eb.CrossValidation("data"))


def test_laplace_of_what_is_not_determined(learned):
    # No data depend on the mean of the second unknown's kernel, far from everything.
    _, data = _draw(jax.random.key(5))
    _, conditions = _stated(data)
    flat = eb.Objective(lambda solution: jnp.zeros(()))
    with pytest.raises(ValueError, match="not determined"):
        eb.laplace(learned[0], flat)
    # What was known before determines them.
    log = lambda s: 0.5 * jnp.log(eb.unwrap(s.prior).kernel.lengthscale / 0.7) ** 2
    noise = lambda s: 2 * jnp.log(eb.unwrap(s.conditions[0].noise) / 0.2) ** 2
    known = eb.Objective(log) + eb.Objective(noise)
    posterior = eb.laplace(learned[0], known)
    np.testing.assert_allclose(
        posterior.covariance, jnp.diag(jnp.array([1.0, 0.25])), atol=1e-6
    )
