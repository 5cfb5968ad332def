"""Points where a kernel needs them."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ._condition import as_points
from ._kernels import AbstractKernel
from ._parameters import unwrap


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
    candidates = as_points(candidates)
    if not 1 <= n <= len(candidates):
        raise ValueError(
            f"`n` must be between 1 and the number of candidates, which is "
            f"{len(candidates)}, got {n}."
        )
    return _farthest_points(candidates, kernel, n)


@eqx.filter_jit
def _farthest_points(candidates, kernel, n: int):
    kernel = unwrap(kernel)
    logarithm = lambda k: jnp.log(jnp.maximum(k, jnp.finfo(k.dtype).tiny))
    own = logarithm(jax.vmap(lambda x: kernel(x, x))(candidates))

    def choose(distance, _):
        i = jnp.argmax(distance)
        common = logarithm(jax.vmap(partial(kernel, candidates[i]))(candidates))
        new = 0.5 * (own + own[i]) - common
        distance = jnp.minimum(distance, new).at[i].set(-jnp.inf)
        return distance, i

    start = jnp.full(len(candidates), jnp.inf, candidates.dtype)
    _, chosen = jax.lax.scan(choose, start, length=n)
    return candidates[chosen]
