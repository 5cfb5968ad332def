"""What the data leave open of the hyperparameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from ._adjoint import FixedPointAdjoint
from ._checks import functions_as_pytrees
from ._closure import function_as_pytree
from ._gauss_newton import GaussNewton
from ._jit import jit
from ._learn import Learned
from ._linear_solver import with_system
from ._objectives import (
    AbstractLeastSquaresObjective,
    AbstractObjective,
    as_data_objective,
)
from ._outer import partition, solve_at, Start, Task
from ._parameters import unwrap
from ._solution import Solution


class HyperparameterPosterior(eqx.Module):
    """A Gaussian approximation of what is known of the learned hyperparameters, see
    [`eqx_bilevel.laplace`][].

    **Attributes:**

    - `solution`: The solution, with the learned hyperparameters.
    - `covariance`: Of the vector of all hyperparameters, as the optimiser sees them: of
        the logarithm of an [`eqx_bilevel.Positive`][], for instance.
    """

    solution: Solution
    covariance: Float[Array, "p p"]
    _theta: PyTree
    _task: Task
    _start: Start

    def std(
        self, x: Float[ArrayLike, "*n d"], operator: Callable | None = None
    ) -> PyTree[Float[Array, "*n"]]:
        """Standard deviations as those of [`eqx_bilevel.Solution`][], but including
        what comes of not knowing the hyperparameters exactly.

        **Arguments:**

        - `x`: One point of shape `(d,)` or many of shape `(n, d)`.
        - `operator`: Of which operator `(u, x) -> scalar`. Default: the values of the
            unknowns.
        """
        given = self.solution.std(x, operator)
        operator = function_as_pytree(operator)
        slopes = _slopes(_read, self._theta, self._task, self._start, operator, x)
        return jax.tree.map(jnp.hypot, given, self._std(slopes))

    def std_of(self, fn: Callable[[Any, Any], PyTree[Array]]) -> PyTree[Array]:
        """The standard deviation of a function of the hyperparameters.

        !!! example

            ```python
            posterior.std_of(lambda prior, conditions: prior.kernel.lengthscale)
            ```

        **Arguments:**

        - `fn`: A function of the prior and the list of conditions, with numbers in the
            place of parameters. It returns an array, or a PyTree of them.
        """
        fn = function_as_pytree(fn)
        return self._std(_slopes(_apply, self._theta, self._task, fn))

    def _std(self, slopes: PyTree[Array]) -> PyTree[Array]:
        variance = lambda s: jnp.einsum("p...,pq,q...->...", s, self.covariance, s)
        return jax.tree.map(lambda s: jnp.sqrt(variance(s)), slopes)


def _read(theta, task: Task, start: Start, operator, x):
    solution = solve_at(theta, task, start)
    return solution(x) if operator is None else solution.apply(operator, x)


def _apply(theta, task: Task, fn):
    return fn(*unwrap(eqx.combine(theta, task.rest)))


@jit
def _slopes(fn: Callable, theta: PyTree, *args: Any) -> PyTree[Array]:
    # The derivative in each direction, one after the other.
    vector, unravel = ravel_pytree(theta)
    at = lambda v: fn(unravel(v), *args)
    along = lambda direction: jax.jvp(at, (vector,), (direction,))[1]
    return jax.lax.map(along, jnp.eye(vector.size, dtype=vector.dtype))


def laplace(
    learned: Learned,
    objective: AbstractObjective,
    solver: GaussNewton = GaussNewton(),
) -> HyperparameterPosterior:
    r"""What is known of hyperparameters once they have been learned, in Laplace's
    approximation: a Gaussian distribution around them, whose covariance is the inverse
    of the objective's matrix of second derivatives.

    **Arguments:**

    - `learned`: What [`eqx_bilevel.learn`][] returned.
    - `objective`: The objective that it minimised. It must be the negative logarithm of
        a probability density: [`eqx_bilevel.NegativeLogEvidence`][], perhaps with
        an [`eqx_bilevel.NegativeLogHyperprior`][].
    - `solver`: The inner solver.

    **Returns:**

    A [`eqx_bilevel.HyperparameterPosterior`][].

    **Raises:**

    A `ValueError` if the objective is a sum of squares, whose curvature says nothing of
    probabilities; and if the second derivatives are not those of a minimum, as for
    hyperparameters that the data say nothing about.
    """
    if isinstance(objective, AbstractLeastSquaresObjective):
        raise ValueError(
            "`objective` must be the negative logarithm of a probability density, such "
            f"as `NegativeLogEvidence`, and not a {type(objective).__name__}."
        )
    as_data_objective(objective).check(learned.conditions)
    task = Task(
        None,
        functions_as_pytrees(objective),
        with_system(solver, learned.prior, learned.conditions),
        FixedPointAdjoint(),
        jnp.asarray(100),
    )
    theta, task = partition(learned.prior, learned.conditions, task)
    found = learned.solution
    start = Start(found._next_z, jnp.array(False), found.stats["jitter"])
    hessian = _slopes(_gradient, theta, task, start)
    hessian = 0.5 * (hessian + hessian.T)
    values = np.linalg.eigvalsh(np.asarray(hessian))
    if not values[0] > 1e-10 * values[-1]:
        low, high = values[0], values[-1]
        raise ValueError(
            "The hyperparameters are not determined: the eigenvalues of the second "
            f"derivatives of the objective reach from {low:.1e} to {high:.1e}. Learn "
            "for longer, freeze some of them (`eqx_bilevel.Frozen`), or add to the "
            "objective what was known of them before (`NegativeLogHyperprior`)."
        )
    covariance = jnp.linalg.inv(hessian)
    return HyperparameterPosterior(found, covariance, theta, task, start)


def _gradient(theta, task: Task, start: Start):
    value = lambda theta: task.objective(solve_at(theta, task, start))
    return ravel_pytree(jax.grad(value)(theta))[0]
