"""Objectives that need no points of their own: what the conditions tell of themselves.

All are about the problem linearised at the solution, in which the conditions' targets
are jointly Gaussian with the Gram matrix $G$ as their covariance.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._condition import Condition
from ._linearised import linearise
from ._objectives import AbstractLeastSquaresObjective, AbstractWholeObjective
from ._problem import find_condition
from ._solution import Solution


_LOG_TWO_PI = math.log(2 * math.pi)


#
# Linear algebra, differentiated without going through a factorisation
#


@jax.custom_jvp
def _inverse(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    factor = jnp.linalg.cholesky(matrix)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.cho_solve((factor, True), eye)


@_inverse.defjvp
def _(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -inverse @ tangents[0] @ inverse


@jax.custom_jvp
def _log_determinant(matrix: Float[Array, "m m"]) -> Float[Array, ""]:
    factor = jnp.linalg.cholesky(matrix)
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


@_log_determinant.defjvp
def _(primals, tangents):
    change = jnp.vdot(_inverse(*primals), tangents[0])
    return _log_determinant(*primals), change


#
# Evidence
#


class NegativeLogEvidence(AbstractWholeObjective):
    r"""The negative logarithm of the probability density of all conditions' targets,
    given the hyperparameters, in Laplace's approximation:

    $$
    \tfrac12 \lVert u^* - m \rVert_k^2
    + \tfrac12 \lVert R(u^*) - t \rVert_{\Gamma^{-1}}^2
    + \tfrac12 \log \det (2 \pi G),
    $$

    with the Gram matrix of the conditions linearised at the solution $u^*$. It is exact
    for linear conditions. Minimising it weighs how well data are explained against how
    many other data would have been explained too, and so can tell noise from signal.

    It needs $M^2$ memory.
    """

    def __call__(self, solution: Solution) -> Float[Array, ""]:
        rhs = linearise(solution._problem, solution._z).rhs
        matrix = solution._gram.as_matrix()
        constant = rhs.size * _LOG_TWO_PI
        return 0.5 * (solution.weights @ rhs + _log_determinant(matrix) + constant)

    def check(self, conditions: Sequence[Condition]) -> None:
        del conditions


NegativeLogEvidence.__init__.__doc__ = """**Arguments:** none."""


#
# Cross-validation
#


def _number_of_folds(num: int | None, condition: Condition, name: str) -> int:
    n = condition.num_targets
    if num is not None and not (isinstance(num, int) and 2 <= num <= n):
        raise ValueError(
            f"`num_folds` must be an integer between 2 and the number of points of "
            f"condition {name!r}, which is {n}, got {num}."
        )
    return n if num is None else num


def _left_out(solution: Solution, condition: str | None, num_folds: int | None):
    # For all folds of a size at once: the errors of predictions from all the rest, and
    # the inverses of their covariances. With the inverse Gram matrix nothing has to be
    # solved again: Rasmussen and Williams (2006), equations 5.10 to 5.12, by blocks.
    found, name = find_condition(solution.conditions, condition)
    num = _number_of_folds(num_folds, found, name)
    start = 0
    for r in solution._problem.rows:
        if r.name == name:
            break
        start += r.target.size
    rows = start + jnp.arange(r.target.size).reshape(r.target.shape)
    inverse, weights = _inverse(solution._gram.as_matrix()), solution.weights
    n, q = rows.shape
    larger = n % num  # So many folds have one point more.
    for few, many, size in ((0, larger, n // num + 1), (larger, num, n // num)):
        if few == many:
            continue
        chosen = jnp.stack([rows[i::num].reshape(-1) for i in range(few, many)])
        assert chosen.shape == (many - few, size * q)
        precisions = inverse[chosen[:, :, None], chosen[:, None, :]]
        errors = jnp.linalg.solve(precisions, weights[chosen][..., None])[..., 0]
        yield errors, precisions


class CrossValidation(AbstractLeastSquaresObjective, AbstractWholeObjective):
    r"""Half the sum of squared errors, in the units of the target, of predicting each
    point of a condition from all other points and conditions; or with folds, of
    predicting each fold from the others.

    It is computed in closed form from the Gram matrix, without solving anything again:
    for linear conditions exactly, and otherwise for those linearised at the solution.
    The `i`-th of $k$ folds has the points $i, i + k, i + 2k, \ldots$ It needs $M^2$
    memory.
    """

    condition: str | None = eqx.field(static=True, default=None)
    num_folds: int | None = eqx.field(static=True, default=None)

    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        parts = _left_out(solution, self.condition, self.num_folds)
        return jnp.concatenate([errors.reshape(-1) for errors, _ in parts])

    def check(self, conditions: Sequence[Condition]) -> None:
        _number_of_folds(
            self.num_folds, *find_condition(conditions, self.condition)
        )


class NegativeLogPredictive(AbstractWholeObjective):
    """The negative logarithm of the probability density of each point's target given
    all other points and conditions; or with folds, of each fold's given the others.
    In contrast to [`eqx_bilevel.CrossValidation`][] it judges error bars too, so that a
    noise level can be learned with it.

    Closed form, folds and memory are as there.
    """

    condition: str | None = eqx.field(static=True, default=None)
    num_folds: int | None = eqx.field(static=True, default=None)

    def __call__(self, solution: Solution) -> Float[Array, ""]:
        total = jnp.zeros((), solution.weights.dtype)
        for errors, precisions in _left_out(
            solution, self.condition, self.num_folds
        ):
            squares = jnp.einsum("ki,kij,kj->", errors, precisions, errors)
            determinants = jnp.sum(jax.vmap(_log_determinant)(precisions))
            total = total + squares - determinants + errors.size * _LOG_TWO_PI
        return 0.5 * total

    def check(self, conditions: Sequence[Condition]) -> None:
        _number_of_folds(
            self.num_folds, *find_condition(conditions, self.condition)
        )


_arguments = """**Arguments:**

- `condition`: The name of the condition whose points are left out. Default: the first
    one.
- `num_folds`: How many folds. Default: as many as points, that is one at a time.

**Raises:**

A `ValueError` when it is used, if there is no such condition or if the number of folds
is not possible.
"""
CrossValidation.__init__.__doc__ = _arguments
NegativeLogPredictive.__init__.__doc__ = _arguments
