"""Linear systems by conjugate gradients, with sparse factors in place of a matrix."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._condition import Condition
from .._conjugate_gradients import ConjugateGradients
from .._determinant import Whitening
from .._gram import Block
from .._linearised import (
    join,
    linearise,
    Linearised,
    noise_variances,
    prior_z,
    split,
)
from .._problem import Problem
from .._system import AbstractPosterior, AbstractSystem, rounding_of_sums
from ._factor import (
    covariance_product,
    CovarianceFactor,
    factorise,
    PrecisionFactor,
    Prior,
)
from ._layout import Vectors
from ._local import of_unknown, predict, Prediction
from ._plan import Plan, plan


class SparseCholesky(AbstractSystem):
    """For many points: neither the Gram matrix nor its factor is ever computed. Instead
    the prior covariance of all values and derivatives that conditions use has a sparse
    inverse Cholesky factor, computed once for all Gauss-Newton steps; and each step is
    solved by conjugate gradients, preconditioned with a second such factor. Time and
    memory grow about in proportion to the number of points. See [many
    points](../scale.md).

    It is for kernels of finite smoothness, [`eqx_bilevel.Matern`][] above all, alone or
    within others, and for points in few dimensions. For these a value is determined by
    the values around it: each depends on others at most `rho` times their spacing away.
    The error of this decreases exponentially with `rho`.

    What it does not offer: conditions with `quadrature`; the evidence of some of the
    conditions, cross-validation, standardised errors and the condition number;
    [`eqx_bilevel.solve_windows`][]; points that are traced, since orderings and
    neighbours are found before anything is compiled.

    ??? cite "References"

        The factor: F. Schäfer, M. Katzfuss and H. Owhadi, *Sparse Cholesky
        factorization by Kullback-Leibler minimization*, SIAM J. Sci. Comput. 43 (2021).
        With derivatives, and its use in Gauss-Newton: Y. Chen, H. Owhadi and
        F. Schäfer, *Sparse Cholesky factorization for solving nonlinear PDEs via
        Gaussian processes*, [arXiv:2304.01294](https://arxiv.org/abs/2304.01294).
    """

    rho: tuple[float, float] = eqx.field(static=True, default=(6.0, 4.0))
    rho_conditions: float = eqx.field(static=True, default=6.0)
    rtol: float = eqx.field(static=True, default=1e-9)
    max_steps: int = eqx.field(static=True, default=200)
    _plan: Plan | None = eqx.field(default=None, repr=False)

    def __check_init__(self):
        if not min(*self.rho, self.rho_conditions) > 1:
            raise ValueError(
                "`rho` and `rho_conditions` must be greater than 1, got "
                f"{self.rho} and {self.rho_conditions}."
            )

    def prepared(self, prior: Any, conditions: Sequence[Condition]) -> "SparseCholesky":
        found = plan(prior, conditions, self.rho, self.rho_conditions)
        return dataclasses.replace(self, _plan=found)

    @property
    def plan(self) -> Plan:
        assert self._plan is not None
        return self._plan

    @property
    def cheap_to_compile(self):
        return True  # Very many operations on parts of matrices.

    def smallest_nugget(self, problem):
        return 0.125 * rounding_of_sums(problem)

    def no_factor(self, problem):
        dtype, plan = problem.dtype, self.plan
        prior = {n: CovarianceFactor.none(p, dtype) for n, p in plan.patterns.items()}
        small = PrecisionFactor.none(plan.conditions.pattern, dtype)
        jacobians = eqx.filter_eval_shape(
            linearise, problem, prior_z(problem)
        ).jacobians
        jacobians = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jacobians)
        return _Factor(prior, small, jacobians, jnp.array(-1.0, dtype))

    def regress(self, problem, linearised, jitter, last):
        before, start = last
        nugget = jnp.maximum(jitter, _LEAST_NUGGET)
        priors = self._priors(problem, linearised, nugget)
        old = before.nugget != nugget
        prior = {
            n: factorise(p, self.plan.patterns[n], before.prior[n], old)
            for n, p in priors.items()
        }
        # This is no more than a preconditioner: it need not follow every step.
        jacobians = linearised.jacobians
        far = old | (_distance(before.jacobians, jacobians) > _NEAR)
        gamma = noise_variances(problem, jitter)
        of_conditions = self.plan.conditions.prior(problem, linearised, gamma)
        pattern = self.plan.conditions.pattern
        small = factorise(of_conditions, pattern, before.conditions, far)
        which = lambda new, last: jnp.where(far, new, last)
        seen = jax.tree.map(which, jacobians, before.jacobians)
        factor = _Factor(prior, small, seen, nugget)
        changes = lambda w: self._changes(problem, linearised, factor, w)
        iteration = self._iteration(problem, linearised, jitter, factor)
        product = lambda w: changes(w)[0]
        return iteration.regress(problem, linearised, factor, changes, product, start)

    def solve(self, problem, linearised, jitter, factor, vector):
        layout = self.plan.layout
        jacobians = linearised.jacobians
        priors = self._priors(problem, linearised, factor.nugget)  # For all products.

        def product(weights):
            vectors = layout.apply_transposed(problem, jacobians, weights)
            fields = self._products(priors, factor, vectors)
            return layout.apply(problem, jacobians, fields)

        iteration = self._iteration(problem, linearised, jitter, factor)
        start = jax.lax.stop_gradient(self._precondition(factor, vector))
        return iteration.solve(product, vector, start)[0]

    def whitening(self, factor):
        conditions, small = self.plan.conditions, factor.conditions
        return Whitening(
            lambda v: small.multiply(v)[conditions.inverse],
            lambda v: small.multiply_transposed(v[conditions.order]),
            small.log_determinant(),
        )

    def changes(self, problem, linearised, factor, weights):
        conditions = problem.conditions
        jacobians = _of_conditions(problem, linearised)
        layout = self.plan.layout
        priors, fields = self._fields(conditions, jacobians, factor, weights)
        applied = layout.apply(conditions, jacobians, fields)
        z = layout.read_z(conditions, fields)
        read = z[:0]
        if problem.readings.z_size > 0:
            read = _read(self._predictions(problem, priors), fields)
        return applied, join(problem, z, read)

    def posterior(self, problem, linearised, jitter, factor):
        return _SparsePosterior(self, problem, linearised, jitter, factor)

    def read(self, problem, linearised, factor, weights, bent):
        conditions, layout = problem.conditions, self.plan.layout
        jacobians = linearised.jacobians
        vectors = layout.apply_transposed(conditions, jacobians, weights)
        if bent is not None:
            more = layout.read_z_transposed(conditions, split(conditions, bent))
            vectors = {name: v + more[name] for name, v in vectors.items()}
        priors = self._priors(conditions, linearised, factor.nugget)
        fields = factor.products(vectors)
        return _read(self._predictions(problem, priors), fields)

    def read_transposed(self, problem, linearised, factor, read):
        conditions, layout = problem.conditions, self.plan.layout
        priors = self._priors(conditions, linearised, factor.nugget)
        predictions = self._predictions(problem, priors)
        vectors = {n: jnp.zeros(m, read.dtype) for n, m in layout.sizes}
        for each, given in zip(predictions, split(problem.readings, read)):
            for name, p in each.items():
                add = p.apply_transposed(given, len(vectors[name]))
                vectors[name] = vectors[name] + add
        fields = factor.products(vectors)
        applied = layout.apply(conditions, linearised.jacobians, fields)
        return layout.read_z(conditions, fields), applied

    def jets(self, problem, linearised, factor, weights, jets, points):
        priors, fields = self._fields(problem, linearised.jacobians, factor, weights)
        block = Block(points, None, jets)
        return _applied(self._prediction(block, priors), fields)

    def covariances(self, problem, linearised, factor, blocks, joint):
        priors = self._priors(problem, linearised, factor.nugget)
        layout = self.plan.layout
        rows, readings, own = [], [], []
        for block in blocks:
            prediction = self._prediction(block, priors)

            def one(i, prediction=prediction):
                vectors = {n: jnp.zeros(m, problem.dtype) for n, m in layout.sizes}
                for name, p in prediction.items():
                    new = jnp.zeros_like(vectors[name]).at[p.index[i]]
                    vectors[name] = new.add(p.weights[i, :, 0])
                fields = self._products(priors, factor, vectors)
                row = layout.apply(problem, linearised.jacobians, fields)
                return row, vectors, fields

            index = jnp.arange(len(block.points))
            found = jax.lax.map(one, index, batch_size=_AT_ONCE)
            rows.append(found[0])
            readings.append(found[1:])
            left = [p.covariance[:, 0, 0] for p in prediction.values()]
            own.append(sum(left[1:], left[0]))
        rows, own = jnp.concatenate(rows), jnp.concatenate(own)
        stack = lambda *x: jnp.concatenate(x)
        vectors, fields = jax.tree.map(stack, *readings)
        pairs = [(vectors[n], fields[n]) for n in vectors]
        if joint:
            shared = [v @ f.T for v, f in pairs]
            return sum(shared[1:], shared[0]) + jnp.diag(own), rows
        shared = [jnp.sum(v * f, axis=1) for v, f in pairs]
        return sum(shared[1:], shared[0]) + own, rows

    def gram(self, problem, linearised, jitter):
        raise ValueError(
            "This needs the Gram matrix as a whole, which `SparseCholesky` does not "
            "have: evidence of some conditions, cross-validation, standardised errors "
            "and the condition number are available with `lineax.Cholesky()`; or, with "
            "memory for a dense matrix, with `MatrixFree()`."
        )

    #
    # Private
    #

    def _priors(self, problem, linearised: Linearised, nugget) -> dict[str, Prior]:
        return self.plan.priors(problem, linearised.jacobians, nugget)

    def _precondition(self, factor: "_Factor", vector):
        order, inverse = self.plan.conditions.order, self.plan.conditions.inverse
        return factor.conditions.precision(vector[order])[inverse]

    def _changes(self, problem, linearised: Linearised, factor: "_Factor", weights):
        # As `changes`, without derivatives.
        layout, jacobians = self.plan.layout, linearised.jacobians
        vectors = layout.apply_transposed(problem, jacobians, weights)
        fields = factor.products(vectors)
        applied = layout.apply(problem, jacobians, fields)
        return applied, layout.read_z(problem, fields)

    def _fields(self, problem, jacobians, factor: "_Factor", weights):
        # All functionals of k phi^T w, and their priors.
        priors = self.plan.priors(problem, jacobians, factor.nugget)
        vectors = self.plan.layout.apply_transposed(problem, jacobians, weights)
        return priors, self._products(priors, factor, vectors)

    def _products(self, priors, factor: "_Factor", vectors: Vectors):
        # As those of the factor, but differentiable.
        at = lambda n: (priors[n], self.plan.patterns[n], factor.prior[n])
        return {n: covariance_product(*at(n), v) for n, v in vectors.items()}

    def _predictions(self, problem, priors) -> list[dict[str, Prediction]]:
        return [self._prediction(r.jets, priors) for r in problem.readings.rows]

    def _prediction(self, block: Block, priors) -> dict[str, Prediction]:
        names = dict.fromkeys(name for name, _ in block.jets)
        return {n: predict(priors[n], self.rho, of_unknown(block, n)) for n in names}

    def _iteration(self, problem, linearised, jitter, factor) -> ConjugateGradients:
        precondition = lambda vector: self._precondition(factor, vector)
        at = problem, linearised, jitter, precondition
        return ConjugateGradients.of(*at, self.rtol, self.max_steps)


SparseCholesky.__init__.__doc__ = """**Arguments:**

- `rho`: How many spacings away functionals are that others depend on: values, and all
    others (derivatives), which need less. Larger is more accurate and slower.
- `rho_conditions`: Likewise for the preconditioner. It has no influence on the result.
- `rtol`: Relative tolerance of conjugate gradients.
- `max_steps`: The largest number of their steps.

**Raises:**

A `ValueError` if a radius is not greater than one.
"""


# Of the diagonal: below it the many small factorisations fail from rounding.
_LEAST_NUGGET = 1e-13
# Linearisations that can share a preconditioner differ by less.
_NEAR = 0.03
# Right-hand sides that are treated at once.
_AT_ONCE = 32


class _Factor(eqx.Module):
    prior: dict[str, CovarianceFactor]  # of all functionals, by unknown
    conditions: PrecisionFactor
    jacobians: tuple[Array, ...]  # of the linearisation which that is for
    nugget: Float[Array, ""]  # of the first

    def products(self, vectors: Vectors) -> dict[str, Array]:
        return {name: self.prior[name].covariance(v) for name, v in vectors.items()}


class _SparsePosterior(AbstractPosterior):
    system: SparseCholesky
    problem: Problem
    linearised: Linearised
    jitter: Float[Array, ""]
    factor: PyTree[Array]

    @property
    def _at(self):
        return self.problem, self.linearised, self.factor

    def from_weights(self, weights):
        return self.system._changes(*self._at, weights)[1]

    def to_conditions(self, dz):
        return self._of_z(dz)[0]

    def covariance(self, dz):
        given, z = self._of_z(dz)
        problem, linearised, factor = self._at
        at = problem, linearised, self.jitter, factor
        return z - self.from_weights(self.system.solve(*at, given))

    def _of_z(self, dz):
        layout, problem = self.system.plan.layout, self.problem
        vectors = layout.read_z_transposed(problem, split(problem, dz))
        fields = self.factor.products(vectors)
        applied = layout.apply(problem, self.linearised.jacobians, fields)
        return applied, layout.read_z(problem, fields)


def _distance(one: Sequence[Array], other: Sequence[Array]) -> Float[Array, ""]:
    # Relatively, of the coefficients of each entry of the jets.
    out = []
    for a, b in zip(one, other):
        size = jnp.max(jnp.abs(b), axis=0, initial=0)
        change = jnp.max(jnp.abs(a - b), axis=0, initial=0)
        out.append(jnp.max(change / jnp.where(size > 0, size, 1), initial=0))
    return jnp.max(jnp.stack(out))


def _of_conditions(problem: Problem, linearised: Linearised) -> tuple[Array, ...]:
    each = zip(problem.rows, linearised.jacobians)
    return tuple(jacobian for r, jacobian in each if not r.only_read)


def _applied(prediction: Mapping[str, Prediction], fields: Vectors):
    parts = [p.apply(fields[name]) for name, p in prediction.items()]
    return sum(parts[1:], parts[0])


def _read(predictions: Sequence[Mapping[str, Prediction]], fields: Vectors) -> Array:
    return jnp.concatenate([_applied(p, fields).reshape(-1) for p in predictions])
