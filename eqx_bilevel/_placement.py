"""Points where a kernel, or a solution, needs them."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._condition import as_points
from ._geometry import AbstractDomain, farthest_first
from ._kernels import AbstractKernel
from ._parameters import unwrap
from ._problem import find_condition
from ._solution import Solution
from ._validation import ValidationResidual


_CRITERIA = ("residual", "std")


def farthest_points(
    candidates: Float[ArrayLike, "m d"], kernel: AbstractKernel, n: int
) -> Float[Array, "n d"]:
    r"""Chooses points that are spread evenly in the metric of a kernel: more of them
    where its functions vary faster. Each is the one that is least correlated with those
    before it, that is the farthest by the distance
    $-\log(k(x, y) / \sqrt{k(x, x) \, k(y, y)})$.

    With a kernel that has learned a lengthscale field, this puts points where solutions
    are steep.

    !!! example

        ```python
        candidates = domain.interior(16 * 1000, key=key)
        points = eb.farthest_points(candidates, learned.prior.kernel, 1000)
        ```

    **Arguments:**

    - `candidates`: Points to choose from, of shape `(m, d)`.
    - `kernel`: An [`eqx_bilevel.AbstractKernel`][].
    - `n`: How many to choose.

    **Returns:**

    An array of shape `(n, d)`. The first is the first candidate.

    **Raises:**

    A `ValueError` if there are fewer candidates than that.
    """
    return _farthest_points(_enough(candidates, n), kernel, n)


def _enough(candidates, n: int) -> Float[Array, "m d"]:
    candidates = as_points(candidates)
    if not 1 <= n <= len(candidates):
        raise ValueError(
            f"`n` must be between 1 and the number of candidates, which is "
            f"{len(candidates)}, got {n}."
        )
    return candidates


@eqx.filter_jit
def _farthest_points(candidates, kernel, n: int):
    kernel = unwrap(kernel)
    logarithm = lambda k: jnp.log(jnp.maximum(k, jnp.finfo(k.dtype).tiny))
    own = logarithm(jax.vmap(lambda x: kernel(x, x))(candidates))

    def apart(i):
        common = logarithm(jax.vmap(partial(kernel, candidates[i]))(candidates))
        return 0.5 * (own + own[i]) - common

    start = jnp.full(len(candidates), jnp.inf, candidates.dtype)
    return candidates[farthest_first(start, apart, n)]


def adaptive_points(
    solution: Solution,
    candidates: Float[ArrayLike, "m d"] | AbstractDomain,
    n: int,
    condition: str | None = None,
    *,
    criterion: str = "residual",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "n d"]:
    r"""Chooses points to be added to a condition: where the solution does not satisfy
    it, or does not know, and apart from each other and from the points that it has.

    One after the other, it is the candidate with the largest
    $\rho(x)^{1/d} \, \operatorname{dist}(x)$. Here $\operatorname{dist}$ is the
    distance to the nearest point so far, old or new, in coordinates that are scaled to
    the extent of the candidates, and $\rho$ is the criterion plus its mean. So the
    density of old and new points together tends to be proportional to $\rho$, as with
    the random points of [arXiv:2207.10289](https://arxiv.org/abs/2207.10289).

    The kernel must be one for which the points that there are suffice elsewhere, such
    as a [`eqx_bilevel.Matern`][] kernel. With a lengthscale that is everywhere as short
    as a steep front is wide, points are missing everywhere, and those at the front help
    no more than others.

    !!! example

        ```python
        points = eb.adaptive_points(solution, domain, 100, "pde", key=key)
        equation = eb.Condition(operator, jnp.concatenate([inside, points]), name="pde")
        ```

    **Arguments:**

    - `solution`: An [`eqx_bilevel.Solution`][].
    - `candidates`: Points to choose from, of shape `(m, d)`; or a domain, and then they
        are `20 n` points inside it.
    - `n`: How many to choose.
    - `condition`: The name of the condition. Default: the first one.

    The remaining arguments are keyword-only.

    - `criterion`: `"residual"` for the absolute value of operator minus target, the
        latter being a number or a function; `"std"` for the posterior standard
        deviation of the operator, which must then return one number.
    - `key`: A `jax.random.key`, needed for the points inside a domain.

    **Returns:**

    An array of shape `(n, d)`.

    **Raises:**

    A `ValueError` if there are fewer candidates than that, or no such condition, or if
    the condition is about averages or has targets at its own points only.
    """
    if criterion not in _CRITERIA:
        raise ValueError(f"`criterion` must be 'residual' or 'std', got {criterion!r}.")
    if isinstance(candidates, AbstractDomain):
        candidates = candidates.interior(20 * n, key=key)
    candidates = _enough(candidates, n)
    found, _ = find_condition(solution.conditions, condition, "`adaptive_points`")
    if criterion == "std":
        size = solution.std(candidates, found.operator)
    else:
        objective = ValidationResidual(candidates, condition, misfit_weight=0)
        residuals = objective.residuals(solution).reshape(len(candidates), -1)
        size = jnp.linalg.norm(residuals, axis=1)
    return _spread(candidates, found.points, size, n)


@partial(jax.jit, static_argnums=3)
def _spread(candidates, points, size, n: int):
    # If it is nothing anywhere, or after a failure, points are spread evenly.
    mean = jnp.mean(size)
    relative = jnp.where(mean > 0, size / jnp.where(mean > 0, mean, 1), 0)
    density = (relative + 1) ** (1 / candidates.shape[1])
    scale = jnp.max(candidates, axis=0) - jnp.min(candidates, axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    apart = lambda x: jnp.linalg.norm((candidates - x[None]) / scale[None], axis=1)
    nearest = lambda distance, x: (jnp.minimum(distance, apart(x)), None)
    start = jnp.full(len(candidates), jnp.inf, candidates.dtype)
    start, _ = jax.lax.scan(nearest, start, points)
    chosen = farthest_first(start, lambda i: apart(candidates[i]), n, density)
    return candidates[chosen]
