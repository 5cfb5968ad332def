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
from ._left_out import log_determinant, positive_solve
from ._objectives import AbstractLeastSquaresObjective, AbstractWholeObjective
from ._problem import find_condition
from ._solution import Solution


_LOG_TWO_PI = math.log(2 * math.pi)


def _log_density(errors: Array, determinant: Array, squares: Array) -> Array:
    # Minus the logarithm of a normal density, given that of the covariance.
    return 0.5 * (squares + determinant + errors.size * _LOG_TWO_PI)


class NegativeLogEvidence(AbstractWholeObjective):
    r"""The negative logarithm of the probability density of what was measured, given
    the hyperparameters, in Laplace's approximation. Minimising it weighs how well the
    data are explained against how many other data would have been explained too, and so
    can tell noise from signal.

    Of all conditions' targets this is

    $$
    \tfrac12 \lVert u^* - m \rVert_k^2
    + \tfrac12 \lVert R(u^*) - t \rVert_{\Gamma^{-1}}^2
    + \tfrac12 \log \det (2 \pi G),
    $$

    with the Gram matrix of the conditions linearised at the solution $u^*$; and of some
    conditions' targets given all others, with the covariance that the others leave in
    the place of $G$. It is exact for linear conditions.

    If there is a nonlinear equation that holds exactly then ask for the evidence of the
    `conditions` with data. The density of the equation's own target is not what one
    wants: it depends on how the equation is written, since multiplying that by any
    function of the unknowns changes it, and with many collocation points it outweighs
    the data.

    It needs $M^2$ memory; but the evidence of all conditions does not where there is no
    matrix, that is with [`eqx_bilevel.SparseCholesky`][] and
    [`eqx_bilevel.MatrixFree`][]. The logarithm of the determinant is estimated there,
    from random vectors that are the same each time: by stochastic Lanczos quadrature of
    the preconditioned matrix, so that most of it is exact. This needs matfree, an
    optional dependency: `pip install "eqx_bilevel[scale]"`.

    ??? cite "Reference"

        S. Ubaru, J. Chen and Y. Saad, *Fast estimation of tr(f(A)) via stochastic
        Lanczos quadrature*, SIAM J. Matrix Anal. Appl. 38 (2017).
    """

    conditions: tuple[str, ...] | None = eqx.field(static=True)
    num_probes: int = eqx.field(static=True)

    def __init__(
        self, conditions: str | Sequence[str] | None = None, *, num_probes: int = 16
    ):
        names = (conditions,) if isinstance(conditions, str) else conditions
        self.conditions = None if names is None else tuple(names)
        if not isinstance(num_probes, int) or num_probes < 1:
            raise ValueError(
                f"`num_probes` must be a positive integer, got {num_probes}."
            )
        self.num_probes = num_probes

    def __call__(self, solution: Solution) -> Float[Array, ""]:
        if self.conditions is None and not solution._has_matrix:
            squares, determinant = solution._density(self.num_probes)
            return _log_density(solution._linearised.rhs, determinant, squares)
        names = self.conditions or [r.name for r in solution._problem.rows]
        values, covariance = solution._predicted(names)
        weights = positive_solve(covariance, values[:, None])[:, 0]
        return _log_density(values, log_determinant(covariance), values @ weights)

    def check(self, conditions: Sequence[Condition]) -> None:
        for name in self.conditions or ():
            find_condition(conditions, name, "`NegativeLogEvidence`")


NegativeLogEvidence.__init__.__doc__ = """**Arguments:**

- `conditions`: The name or names of the conditions whose targets these are. Default:
    the targets of all of them.
- `num_probes`: How many random vectors estimate the determinant where there is no
    matrix. With $n$ of them, the error of its gradient is typically about
    $\\sqrt{2 / (M n)}$, relatively.

**Raises:**

A `ValueError` if `num_probes` is not a positive integer; and when it is used, if there
is no such condition. An `ImportError` if matfree is needed and not installed.
"""


def _check_folds(
    objective: "CrossValidation | NegativeLogPredictive",
    conditions: Sequence[Condition],
) -> None:
    num, whose = objective.num_folds, f"`{type(objective).__name__}`"
    found, name = find_condition(conditions, objective.condition, whose)
    n = found.num_targets
    if num is not None and not (isinstance(num, int) and 2 <= num <= n):
        raise ValueError(
            "`num_folds` must be an integer between 2 and the number of targets of "
            f"condition {name!r}, which is {n}, got {num}."
        )


class CrossValidation(AbstractLeastSquaresObjective, AbstractWholeObjective):
    r"""Half the sum of squared errors, in the units of the target, of predicting each
    point of a condition from all other points and conditions; or with folds, of
    predicting each fold from the others.

    It is computed in closed form from the Gram matrix, without solving anything again:
    for linear conditions exactly, and otherwise for those linearised at the solution.
    The `i`-th of $k$ folds has the points $i, i + k, i + 2k, \ldots$ It needs $M^2$
    memory.

    ??? cite "References"

        S. Sundararajan and S. S. Keerthi, *Predictive approaches for choosing
        hyperparameters in Gaussian processes*, Neural Computation 13 (2001). With
        folds: D. Ginsbourger and C. Schärer, *Fast calculation of Gaussian process
        multiple-fold cross-validation residuals and their covariances*,
        [arXiv:2101.03108](https://arxiv.org/abs/2101.03108).
    """

    condition: str | None = eqx.field(static=True, default=None)
    num_folds: int | None = eqx.field(static=True, default=None)

    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        parts = solution._left_out(self.condition, self.num_folds)
        return jnp.concatenate([values.reshape(-1) for values, _ in parts])

    def check(self, conditions: Sequence[Condition]) -> None:
        _check_folds(self, conditions)


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
        for values, precisions in solution._left_out(self.condition, self.num_folds):
            squares = jnp.einsum("ki,kij,kj->", values, precisions, values)
            determinants = -jnp.sum(jax.vmap(log_determinant)(precisions))
            total = total + _log_density(values, determinants, squares)
        return total

    def check(self, conditions: Sequence[Condition]) -> None:
        _check_folds(self, conditions)


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
