"""What was known of hyperparameters before they were learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ._condition import Condition, GaussianProcess, learned_in
from ._objectives import AbstractLeastSquaresObjective
from ._solution import Solution


class NegativeLogHyperprior(AbstractLeastSquaresObjective):
    """The negative logarithm of a prior density of all hyperparameters, up to a
    constant: they are independently normal around those of the given prior and
    conditions, on the scale on which they are learned, which for an
    [`eqx_bilevel.Positive`][] is logarithmic.

    Data often say little about some hyperparameters, such as the variance of a function
    that an equation determines anyway. Without this, these drift off until rounding
    stops them.

    !!! example

        ```python
        known = eb.NegativeLogHyperprior(prior, conditions, std=2.0)
        learned = eb.learn(prior, conditions, eb.NegativeLogEvidence("data") + known)
        ```
    """

    centre: Float[Array, " p"]
    std: float = eqx.field(static=True)

    def __init__(
        self,
        prior: GaussianProcess | Mapping[str, GaussianProcess],
        conditions: Sequence[Condition],
        std: float | int = 2.0,
    ):
        if not 0 < std < np.inf:
            raise ValueError(f"`std` must be a finite positive number, got {std}.")
        self.centre = _hyperparameters(prior, conditions)
        self.std = float(std)

    def residuals(self, solution: Solution) -> Float[Array, " r"]:
        found = _hyperparameters(solution.prior, solution.conditions)
        if found.shape != self.centre.shape:
            raise ValueError(
                f"`NegativeLogHyperprior` knows {self.centre.size} hyperparameter(s), "
                f"but there are {found.size}. Make it of the prior and conditions that "
                "are given to `learn`."
            )
        return (found - self.centre) / self.std


NegativeLogHyperprior.__init__.__doc__ = """**Arguments:**

- `prior`, `conditions`: As for [`eqx_bilevel.learn`][].
- `std`: The standard deviation. The default allows a factor of about fifty in both
    directions.

**Raises:**

A `ValueError` if the standard deviation is not positive; and when it is evaluated, if
there is another number of hyperparameters.
"""


def _hyperparameters(prior: Any, conditions: Sequence[Condition]) -> Array:
    prior = dict(prior) if isinstance(prior, Mapping) else prior
    both = prior, list(conditions)
    theta = eqx.filter(both, learned_in(*both))
    return ravel_pytree(jax.tree.map(jnp.asarray, theta))[0]
