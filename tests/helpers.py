"""Independent truths for the inner problem.

Problem (1) of `docs/method.md` is stated here once more, and solved by other means:
for all jets `y` at all points and one multiplier `w` for each scalar condition, by
Newton's method on the optimality conditions

    y = m + K J(y)^T w,     R(y) - t + Gamma w = 0,

which need no inverse of `K`, the Gram matrix of the jets. Of the library, only its
kernels are called; conditions and priors are read as the containers that they are.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize


def points_mesh(num: int):
    # Whose devices share rows.
    return jax.make_mesh((num,), ("points",), axis_types=(jax.sharding.AxisType.Auto,))


#
# Jets
#


class KnownJet:
    # What an operator is given: like `eb.Jet`, made of numbers.
    def __init__(self, axes, numbers, dim):
        self._table = dict(zip(axes, numbers))
        self._dim = dim

    @property
    def value(self):
        return self._table[()]

    def d(self, *axes):
        return self._table[tuple(sorted(axes))]

    @property
    def grad(self):
        return jnp.stack([self.d(i) for i in range(self._dim)])

    @property
    def laplacian(self):
        return sum(self.d(i, i) for i in range(self._dim))


def nested(fn: Callable, argument: int, axes: tuple[int, ...]) -> Callable:
    for axis in axes:
        fn = lambda *args, fn=fn, axis=axis: jax.grad(fn, argument)(*args)[axis]
    return fn


def jets_at(fn: Callable, axes, points):
    return jax.vmap(lambda x: jnp.stack([nested(fn, 0, a)(x) for a in axes]))(points)


def gram_of_jets(kernel, axes_x, x, axes_y, y):
    # Rows: points in `x`, and for each its derivatives; columns likewise.
    def pair(x, y):
        entry = lambda a, b: nested(nested(kernel, 0, a), 1, b)(x, y)
        return jnp.stack([jnp.stack([entry(a, b) for b in axes_y]) for a in axes_x])

    blocks = jax.vmap(lambda x: jax.vmap(lambda y: pair(x, y))(y))(x)
    n, m, p, q = blocks.shape
    return jnp.transpose(blocks, (0, 2, 1, 3)).reshape(n * p, m * q)


#
# The problem
#


def values(tree):
    # Parameters replaced by what they stand for.
    is_parameter = lambda x: isinstance(x, eb.AbstractParameter)
    return jax.tree.map(
        lambda x: x.value if is_parameter(x) else x, tree, is_leaf=is_parameter
    )


def _priors(prior) -> dict[str, Any]:
    return dict(prior) if isinstance(prior, dict) else {"": prior}


def _mean(prior) -> Callable:
    mean = values(prior.mean)
    if mean is None:
        return lambda x: 0.0 * x[0]
    return mean if callable(mean) else lambda x: mean + 0.0 * x[0]


def _rows(out, n):
    # What operators return at `n` points, and targets, as arrays of shape (n, q).
    return jnp.concatenate([leaf.reshape(n, -1) for leaf in jax.tree.leaves(out)], 1)


def _target(target, like, points):
    if callable(target):
        return _rows(jax.vmap(target)(points), len(points))
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(target)]
    if len(leaves) == 1 and leaves[0].ndim == 0:
        return jnp.full(like.shape, leaves[0])
    return _rows(leaves, len(like))


class Oracle(eqx.Module):
    """The inner problem. `axes` says, for each unknown, which derivatives are in its
    jets: a superset of what the operators use, the same at all points. Predictions are
    made at the points `elsewhere`.
    """

    prior: Any
    conditions: list
    jets: tuple = eqx.field(static=True)
    elsewhere: Any
    jitter: Any

    def __init__(self, prior, conditions, axes, elsewhere=None, jitter=0.0):
        self.prior, self.conditions = prior, list(conditions)
        self.jets = tuple(axes.items())
        self.elsewhere = self.points[:1] if elsewhere is None else elsewhere
        self.jitter = jitter

    @property
    def points(self):
        return jnp.concatenate([c.points for c in self.conditions])

    def operate(self, operator, numbers, x):
        # `numbers`: for each unknown, the entries of its jet at the point `x`.
        operator, axes = values(operator), dict(self.jets)
        u = {k: KnownJet(axes[k], v, len(x)) for k, v in numbers.items()}
        return operator(u[""] if "" in u else u, x)

    def split(self, y, n):
        out, start = {}, 0
        for name, axes in self.jets:
            stop = start + n * len(axes)
            out[name] = y[start:stop].reshape(n, len(axes))
            start = stop
        return out

    def jets_of(self, functions, points):
        parts = [jets_at(functions[k], axes, points) for k, axes in self.jets]
        return jnp.concatenate([p.reshape(-1) for p in parts])

    def residuals(self, y):
        # A list: for each condition, operator minus target, of shape (n, q).
        table, start, out = self.split(y, len(self.points)), 0, []
        for c in self.conditions:
            stop = start + len(c.points)
            numbers = {k: v[start:stop] for k, v in table.items()}
            at = lambda v, x, c=c: self.operate(c.operator, v, x)
            found = _rows(jax.vmap(at)(numbers, c.points), len(c.points))
            if c.quadrature is not None:
                parts = found.reshape(*c.quadrature.shape, -1)
                found = jnp.einsum("iq,iqs->is", c.quadrature, parts)
            out.append(found - _target(c.target, found, c.points))
            start = stop
        return out

    def misfit(self, y):
        return jnp.concatenate([r.reshape(-1) for r in self.residuals(y)])

    def gamma(self, gram, mean):
        out = []
        for i, c in enumerate(self.conditions):
            # The mean prior variance, linearised at the reference.
            at = mean
            if c.reference is not None:
                single = callable(c.reference)
                named = {"": c.reference} if single else c.reference
                at = self.jets_of(named, self.points)
            jacobian = jax.jacfwd(lambda y, i=i: self.residuals(y)[i].reshape(-1))(at)
            scale = jnp.mean(jnp.diagonal(jacobian @ gram @ jacobian.T))
            noise, nugget, weight = values((c.noise, c.nugget, c.weight))
            if noise is not None:
                variance = noise**2
            else:
                variance = scale * (0.0 if nugget is None else nugget)
            variance = variance + self.jitter * scale
            variance = variance / (1.0 if weight is None else weight)
            out.append(jnp.full(len(jacobian), variance))
        return jnp.concatenate(out)

    def stated(self) -> "Stated":
        priors, n = _priors(self.prior), self.points.size // self.points.shape[1]
        means = {k: _mean(prior) for k, prior in priors.items()}
        # One Gram matrix for all: nested derivatives take long to compile.
        x, near, far = jnp.concatenate([self.points, self.elsewhere]), [], []
        for k, axes in self.jets:
            rows = gram_of_jets(priors[k].kernel, axes, x, axes, self.points)
            near.append(rows[: n * len(axes)])
            far.append(rows[n * len(axes) :])
        mean = self.jets_of(means, self.points)
        gram = jax.scipy.linalg.block_diag(*near)
        return Stated(
            mean,
            gram,
            self.gamma(gram, mean),
            self.jets_of(means, self.elsewhere),
            jax.scipy.linalg.block_diag(*far),
        )

    #
    # Its solution
    #

    def optimality(self, stated: "Stated", y, w):
        misfit, pull = jax.vjp(self.misfit, y)
        first = y - stated.mean - stated.gram @ pull(w)[0]
        return first, misfit + stated.gamma * w

    def newton(self, stated: "Stated", y, w, num_steps: int = 6):
        size = y.size

        def fn(both):
            return jnp.concatenate(self.optimality(stated, both[:size], both[size:]))

        def step(_, both):
            return both - jnp.linalg.solve(jax.jacfwd(fn)(both), fn(both))

        both = jnp.concatenate([y, w])
        both = jax.lax.fori_loop(0, num_steps, step, both)
        return both[:size], both[size:]

    def linearised(self, stated: "Stated", y):
        # The minimiser of the problem linearised at `y`: its jets and weights.
        jacobian = jax.jacfwd(self.misfit)(y)
        matrix = jacobian @ stated.gram @ jacobian.T + jnp.diag(stated.gamma)
        rhs = jacobian @ (y - stated.mean) - self.misfit(y)
        w = jnp.linalg.solve(matrix, rhs)
        return stated.mean + stated.gram @ (jacobian.T @ w), w

    def objective(self, stated: "Stated", y, w):
        # At a function that is `m + k J(y)^T w`.
        misfit = self.misfit(y)
        square = self.rkhs_norm(stated, y, w) ** 2
        return 0.5 * (square + jnp.sum(misfit**2 / stated.gamma))

    def rkhs_norm(self, stated: "Stated", y, w):
        (a,) = jax.vjp(self.misfit, y)[1](w)
        return jnp.sqrt(a @ stated.gram @ a)

    def predict(self, stated: "Stated", y, w, operator):
        # An operator of the function `m + k J(y)^T w`.
        (a,) = jax.vjp(self.misfit, y)[1](w)
        x = self.elsewhere
        numbers = self.split(stated.mean_elsewhere + stated.gram_elsewhere @ a, len(x))
        return jax.vmap(lambda v, x: self.operate(operator, v, x))(numbers, x)


class Stated(NamedTuple):
    mean: Any  # of all jets
    gram: Any  # of all jets
    gamma: Any
    mean_elsewhere: Any
    gram_elsewhere: Any


@eqx.filter_jit
def _state(oracle: Oracle):
    stated = oracle.stated()
    eigenvalues, vectors = jnp.linalg.eigh(stated.gram)
    return stated, vectors * jnp.sqrt(jnp.clip(eigenvalues, 0.0))[None, :]


@eqx.filter_jit
def _whitened_residual(oracle: Oracle, stated, root, v):
    def fn(v):
        misfit = oracle.misfit(stated.mean + root @ v)
        return jnp.concatenate([v, misfit / jnp.sqrt(stated.gamma)])

    return fn(v), jax.jacfwd(fn)(v)


_newton = eqx.filter_jit(Oracle.newton)


class Solved(NamedTuple):
    oracle: Oracle
    stated: Stated
    y: Any  # all jets
    w: Any


def solve_oracle(oracle: Oracle) -> Solved:
    """The minimiser, by SciPy's trust-region method in whitened coefficients, polished
    by Newton's method.
    """
    stated, root = _state(oracle)
    both = lambda v: _whitened_residual(oracle, stated, root, jnp.asarray(v))
    found = scipy.optimize.least_squares(
        lambda v: np.asarray(both(v)[0]),
        np.zeros(stated.mean.size),
        lambda v: np.asarray(both(v)[1]),
        xtol=1e-10,
        ftol=1e-12,
        gtol=1e-10,
    )
    y = stated.mean + root @ jnp.asarray(found.x)
    w = -oracle.misfit(y) / stated.gamma
    y, w = _newton(oracle, stated, y, w)
    for part in oracle.optimality(stated, y, w):
        assert jnp.max(jnp.abs(part)) < 1e-9 * (1 + jnp.max(jnp.abs(y)))
    return Solved(oracle, stated, y, w)


#
# Comparisons
#


tight = eb.GaussNewton(rtol=1e-13, atol=1e-13)
implicit, frozen = eb.FixedPointAdjoint(), eb.FrozenAdjoint()


def central_difference(fn: Callable[[float], Any], h: float):
    """The derivative at zero, to fourth order."""
    near, far = fn(h) - fn(-h), fn(2 * h) - fn(-2 * h)
    return (8 * near - far) / (12 * h)


def relative_error(value, truth) -> float:
    value, truth = np.asarray(value), np.asarray(truth)
    return float(np.max(np.abs(value - truth)) / np.max(np.abs(truth)))


def close(value, truth, rtol: float) -> None:
    """Asserts that no entry is off by more than that much of the largest one."""
    assert relative_error(value, truth) <= rtol


def moved(tree, direction, step: float):
    # Along a direction in which entries that do not move are `None`.
    return eqx.apply_updates(tree, jax.tree.map(lambda d: step * d, direction))


def random_direction(tree, key):
    # Relative to the size of each array.
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(key, len(leaves))
    size = lambda a: jnp.where(jnp.max(jnp.abs(a)) > 0, jnp.max(jnp.abs(a)), 1.0)
    leaves = [size(a) * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, leaves)


def dot(a, b):
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


#
# Problems
#


class Example(NamedTuple):
    # `make(theta)` gives the prior and the conditions. The solution is judged by the
    # residuals of its first condition at other points.
    make: Callable
    theta: dict[str, Any]
    axes: dict[str, tuple]
    validation: Any
    targets: Any

    def oracle(self, theta=None) -> Oracle:
        problem = self.make(self.theta if theta is None else theta)
        return Oracle(*problem, self.axes, self.validation)

    def judge(self, oracle: Oracle, stated: Stated, y, w):
        found = oracle.predict(stated, y, w, oracle.conditions[0].operator)
        # And by what is left of the conditions without noise.
        sizes = [r.size for r in oracle.residuals(y)]
        exact = [c.noise is None for c in oracle.conditions]
        left = (stated.gamma * w)[np.repeat(exact, sizes)]
        return 0.5 * jnp.sum((found - self.targets) ** 2) + 0.5e4 * jnp.sum(left**2)


class Cubic(eqx.Module):
    # -Lap u + field u + strength u^3.
    strength: Any
    field: Any = eqx.field(default=0.0, converter=jnp.asarray)

    def __call__(self, u, x):
        return -u.laplacian + self.field * u.value + self.strength * u.value**3


class Plane(eqx.Module):
    level: Any
    slope: Any

    def __call__(self, x):
        return self.level + self.slope @ x


def _square(n: int, m: int, seed: int):
    interior, other = jax.random.uniform(jax.random.key(seed), (2, n, 2))
    t = (jnp.arange(m // 4, dtype=float) + 0.5) / (m // 4)
    o, i = jnp.zeros(m // 4), jnp.ones(m // 4)
    sides = [jnp.stack(p, 1) for p in ((t, o), (t, i), (o, t), (i, t))]
    return interior, jnp.concatenate(sides), other


def _wave(x, amplitude):
    return amplitude * jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(2 * jnp.pi * x[:, 1])


def forcing(x, amplitude, strength):
    u = _wave(x, amplitude)
    return 5 * jnp.pi**2 * u + strength * u**3


_elliptic_axes = {"": ((), (0, 0), (1, 1))}


def value(u, x):
    return u.value


def _elliptic(strength, amplitude, noise, nugget, length, n=12, seed=1) -> Example:
    # A mild problem, or a strong one.
    interior, boundary, other = _square(n, 8, seed)
    theta = dict(
        lengthscale=jnp.asarray(length),
        strength=jnp.asarray(strength),
        noise=jnp.asarray(noise),
        targets=forcing(interior, amplitude, strength),
        points=interior,
    )

    def make(theta):
        rest = {"nugget": nugget} if nugget else {"noise": theta["noise"]}
        operator = Cubic(eb.Positive(theta["strength"]))
        pde = eb.Condition(
            operator, theta["points"], theta["targets"], name="pde", **rest
        )
        edge = eb.Condition(value, boundary, name="boundary", **rest)
        return eb.GaussianProcess(eb.Gaussian(theta["lengthscale"])), [pde, edge]

    targets = forcing(other, amplitude, strength)
    return Example(make, theta, _elliptic_axes, other, targets)


def _additive() -> Example:
    # Everything that may be learned, in one strongly nonlinear problem.
    interior, boundary, other = _square(12, 8, 1)
    theta = dict(
        lengthscale=jnp.asarray(0.7),
        lengthscales=jnp.asarray([0.4, 0.45]),
        variance=jnp.asarray(0.7),
        variances=jnp.asarray(0.5),
        mean=Plane(jnp.asarray(0.2), jnp.asarray([0.3, -0.1])),
        noise=jnp.asarray(2.0),
        nugget=jnp.asarray(0.05),
        weight=jnp.asarray(1.3),
        module=jnp.asarray(1.5),
        positive=jnp.asarray(4.0),
        closure=jnp.asarray(0.4),
        targets=forcing(interior, 2.0, 4.0),
        points=interior,
    )

    def make(theta):
        first = theta["variance"] * eb.Gaussian(theta["lengthscales"])
        second = theta["variances"] * eb.Gaussian(theta["lengthscale"])
        prior = eb.GaussianProcess(first + second, theta["mean"])
        gain = theta["closure"]
        pde = eb.Condition(
            Cubic(eb.Positive(theta["positive"]), theta["module"]),
            theta["points"],
            theta["targets"],
            noise=theta["noise"],
            weight=theta["weight"],
        )
        edge = eb.Condition(
            lambda u, x: u.value + gain * u.value**2,
            boundary,
            nugget=theta["nugget"],
            weight=theta["weight"],
        )
        return prior, [pde, edge]

    targets = forcing(other, 2.0, 4.0)
    return Example(make, theta, _elliptic_axes, other, targets)


class Burgers(eqx.Module):
    # Steady, in one dimension.
    viscosity: Any

    def __call__(self, u, x):
        return u.value * u.d(0) - self.viscosity * u.d(0, 0)


def _burgers() -> Example:
    # A Gibbs kernel with a network.
    points = jnp.linspace(0.0, 1.0, 7)[:, None]
    other = jnp.linspace(0.03, 0.97, 9)[:, None]
    source = lambda x: 20 * jnp.sin(7 * x[:, 0])
    network = eb.LengthscaleNetwork(1, 1, 3, 1, 0.5, key=jax.random.key(2))
    theta = dict(network=network, viscosity=jnp.asarray(0.2), noise=jnp.asarray(2.0))

    def make(theta):
        kernel = eb.Scaled(eb.Gibbs(theta["network"]), 4.0)
        operator = Burgers(theta["viscosity"])
        ode = eb.Condition(operator, points, source(points), noise=theta["noise"])
        ends = jnp.asarray([[0.0], [1.0]])
        data = eb.Condition(value, ends, lambda x: 1 - x[0], noise=0.1)
        return eb.GaussianProcess(kernel), [ode, data]

    axes = {"": ((), (0,), (0, 0))}
    return Example(make, theta, axes, other, source(other))


class Pendulum(eqx.Module):
    stiffness: Any

    def __call__(self, u, x):
        return u.d(0, 0) + self.stiffness * jnp.sin(u.value)


def _pendulum() -> Example:
    # A warped kernel, in one dimension.
    points = jnp.linspace(0.0, 1.0, 10)[:, None]
    mlp = eqx.nn.MLP(1, 2, 3, 1, activation=jnp.tanh, key=jax.random.key(4))
    theta = dict(
        warp=mlp,
        lengthscale=jnp.asarray(0.5),
        stiffness=jnp.asarray(30.0),
        targets=3 * jnp.cos(5 * points[:, 0]),
        observed=jnp.asarray([0.3, 2.5]),
        mean=jnp.asarray(0.5),
    )

    def make(theta):
        kernel = eb.Warped(eb.Matern(theta["lengthscale"], nu=3.5), theta["warp"])
        ode = eb.Condition(
            Pendulum(theta["stiffness"]), points, theta["targets"], noise=3.0
        )
        ends = jnp.asarray([[0.0], [1.0]])
        data = eb.Condition(value, ends, theta["observed"], noise=0.05)
        return eb.GaussianProcess(4.0 * kernel, theta["mean"]), [ode, data]

    other = jnp.linspace(0.05, 0.95, 7)[:, None]
    return Example(make, theta, {"": ((), (0, 0))}, other, 3 * jnp.cos(5 * other[:, 0]))


class Riccati(eqx.Module):
    strength: Any

    def __call__(self, u, x):
        return u.d(0) + self.strength * u.value**2


def _averages() -> Example:
    # Measured averages of a nonlinear function of the unknown and its derivative.
    starts, offsets = jnp.linspace(0.0, 0.6, 3), jnp.linspace(0.0, 0.4, 4)
    windows = (starts[:, None] + offsets[None, :])[:, :, None]
    theta = dict(
        lengthscale=jnp.asarray(0.5),
        strength=jnp.asarray(8.0),
        quadrature=jnp.asarray([0.1, 0.4, 0.3, 0.2]),
        averages=jnp.asarray([1.5, 2.5, 1.0]),
        windows=windows,
        noise=jnp.asarray(0.3),
    )

    def make(theta):
        points = jnp.linspace(0.0, 1.0, 5)[:, None]
        ode = eb.Condition(Riccati(theta["strength"]), points, 1.0, noise=1.0)
        data = eb.Condition(
            lambda u, x: jnp.exp(u.value) + 0.3 * u.d(0) * x[0],
            theta["windows"],
            theta["averages"],
            quadrature=theta["quadrature"],
            noise=theta["noise"],
        )
        start = eb.Condition(
            lambda u, x: u.value**2 + u.value,
            theta["windows"][:1],
            0.3,
            quadrature=theta["quadrature"],
            nugget=0.02,
        )
        kernel = 2.0 * eb.Gaussian(theta["lengthscale"])
        return eb.GaussianProcess(kernel, 0.2), [ode, data, start]

    other = jnp.linspace(0.05, 0.95, 6)[:, None]
    return Example(make, theta, {"": ((), (0,))}, other, jnp.ones(6))


class Arctan(eqx.Module):
    # Newton's method diverges from where this is flat.
    def __call__(self, u, x):
        return jnp.arctan(5 * u.value)


class Coupled(eqx.Module):
    # Two unknowns, two equations at each point, as a pytree.
    rate: Any = eqx.field(default=2.0, converter=jnp.asarray)

    def __call__(self, u, x):
        p, q = u["p"], u["q"]
        first = p.d(0) + self.rate * p.value * q.value
        second = jnp.stack([q.d(0, 0) + p.value**2, q.value - 2 * p.d(0) * x[0]])
        return {"first": first, "second": second}


def _coupled() -> Example:
    points = jnp.linspace(0.0, 1.0, 6)[:, None]
    theta = dict(lengthscale=jnp.asarray(0.4))

    def make(theta):
        prior = dict(
            p=eb.GaussianProcess(eb.Gaussian(theta["lengthscale"])),
            q=eb.GaussianProcess(
                2.0 * eb.Matern(0.6, nu=3.5), lambda x: 0.2 * jnp.cos(x[0])
            ),
        )
        targets = {"first": jnp.sin(4 * points[:, 0]), "second": jnp.ones((6, 2))}
        equations = eb.Condition(Coupled(), points, targets, noise=0.3)
        ends = jnp.asarray([[0.0], [1.0]])
        data = eb.Condition(
            lambda u, x: u["p"].value - u["q"].value, ends, 1.0, nugget=1e-2
        )
        return prior, [equations, data]

    axes = {"p": ((), (0,)), "q": ((), (0, 0))}
    return Example(make, theta, axes, jnp.linspace(0.1, 0.9, 5)[:, None], None)


class Eikonal(eqx.Module):
    def __call__(self, u, x):
        return jnp.sum(u.grad**2)


def _eikonal() -> Example:
    # Its linearisation vanishes at the prior mean.
    points, other = jax.random.uniform(jax.random.key(7), (2, 8, 2))

    def make(theta):
        reference = lambda x: x[0] - 0.5 * x[1] ** 2
        pde = eb.Condition(Eikonal(), points, 1.0, nugget=1e-3, reference=reference)
        corner = eb.Condition(value, jnp.zeros((1, 2)), 0.0, noise=0.01)
        return eb.GaussianProcess(eb.Gaussian(0.7), Plane(1.0, slope)), [pde, corner]

    slope = jnp.asarray([0.5, 0.2])
    return Example(make, {}, {"": ((), (0,), (1,))}, other, None)


mild = _elliptic(1.0, 1.0, 1.0, 1e-6, 0.4)
strong = _elliptic(4.0, 2.0, 3.0, None, 0.4)
additive = _additive()
burgers = _burgers()
pendulum = _pendulum()
averages = _averages()
coupled = _coupled()
eikonal = _eikonal()

examples = dict(
    mild=mild,
    strong=strong,
    additive=additive,
    burgers=burgers,
    pendulum=pendulum,
    averages=averages,
    coupled=coupled,
    eikonal=eikonal,
)


@ft.cache
def truth_of(name: str) -> Solved:
    return solve_oracle(examples[name].oracle())
