"""Which optimiser learns: a default, or checks of one that was given."""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import PyTree

from ._checks import functions_as_pytrees
from ._objectives import AbstractLeastSquaresObjective, AbstractObjective
from ._outer import optax_update
from ._quasi_newton import BoundedBFGS


Optimiser: TypeAlias = (
    optax.GradientTransformation
    | optx.AbstractLeastSquaresSolver
    | optx.AbstractMinimiser
)

# Beyond the first number hyperparameters are probably weights of a network. At the
# second, the matrix of BFGS has 290 MB, and its update takes longer than a step.
_FEW = 20
_MOST_FOR_BFGS = 6000


def as_optimiser(
    optimiser: Any, theta: PyTree, objective: AbstractObjective, searched: bool
) -> Optimiser:
    # `searched`: whether a search for the scale comes before.
    size = _size(theta)
    if size == 0:
        raise ValueError(
            "There is nothing to learn: `prior` has no arrays outside of "
            "`eqx_bilevel.Frozen`, and `conditions` no parameters."
        )
    squares = isinstance(objective, AbstractLeastSquaresObjective)
    if optimiser is None:
        return _default(size, squares, searched)
    if isinstance(optimiser, optx.AbstractLeastSquaresSolver) and not squares:
        raise ValueError(
            "`optimiser` is for least squares, but the objective is no sum of squares. "
            "Use a minimiser, such as `eqx_bilevel.BoundedBFGS`."
        )
    if isinstance(optimiser, optx.NelderMead | optx.GoldenSearch):
        name = type(optimiser).__name__
        raise ValueError(
            "`optimiser` must evaluate the objective at one point in each step, and "
            f"find its way from there: `optimistix.{name}` does not. Use for example "
            "`eqx_bilevel.BoundedBFGS`."
        )
    if isinstance(optimiser, optax.GradientTransformation):
        _check_optax(optimiser, theta)
        optimiser = functions_as_pytrees(optimiser)
    if not isinstance(optimiser, Optimiser):
        raise ValueError(
            "`optimiser` must be an Optax optimiser, or an Optimistix least-squares "
            f"solver or minimiser, got a {type(optimiser).__name__}."
        )
    return optimiser


def default_patience(optimiser: Optimiser, theta: PyTree) -> int:
    if isinstance(optimiser, optax.GradientTransformation):
        return 200  # Its objective may be of random batches.
    return 3 if _size(theta) <= _FEW else 10


def _size(theta: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(theta))


def _default(size: int, squares: bool, searched: bool) -> Optimiser:
    if size > _MOST_FOR_BFGS:
        return optax.adam(1e-3)
    if size > _FEW:
        return BoundedBFGS(1e-5, 1e-5, max_length=0.3)
    # Logarithms of probabilities are large numbers of which small differences tell.
    tolerance = 1e-3 if squares else 1e-5
    # After a search the first step, whose length is not known, should be short.
    length = 0.1 if searched else 0.7
    return BoundedBFGS(tolerance, tolerance, max_length=length)


def _check_optax(optimiser: optax.GradientTransformation, theta: PyTree) -> None:
    def step(theta):
        value = jnp.zeros(())
        return optax_update(optimiser, optimiser.init(theta), theta, value, theta)

    try:
        eqx.filter_eval_shape(step, theta)
    except TypeError as error:
        raise ValueError(
            "`optimiser` must make a step from the gradient and the objective at one "
            "point. A line search, as in `optax.lbfgs`, does not. Use an Optimistix "
            f"minimiser, such as `eqx_bilevel.BoundedBFGS`. Optax says: {error}"
        ) from error
