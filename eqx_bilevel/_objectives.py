"""What the outer problem minimises."""

import abc
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._closure import function_as_pytree
from ._condition import Condition
from ._solution import Solution


class AbstractObjective(eqx.Module):
    """An outer objective: a number, the smaller the better, for each solution.
    Objectives can be added, and multiplied with positive numbers.

    For one of your own, subclass this class and define `__call__`, nothing else; or
    subclass [`eqx_bilevel.AbstractLeastSquaresObjective`][] and define `residuals`, if
    it is a sum of squares. It is differentiated with respect to the solution; arrays
    in it are constants. If a function of the solution is enough, use
    [`eqx_bilevel.Objective`][].

    !!! example

        ```python
        class Excess(eb.AbstractObjective):
            points: jax.Array
            limit: float

            def __call__(self, solution):
                return jnp.mean(jax.nn.relu(solution(self.points) - self.limit) ** 2)
        ```

    One that has points of its own, at which conditions hold, or random batches of them,
    is in addition an [`eqx_bilevel.AbstractDataObjective`][].
    """

    @abc.abstractmethod
    def __call__(self, solution: Solution) -> Float[Array, ""]:
        """The value of the objective, for an [`eqx_bilevel.Solution`][]: a scalar."""

    def __add__(self, other: "AbstractObjective") -> "AbstractObjective":
        if not isinstance(other, AbstractObjective):
            return NotImplemented
        return _weighted_sum((self, other), (1.0, 1.0))

    def __mul__(self, weight: float) -> "AbstractObjective":
        return _weighted_sum((self,), (weight,))

    def __rmul__(self, weight: float) -> "AbstractObjective":
        return self * weight


class AbstractLeastSquaresObjective(AbstractObjective):
    """An objective that is half a sum of squares. It is minimised on a logarithmic
    scale, and least-squares solvers may be used for it.
    """

    @abc.abstractmethod
    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        """What is squared and summed."""

    def __call__(self, solution: Solution) -> Float[Array, ""]:
        """The value of the objective."""
        return 0.5 * jnp.sum(self.residuals(solution) ** 2)


class AbstractDataObjective(AbstractObjective):
    """An objective that is about certain conditions, with points or data of its own.

    All of its methods are to be defined, and `__call__`.
    """

    @abc.abstractmethod
    def check(self, conditions: Sequence[Condition]) -> None:
        """Raises a `ValueError` if it cannot be about solutions of these conditions."""

    @abc.abstractmethod
    def readings(self, conditions: Sequence[Condition]) -> list[tuple[Callable, Array]]:
        """What `Solution.apply` is called with, operators and points, as far as it is
        known in advance. An empty list will do: this only saves compile time.
        """

    @property
    @abc.abstractmethod
    def batched(self) -> bool:
        """Whether `batch` returns less than the whole."""

    @abc.abstractmethod
    def batch(self, key: PRNGKeyArray) -> AbstractObjective:
        """A random part of the objective, of the same size each time, whose expectation
        is the whole; or the objective itself, if it does not use batches.
        """

    @abc.abstractmethod
    def pooled(self, conditions: Sequence[Condition]) -> list[Condition]:
        """The conditions, with the objective's data added to them."""


class AbstractWholeObjective(AbstractDataObjective):
    # An objective without batches and without points of its own.

    def readings(self, conditions):
        del conditions
        return []

    @property
    def batched(self):
        return False

    def batch(self, key):
        del key
        return self

    def pooled(self, conditions):
        return list(conditions)


class _Whole(AbstractWholeObjective):
    # Any objective, as one about data of which it has none.
    objective: AbstractObjective

    def __call__(self, solution):
        return self.objective(solution)

    def check(self, conditions):
        del conditions


def as_data_objective(objective: AbstractObjective) -> AbstractDataObjective:
    is_one = isinstance(objective, AbstractDataObjective)
    return objective if is_one else _Whole(objective)


class Objective(AbstractObjective):
    """An objective that is given as a function of the solution: a penalty, or the
    negative logarithm of a prior density of hyperparameters.

    !!! example

        ```python
        def log_normal(solution):
            lengthscale = eb.unwrap(solution.prior).kernel.lengthscale
            return 0.5 * jnp.log(lengthscale / 0.2) ** 2

        objective = eb.NegativeLogEvidence() + eb.Objective(log_normal)
        ```
    """

    fn: Callable[[Solution], Array]

    def __init__(self, fn: Callable[[Solution], Array]):
        if not callable(fn):
            raise ValueError(f"`fn` must be a function of a solution, got {fn!r}.")
        self.fn = function_as_pytree(fn)

    def __call__(self, solution):
        value = jnp.asarray(self.fn(solution))
        if value.shape != ():
            raise ValueError(
                "An `Objective` must return one number, but it returned an array of "
                f"shape {value.shape}."
            )
        return value


Objective.__init__.__doc__ = """**Arguments:**

- `fn`: A function that takes an [`eqx_bilevel.Solution`][] and returns a number. It is
    differentiated.

**Raises:**

A `ValueError` if it is not a function; and when it is evaluated, if it does not return
one number.
"""


def _weighted_sum(objectives, weights: tuple[float, ...]) -> AbstractObjective:
    wrong = [w for w in weights if not 0 <= w < np.inf]
    if wrong:
        raise ValueError(
            "The weight of an objective must be finite and not negative, got "
            f"{wrong[0]}."
        )
    squares = [isinstance(o, AbstractLeastSquaresObjective) for o in objectives]
    kind = _SumOfSquares if all(squares) else _Sum
    return kind(objectives, weights)


class _AbstractSum(AbstractDataObjective):
    objectives: eqx.AbstractVar[tuple[AbstractObjective, ...]]
    weights: eqx.AbstractVar[tuple[float, ...]]

    @property
    def _parts(self):
        return [as_data_objective(o) for o in self.objectives]

    def readings(self, conditions):
        return [r for o in self._parts for r in o.readings(conditions)]

    def batch(self, key):
        keys = jax.random.split(key, len(self.objectives))
        batches = tuple(o.batch(k) for o, k in zip(self._parts, keys))
        return _weighted_sum(batches, self.weights)

    @property
    def batched(self):
        return any(o.batched for o in self._parts)

    def check(self, conditions):
        for objective in self._parts:
            objective.check(conditions)

    def pooled(self, conditions):
        for objective in self._parts:
            conditions = objective.pooled(conditions)
        return list(conditions)


class _Sum(_AbstractSum):
    objectives: tuple[AbstractObjective, ...]
    weights: tuple[float, ...]

    def __call__(self, solution):
        parts = [w * o(solution) for o, w in zip(self.objectives, self.weights)]
        return sum(parts[1:], parts[0])


class _SumOfSquares(_AbstractSum, AbstractLeastSquaresObjective):
    objectives: tuple[AbstractLeastSquaresObjective, ...]
    weights: tuple[float, ...]

    def residuals(self, solution):
        pairs = zip(self.objectives, self.weights)
        return jnp.concatenate([w**0.5 * o.residuals(solution) for o, w in pairs])
