"""Everything numerical under every transformation of JAX, and how often it compiles."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import (
    burgers,
    central_difference,
    dot,
    moved,
    points_mesh,
    random_direction,
)


def _close(a, b, rtol=1e-8):
    # Relative to the largest entry of each leaf.
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.shape == y.shape
        atol = rtol * np.max(np.abs(y), initial=1e-6)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


#
# Kernels
#


def _network(x):
    return jnp.tanh(jnp.array([[0.5, 1.0], [1.0, -0.3]]) @ x)


_kernels = dict(
    gaussian=lambda a: eb.Gaussian(jnp.stack([a, 2 * a])),
    matern=lambda a: eb.Matern(a, nu=2.5),
    rational_quadratic=lambda a: eb.RationalQuadratic(a, 2 * a),
    periodic=lambda a: eb.Periodic(a, 3 * a),
    polynomial=lambda a: eb.Polynomial(2, a, 2 * a),
    algebra=lambda a: a * eb.Gaussian(a) + eb.Matern(a) * eb.Constant(2 * a) + a,
    subspace=lambda a: eb.Subspace(eb.Gaussian(a), 1) * eb.Stretched(eb.Matern(a), 2.0),
    warped=lambda a: eb.Warped(eb.Gaussian(a), _network),
    gibbs=lambda a: eb.Gibbs(lambda x: a * (1 + x**2)),
)


@pytest.mark.parametrize("name", _kernels)
def test_kernels(name):
    x, y = jnp.array([0.3, 0.7]), jnp.array([0.5, -0.2])
    sizes = jnp.array([0.4, 0.9])

    def value(a, x, y):
        return _kernels[name](a)(x, y)

    fn = jax.value_and_grad(value, (0, 1))
    one, two = (fn(a, x, y) for a in sizes)
    _close(jax.jit(fn)(sizes[1], x, y), two)
    _close(jax.vmap(fn, (0, None, None))(sizes, x, y), _stack([one, two]))
    both = jnp.stack([x, y])
    pairs = jax.jit(jax.vmap(jax.vmap(fn, (None, None, 0)), (None, 0, None)))
    _close(jax.tree.map(lambda v: v[0, 1], pairs(sizes[0], both, both)), one)
    slope = jax.jvp(lambda a: value(a, x, y), (sizes[0],), (jnp.ones(()),))[1]
    _close(slope, one[1][0])


#
# The inner problem
#


class Cubic(eqx.Module):
    strength: jax.Array = eqx.field(converter=jnp.asarray)

    def __call__(self, u, x):
        return -u.laplacian + self.strength * u.value**3


def _value(u, x):
    return u.value


interior = jnp.linspace(0.0, 2.0, 8)[1:-1, None]
ends = jnp.array([[0.0], [2.0]])
grid = jnp.linspace(0.1, 1.9, 4)[:, None]
sources = 12 * jnp.sin(3 * interior[:, 0])


def _solve(lengthscale, targets, noise=0.1, **kwargs):
    pde = eb.Condition(Cubic(2.0), interior, targets, noise=noise, name="pde")
    boundary = eb.Condition(_value, ends, noise=0.02)
    prior = eb.GaussianProcess(2.0 * eb.Gaussian(lengthscale))
    return eb.solve(prior, [pde, boundary], **kwargs)


def _everything(solution):
    nonlinear = lambda u, x: x[0] * u.d(0) ** 2
    objective = eb.ValidationResidual(grid, target=jnp.ones(4), batch_size=2)
    key = jax.random.key(0)
    return dict(
        many=solution(grid),
        one=solution(grid[0]),
        slope=solution.d(0)(grid),
        applied=solution.apply(nonlinear, grid),
        std=solution.std(grid),
        std_of=solution.std(grid, nonlinear),
        samples=solution.sample(grid, key=key, num_samples=3),
        residuals=solution.residuals(),
        spectrum=solution.spectrum(),
        radius=solution.spectral_radius(),
        condition_number=solution.condition_number(),
        validation=objective(solution),
        batch=objective.batch(key)(solution),
        weights=solution.weights,
        change=solution.stats["rkhs_norm"],
        steps=jnp.asarray(solution.stats["num_steps"]),
    )


lengths = jnp.array([0.5, 0.7])


@pytest.fixture(scope="module")
def plain():
    return [_everything(_solve(length, sources)) for length in lengths]


def test_jit_and_vmap(plain):
    fn = lambda length, targets: _everything(_solve(length, targets))
    _close(jax.jit(fn)(lengths[0], sources), plain[0])
    many = eqx.filter_jit(eqx.filter_vmap(fn, in_axes=(0, None)))
    _close(many(lengths, sources), _stack(plain))


def test_solutions_go_in_and_out(plain):
    # A solution may leave a transformed function, and enter another one.
    solutions = jax.jit(jax.vmap(_solve, (0, None)))(lengths, sources)
    many = eqx.filter_vmap(lambda solution: solution(grid))(solutions)
    _close(many, jnp.stack([p["many"] for p in plain]))
    assert np.all(solutions.result == eb.RESULTS.successful)
    with pytest.raises(ValueError, match="several solutions in one"):
        solutions(grid)
    once_more = eqx.filter_vmap(lambda s: _solve(0.6, sources, initial=s)(grid))
    again = once_more(solutions)
    _close(again[0], again[1], rtol=1e-6)


def test_vmap_of_starts():
    # Wherever it starts, if it converges it does so to the same.
    start = lambda scale: lambda x: scale * jnp.sin(2 * x[0])

    def fn(scale):
        solution = _solve(lengths[0], sources, initial=start(scale))
        return jnp.sum(solution(grid)), (solution(grid), solution.stats["num_steps"])

    fn = jax.vmap(jax.value_and_grad(fn, has_aux=True))
    (_, (values, steps)), slopes = fn(jnp.array([0.0, 0.5, 3.0]))
    _close(values[1], values[0], rtol=1e-6)
    _close(values[2], values[0], rtol=1e-6)
    assert len(set(steps.tolist())) > 1
    # To where it converges does not move with the start.
    assert np.all(slopes == 0)


#
# Derivatives
#


def _loss(length, targets, throw=True):
    solution = _solve(length, targets, throw=throw)
    return jnp.sum(solution(grid) ** 2) + jnp.sum(solution.std(grid))


batch = jnp.stack([sources, 0.5 * sources])


@pytest.fixture(scope="module")
def gradients():
    gradient = jax.grad(_loss, (0, 1))
    return [gradient(length, targets) for length, targets in zip(lengths, batch)]


def test_gradients_are_right(gradients):
    direction = random_direction((lengths[0], batch[0]), jax.random.key(1))
    along = lambda h: _loss(*moved((lengths[0], batch[0]), direction, h))
    truth = central_difference(along, 1e-3)
    _close(dot(gradients[0], direction), truth, rtol=1e-6)
    _, tangent = jax.jvp(_loss, (lengths[0], batch[0]), direction)
    _close(tangent, dot(gradients[0], direction))


def test_gradients_under_transformations(gradients):
    gradient = jax.grad(_loss, (0, 1))
    _close(jax.vmap(jax.jit(gradient))(lengths, batch), _stack(gradients))


def test_failures_harm_nobody_else(gradients):
    def fn(length, targets, noise):
        solution = _solve(length, targets, noise, throw=False)
        value = jnp.sum(solution(grid) ** 2) + jnp.sum(solution.std(grid))
        return value, solution.result, solution.spectral_radius()

    def total(*args):
        values, results, radii = jax.vmap(fn)(*args)
        ok = results == eb.RESULTS.successful
        return jnp.sum(jnp.where(ok, values, 0.0)), (values, results, radii)

    # Here derivatives are taken of a batch, above they are taken in a batch.
    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    one = lengths[0]
    good = [jnp.full(5, one), jnp.stack([batch[0]] * 5), jnp.full(5, 0.1)]
    slopes, (values, results, radii) = gradient(*good)
    assert np.all(results == eb.RESULTS.successful)
    # A lengthscale that is not a number, a target that is not, and one lengthscale that
    # makes the Gram matrix singular.
    bad = [
        jnp.array([one, jnp.nan, one, 1e8, one]),
        good[1].at[2, 3].set(jnp.nan),
        jnp.array([0.1, 0.1, 0.1, 1e-30, 0.1]),
    ]
    new_slopes, (found, results, new_radii) = gradient(*bad)
    kinds = ["successful", "nonfinite_data", "nonfinite_data", "singular_gram"]
    for i, kind in enumerate([*kinds, "successful"]):
        assert (results == getattr(eb.RESULTS, kind))[i], kind
    assert np.all(np.isnan(found[1:4]))
    for i in (0, 4):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        kept = pick((found, new_radii, new_slopes))
        _close(kept, pick((values, radii, slopes)), rtol=1e-12)
        _close(kept[2], gradients[0])


def test_hopeless_values_do_not_raise_in_derivatives():
    def fn(length):
        solution = _solve(length, batch[0], 0.1, throw=False)
        return jnp.sum(solution(grid)), solution.result

    for derivative in (jax.jacfwd, jax.jacrev):
        compiled = jax.jit(derivative(fn, has_aux=True))
        for length in (0.0, 1e-200, 1e-60, 1e60, jnp.inf, jnp.nan):
            _, result = compiled(jnp.asarray(length))
            failed = result != eb.RESULTS.successful
            assert failed or length in (1e-60, 1e60, jnp.inf)


#
# Compiling is counted
#

traced = []


@pytest.fixture
def count(compiled):
    # Runs a function, and counts how often Python passes through the operator and the
    # kernel below, and how often something is compiled.
    def run(fn, *args):
        traced.clear()
        compiled.clear()
        jax.block_until_ready(eqx.filter(fn(*args), eqx.is_array))
        return len(traced), len(compiled.names)

    return run


#
# Inside a larger model
#


class Model(eqx.Module):
    # Networks give the source term and the lengthscale, and read the solution.
    source: eqx.nn.MLP
    length: eqx.nn.MLP
    head: eqx.nn.MLP

    def __init__(self, key):
        mlp = lambda n, key: eqx.nn.MLP(n, "scalar", 3, 1, jnp.tanh, key=key)
        self.source, self.length, self.head = map(
            mlp, (1, 2, 2), jax.random.split(key, 3)
        )

    def __call__(self, features):
        length = 0.3 + 0.4 * jax.nn.sigmoid(self.length(features))
        source = lambda x: 100 * self.source(x)
        pde = eb.Condition(Cubic(100.0), interior, source, noise=5.0)
        boundary = eb.Condition(_value, ends, noise=0.02)
        prior = eb.GaussianProcess(2.0 * eb.Gaussian(length))
        solution = eb.solve(prior, [pde, boundary], eb.GaussNewton(1e-11, 1e-12))
        read = jnp.stack([solution(grid), solution.std(grid)], axis=1)
        loss = jnp.sum(jax.vmap(self.head)(read) ** 2) + jnp.sum(read)
        return loss, solution.spectral_radius()


def test_nested_in_a_larger_model(count):
    features = jnp.array([0.4, -1.0])
    run = eqx.filter_jit(lambda model, features: model(features))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model, f: model(f)[0]))
    model, other = (Model(key) for key in jax.random.split(jax.random.key(0)))
    direction = random_direction(model, jax.random.key(1))
    along = lambda h: run(moved(model, direction, h), features)[0]
    truth = central_difference(along, 1e-3)
    exact = gradient(model, features)
    arrays = eqx.filter(direction, eqx.is_array)
    _close(dot(exact, arrays), truth, rtol=1e-7)
    # All three networks take part, and a frozen gradient would have been noticed.
    leaves = jax.tree.leaves(exact)
    assert len(leaves) == 12 and all(np.any(leaf != 0) for leaf in leaves)
    assert run(model, features)[1] > 0.05
    # Another network compiles nothing.
    assert count(gradient, other, features)[1] == 0


#
# Compiling once
#


class Noted(eqx.Module):
    strength: jax.Array

    def __call__(self, u, x):
        traced.append("operator")
        return -u.laplacian + self.strength * u.value**3


class NotedKernel(eb.AbstractKernel):
    lengthscale: jax.Array

    def __call__(self, x, y):
        traced.append("kernel")
        return jnp.exp(-jnp.sum((x - y) ** 2) / self.lengthscale**2 / 2)


def _new_values(seed, n=6, fresh=False):
    # Everything anew, as numbers that are already on the device.
    a, b, c, d = np.random.default_rng(seed).uniform(0.9, 1.1, 4)
    points = jnp.asarray(a * np.linspace(0.1, 1.9, n)[:, None])
    targets = jnp.asarray(b * np.sin(3 * np.linspace(0.1, 1.9, n)))
    strength = jnp.asarray(c)
    operator = lambda u, x: Noted(strength)(u, x) if fresh else None
    pde = eb.Condition(
        operator if fresh else Noted(strength), points, targets, noise=0.1 * d
    )
    boundary = eb.Condition(lambda u, x: u.value, ends, a, noise=0.02 * b)
    prior = eb.GaussianProcess(NotedKernel(jnp.asarray(0.5 * d)), 0.1 * c)
    return prior, [pde, boundary]


def test_compiles_once_per_set_of_shapes(count, compiled):
    problems = [_new_values(seed) for seed in range(3)]
    first, _ = count(eb.solve, *problems[0])
    checks, num = count(eb.solve, *problems[1])
    # The operator and the kernel are looked at once more, to check them.
    assert num == 0 and checks <= 6 < first / 3
    assert count(eb.solve, *problems[2]) == (checks, 0)
    # Another number of points compiles once, and then not again.
    longer = [_new_values(seed, 7) for seed in range(2)]
    more, num = count(eb.solve, *longer[0])
    assert more == first and compiled.names.count("jit(_solve)") == 1
    assert count(eb.solve, *longer[1]) == (checks, 0)
    assert count(eb.solve, *problems[0]) == (checks, 0)


def test_fresh_functions_do_not_compile_anew(count, compiled):
    problems = [_new_values(seed, fresh=True) for seed in range(2)]
    first, num = count(eb.solve, *problems[0])
    assert compiled.names.count("jit(_solve)") == 1
    checks, num = count(eb.solve, *problems[1])
    assert num == 0 and checks < first / 3


def test_evaluations_compile_once(count):
    solutions = [eb.solve(*_new_values(seed)) for seed in range(2)]

    def evaluate(solution, shift):
        operator = lambda u, x: u.d(0) + shift * u.value
        return (
            solution(grid),
            solution.d(0)(grid),
            solution.apply(operator, grid),
            solution.std(grid, operator),
            solution.residuals(),
            solution.spectrum(),
            solution.condition_number(),
        )

    shifts = jnp.array(1.0), jnp.array(2.0)
    assert count(evaluate, solutions[0], shifts[0])[1] >= 7
    assert count(evaluate, solutions[1], shifts[1])[1] == 0


#
# Several devices
#


def test_rows_are_shared_between_devices():
    # With a number of points that does not divide, and a network in the kernel.
    theta, example = burgers.theta, burgers

    def objective(theta):
        solution = eb.solve(*example.make(theta))
        return jnp.sum((example.targets - solution(example.validation)) ** 2)

    fn = eqx.filter_jit(eqx.filter_value_and_grad(objective))
    known = fn(theta)
    with jax.set_mesh(points_mesh(2)):
        text = fn.lower(theta).as_text()
        found = fn(theta)
    assert "all_gather" in text
    _close(jax.device_get(found), jax.device_get(known))
    assert len(found[0].sharding.device_set) == 2
