"""What a solve returns."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ._adjoint import without_gradient
from ._closure import function_as_pytree
from ._determinant import log_determinant
from ._geometry import as_key
from ._gram import Block, dense, GramOperator
from ._jets import (
    evaluate,
    Index,
    linearise as linearise_operator,
    residual,
    Trace,
    trace,
)
from ._jit import jit
from ._left_out import Errors, folds_of, left_out, predicted, rows_of
from ._linearised import block_product, curvatures, Linearised, noise
from ._parameters import unwrap
from ._pretty import named_doc
from ._problem import find_condition, jets_of, mean_functions, names_of, Problem
from ._results import RESULTS
from ._spectrum import extreme_eigenvalues, power_iteration
from ._system import AbstractSystem, DenseSystem


class Reading(eqx.Module):
    # Jets that are known at some points.
    points: Float[Array, "n d"]
    jets: tuple[tuple[str, Index], ...] = eqx.field(static=True)
    values: Float[Array, "n p"]


class Solution(eqx.Module):
    """The most probable functions, given a prior and conditions.

    It can be called like the function that it is, with one point of shape `(d,)` or
    with many of shape `(n, d)`. If there are several unknowns then it returns a
    dictionary.

    **Attributes:**

    - `prior`: The prior, with its hyperparameters.
    - `conditions`: The conditions, likewise.
    - `weights`: The representer weights $w$, of shape `(M,)`: the solution is
        $m + k \\phi^\\top w$, with one functional in $\\phi$ for each scalar condition.
    - `result`: An [`eqx_bilevel.RESULTS`][], that says whether the solve succeeded.
    - `stats`: A dictionary: `num_steps` and `max_steps` (linearised solves); `change`
        (of `z` in one more full step, relatively); `rounding` (the change in `z` when
        the last linear solve is repeated); `jitter` (the relative nugget that was
        added, also the automatic one); `num_products` (of iterative linear solves);
        `objective` (of the inner problem); `rkhs_norm`
        ($\\lVert u - m \\rVert_k$); and `residual_norm` (root mean square of all
        conditions' residuals).
    """

    prior: Any  # See `Learned`.
    conditions: list[Any]
    weights: Float[Array, " M"]
    result: RESULTS
    stats: dict[str, PyTree]
    _problem: Problem
    _linearised: Linearised
    _z: Float[Array, " N"]
    _next_z: Float[Array, " N"]
    _factor: PyTree
    _system: AbstractSystem
    _readings: tuple[Reading, ...] = ()

    def __call__(self, x: Float[ArrayLike, "*n d"]) -> PyTree[Float[Array, "*n"]]:
        """Evaluates the solution at one or many points."""
        return self.d()(x)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        shown = ("prior", "conditions", "weights", "result", "stats")
        fields = wl.named_objs([(k, getattr(self, k)) for k in shown], **kwargs)
        return named_doc("Solution", fields, **kwargs)

    def d(self, *axes: int) -> Callable:
        """A partial derivative of the solution, as a function of one or many points:
        `solution.d(0)(x)`, `solution.d(1, 1)(x)`.
        """
        return lambda x: self.apply(lambda u, x: _each(u, lambda jet: jet.d(*axes)), x)

    def apply(self, operator: Callable, x: Float[ArrayLike, "*n d"]) -> PyTree[Array]:
        """Applies an operator to the solution.

        **Arguments:**

        - `operator`: A callable `(u, x)`, as in an [`eqx_bilevel.Condition`][].
        - `x`: One point of shape `(d,)` or many of shape `(n, d)`.

        **Returns:**

        What the operator returns, at each point.
        """
        # Not if it is the same points, but if it is the same array.
        known = [reading for reading in self._readings if reading.points is x]
        x, single = _points(x, self._problem)
        out = _apply(self, function_as_pytree(operator), x, known)
        return jax.tree.map(lambda leaf: leaf[0], out) if single else out

    @property
    def linear_solver(self) -> lx.AbstractLinearSolver | AbstractSystem:
        """What solved the linear systems: that of the [`eqx_bilevel.GaussNewton`][], or
        what was chosen if that was none.
        """
        system = self._system
        return system.linear_solver if isinstance(system, DenseSystem) else system

    def std(
        self, x: Float[ArrayLike, "*n d"], operator: Callable | None = None
    ) -> PyTree[Float[Array, "*n"]]:
        """Posterior standard deviations at one or many points, of the conditions
        linearised at the solution and for these hyperparameters.

        They are as good as the prior is: if its variance or its lengthscales are far
        from those of the true function then they can be wrong by orders of magnitude,
        and they do not include the uncertainty of the hyperparameters.

        **Arguments:**

        - `x`: One point of shape `(d,)` or many of shape `(n, d)`.
        - `operator`: Of which operator `(u, x) -> scalar`, linearised at the solution.
            Default: the values of the unknowns.
        """
        x, single = _points(x, self._problem)
        operators = self._operators(operator)
        out = {k: _std(self, op, x) for k, op in operators.items()}
        out = {k: v[0] if single else v for k, v in out.items()}
        return self._one_or_all(operator, out)

    def covariance(
        self, x: Float[ArrayLike, "n d"], operator: Callable | None = None
    ) -> Float[Array, "m m"]:
        """The posterior covariance matrix at many points, of the conditions linearised
        at the solution.

        **Arguments:**

        - `x`: Points of shape `(n, d)`.
        - `operator`: As for `std`.

        **Returns:**

        An array of shape `(n, n)`. With several unknowns and no `operator` one of shape
        `(k n, k n)`, for all points of the first unknown, then of the second, and so
        on.
        """
        x, _ = _points(x, self._problem)
        return _covariance(self, self._operators(operator), x)

    def sample(
        self,
        x: Float[ArrayLike, "n d"],
        *,
        key: PRNGKeyArray,
        num_samples: int = 1,
        operator: Callable | None = None,
    ) -> PyTree[Float[Array, "num_samples n"]]:
        """Draws from the posterior of the conditions linearised at the solution,
        jointly at all points.

        **Arguments:**

        - `x`: Points of shape `(n, d)`.
        - `key`: A JAX random key.
        - `num_samples`: How many functions to draw.
        - `operator`: As for `std`.

        **Returns:**

        An array of shape `(num_samples, n)`. With several unknowns and no `operator`, a
        dictionary of such arrays, drawn jointly.
        """
        x, _ = _points(x, self._problem)
        key = as_key(key)
        out = _sample(self, self._operators(operator), x, key, num_samples)
        return self._one_or_all(operator, out)

    def residuals(self) -> dict[str, Float[Array, "n q"]]:
        """Operator minus target of each condition, by its name, at its points. They are
        not zero but noise times weights; at other points use `apply`.
        """
        return _residuals(self)

    def standardised_errors(self, condition: str | None = None) -> Float[Array, "n q"]:
        """By how many standard deviations each point's targets differ from what all
        other points and conditions predict, for the conditions linearised at the
        solution. If prior and noise are right, these are like draws from a standard
        normal distribution: their mean square is about one. Errors that are too large
        mean that the declared noise is too small, or that the model is wrong.

        **Arguments:**

        - `condition`: The name of the condition. Default: the first one.

        **Raises:**

        A `ValueError` if there is no such condition, or with sparse factors
        ([`eqx_bilevel.SparseCholesky`][]).
        """
        return _standardised_errors(self, condition)

    def spectrum(self, num_products: int = 20) -> tuple[Array, Array]:
        """The smallest and largest eigenvalue of $\\partial T / \\partial z$ at the
        solution, by Lanczos' method. They measure how good the linearisation is, see
        [the method](../method.md#two-gradients). Zero for linear conditions.

        **Arguments:**

        - `num_products`: The size of the Krylov space.
        """
        return _spectrum(self, num_products)

    def spectral_radius(self, num_products: int = 20) -> Float[Array, ""]:
        """The largest absolute value in the spectrum: about the most by which frozen
        and implicit gradients differ, relatively.
        """
        smallest, largest = self.spectrum(num_products)
        return jnp.maximum(jnp.abs(smallest), jnp.abs(largest))

    def condition_number(self, num_products: int = 20) -> Float[Array, ""]:
        """An estimate, from below, of the condition number of the Gram matrix, scaled
        to have a unit diagonal. By power iterations.

        **Raises:**

        A `ValueError` with sparse factors ([`eqx_bilevel.SparseCholesky`][]).
        """
        return _condition_number(self, num_products)

    #
    # Private
    #

    def _misfits(self) -> Float[Array, " r"]:
        # Of the conditions that hold exactly, linearised: target minus operator.
        misfits = noise(self._problem, self.stats["jitter"]).mv(self.weights)
        exact = [
            np.full(r.target.size, self.conditions[r.position].noise is None)
            for r in self._problem.rows
        ]
        return misfits[np.concatenate(exact)]

    def _predicted(self, names: Sequence[str]) -> Errors:
        # The targets of these conditions, from all others.
        rows = [rows_of(self._problem, name).reshape(-1) for name in names]
        rhs, rows = self._linearised.rhs, np.concatenate(rows)
        return predicted(self._gram.as_matrix(), rhs, rows)

    def _left_out(
        self, condition: str | None, num_folds: int | None
    ) -> list[tuple[Array, Array]]:
        # Its folds, from all else; `None` is the first condition, and single points.
        found, name = find_condition(self.conditions, condition, "What is left out")
        shape = rows_of(self._problem, name).shape
        folds = folds_of(shape, found.num_targets if num_folds is None else num_folds)
        return left_out(self._predicted([name]), folds)

    @property
    def _unknowns(self):
        return names_of(self.prior)

    @property
    def _usable(self):
        # After a failure all is nan, also what does not depend on the weights.
        return jnp.all(jnp.isfinite(self.weights))

    def _trace(self, operator, x) -> Trace:
        return trace(operator, self._unknowns, x.shape[1], x.dtype, "apply")

    def _jets(self, jets: Sequence[tuple[str, Index]], x) -> Float[Array, "n p"]:
        change = self._system.jets(*self._at, self.weights, tuple(jets), x)
        return jets_of(mean_functions(unwrap(self.prior)), jets, x) + change

    def _reading(self, operator, x) -> Reading:
        # All that this operator needs.
        jets = self._trace(unwrap(operator), x).jets
        return Reading(x, jets, self._jets(jets, x))

    def _number_block(self, operator, x) -> Block:
        operator = unwrap(operator)
        shapes = self._trace(operator, x).shapes
        if shapes != ((),):
            raise ValueError(
                "`operator` must return one number here, but it returned arrays of "
                f"shapes {list(shapes)}."
            )
        return self._block(operator, x)

    def _block(self, operator, x) -> Block:
        # The functionals of an operator, linearised at the solution.
        found = self._trace(operator, x)
        z = self._jets(found.jets, x)[:, jnp.array(found.nonlinear, int)]
        at = lambda z, x: linearise_operator(operator, self._unknowns, found, z, x)[0]
        return Block(x, jax.vmap(at)(z, x), found.jets)

    def _covariance(self, blocks: Sequence[Block]) -> Float[Array, "m m"]:
        before, rows = self._system.covariances(*self._at, tuple(blocks), joint=True)
        posterior = before - rows @ jax.vmap(self._solve)(rows).T
        return 0.5 * (posterior + posterior.T)

    @property
    def _at(self):
        return self._problem, self._linearised, self._factor

    @property
    def _jitter(self) -> Float[Array, ""]:
        return self.stats["jitter"]

    @property
    def _gram(self) -> GramOperator:
        return self._system.gram(self._problem, self._linearised, self._jitter)

    def _solve(self, vector: Float[Array, " M"]) -> Float[Array, " M"]:
        problem, linearised, factor = self._at
        return self._system.solve(problem, linearised, self._jitter, factor, vector)

    @property
    def _has_matrix(self) -> bool:
        return isinstance(self._system, DenseSystem)

    def _density(self, num_probes: int) -> tuple[Array, Array]:
        # Without a matrix: v^T G^-1 v and log det G, differentiable in v and G.
        def product(solution):
            added = noise(solution._problem, solution._jitter)
            changes = lambda w: solution._system.changes(*solution._at, w)[0]
            return lambda w: changes(w) + added.mv(w)

        fixed = without_gradient(self)
        whitening = fixed._system.whitening(fixed._factor)
        shape, dtype = (num_probes, self._problem.size), self._problem.dtype
        probes = jax.random.normal(jax.random.key(0), shape, dtype)
        multiply, weights = product(self), fixed.weights
        squares = 2 * weights @ self._linearised.rhs - weights @ multiply(weights)
        determinant = log_determinant(multiply, product(fixed), whitening, probes)
        return squares, determinant

    def _operators(self, operator: Callable | None) -> dict[str, Callable]:
        names, single = self._unknowns
        if operator is not None:
            return {"": function_as_pytree(operator)}
        elif single:
            return {"": _value}
        else:
            return {name: ft.partial(_value_of, name) for name in names}

    def _one_or_all(self, operator: Callable | None, out: dict[str, Array]) -> PyTree:
        return out[""] if operator is not None or self._unknowns.single else out


def _value(u, x):
    return u.value


def _value_of(name, u, x):
    return u[name].value


def _each(u: Any, fn: Callable) -> PyTree:
    return {name: fn(jet) for name, jet in u.items()} if isinstance(u, dict) else fn(u)


def _points(x, problem: Problem):
    x, points = jnp.asarray(x), problem.rows[0].points
    if points.ndim != 2:
        raise ValueError(
            "These are several solutions in one, as `jax.vmap` makes them. Evaluate "
            "them in the same way: `jax.vmap(lambda solution: solution(x))(solutions)`."
        )
    dim = points.shape[1]
    if x.ndim not in (1, 2) or x.shape[-1] != dim:
        raise ValueError(
            f"`x` must be one point of shape ({dim},) or many of shape (n, {dim}), got "
            f"{x.shape}."
        )
    return jnp.atleast_2d(x).astype(problem.dtype), x.ndim == 1


@jit
def _apply(solution: Solution, operator, x, known: Sequence[Reading] = ()):
    operator = unwrap(operator)
    found = solution._trace(operator, x)
    known = [reading for reading in known if set(found.jets) <= set(reading.jets)]
    if known:
        where = [known[0].jets.index(jet) for jet in found.jets]
        values = known[0].values[:, jnp.array(where)]
    else:
        values = solution._jets(found.jets, x)
    at = lambda v, x: evaluate(operator, solution._unknowns, found.jets, v, x)
    return jax.vmap(at)(values, x)


@jit
def _residuals(solution: Solution):
    out = {}
    for r in solution._problem.rows:
        values = solution._jets(r.trace.jets, r.points)
        at = lambda v, x, r=r: residual(
            r.operator, r.unknowns, r.trace.jets, list(v), x
        )
        out[r.name] = r.sums(jax.vmap(at)(values, r.points)) - r.target
    return out


@jit
def _std(solution: Solution, operator, x):
    blocks = (solution._number_block(operator, x),)
    before, rows = solution._system.covariances(*solution._at, blocks, joint=False)
    solved = jax.vmap(solution._solve)(rows)
    variance = before - jnp.sum(rows * solved, axis=1)
    # Rounding may make what is practically zero negative, and the square root of zero
    # has no derivative.
    positive = variance > 0
    std = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return jnp.where(solution._usable, std, jnp.nan)


@jit
def _covariance(solution: Solution, operators, x):
    return solution._covariance(
        [solution._number_block(op, x) for op in operators.values()]
    )


@jit
def _sample(solution: Solution, operators, x, key, num_samples):
    mean = jnp.concatenate([_apply(solution, op, x) for op in operators.values()])
    posterior = _covariance(solution, operators, x)
    draws = jax.random.multivariate_normal(
        key, mean, posterior, (num_samples,), method="svd"
    )
    return dict(zip(operators, jnp.split(draws, len(operators), axis=1)))


@jit
def _standardised_errors(solution: Solution, condition: str | None):
    ((values, precisions),) = solution._left_out(condition, None)
    root = jnp.linalg.cholesky(precisions)
    return jnp.einsum("nji,nj->ni", root, values)


@jit
def _spectrum(solution: Solution, num_products: int):
    problem, z = solution._problem, solution._z
    if problem.z_size == 0:
        zero = jnp.zeros((), problem.dtype)
        return zero, zero
    _, linearised, factor = solution._at
    posterior = solution._system.posterior(
        problem, linearised, solution._jitter, factor
    ).covariance
    hessian = curvatures(problem, z, solution.weights)
    curvature = lambda dz: block_product(problem, hessian, dz)
    return extreme_eigenvalues(posterior, curvature, z, num_products)


@jit
def _condition_number(solution: Solution, num_products: int):
    matrix = dense(solution._gram)
    scale = jnp.sqrt(jnp.diagonal(matrix.as_matrix()))
    forwards = lambda v: matrix.mv(v / scale) / scale
    backwards = lambda v: solution._solve(v * scale) * scale
    start = jnp.cos(jnp.arange(scale.shape[0], dtype=scale.dtype))
    largest = power_iteration(forwards, start, num_products)
    smallest_inverse = power_iteration(backwards, start, num_products)
    return jnp.where(solution._usable, largest * smallest_inverse, jnp.nan)
