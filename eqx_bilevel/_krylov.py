"""GMRES for systems that are close to the identity."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array


class FixedPointGMRES(lx.AbstractLinearSolver):
    """GMRES for $(I - B) x = b$ with $B$ mostly small.

    It stops at the first product that suffices, which is often the second, whereas
    `lineax.GMRES` completes its Krylov space and measures each entry relatively to
    itself, below what rounding allows here.

    Without restarts: `max_steps` vectors are stored.
    """

    rtol: float = 1e-10
    max_steps: int = 100
    # What is still taken for a solution if `rtol` is not reached. Failures raise, in
    # derivatives even if the solve that is differentiated does not.
    accept: float = 1e-4

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        return lx.linearise(operator)

    def compute(self, state, vector, options: dict[str, Any]):
        del options
        b, unravel = ravel_pytree(vector)
        product = lambda v: ravel_pytree(state.mv(unravel(v)))[0]
        size = jnp.linalg.norm(b)
        unit = b / jnp.where(size > 0, size, 1)
        coefficients, basis, residual, num_steps = self._arnoldi(product, unit)
        x = size * (coefficients @ basis)
        result = lx.RESULTS.where(
            residual > self.accept, lx.RESULTS.breakdown, lx.RESULTS.successful
        )
        stats = {"num_steps": num_steps, "max_steps": self.max_steps}
        return unravel(x), result, stats

    def _arnoldi(self, product, start: Array):
        # Of a right-hand side of norm one, or zero.
        steps = min(self.max_steps, start.shape[0])
        basis = jnp.zeros((steps + 1, start.shape[0]), start.dtype).at[0].set(start)
        hessenberg = jnp.zeros((steps + 1, steps), start.dtype)
        first = jnp.zeros(steps + 1, start.dtype).at[0].set(1)

        def proceed(carry):
            _, _, _, residual, k, exhausted = carry
            return (k < steps) & (residual > self.rtol) & jnp.invert(exhausted)

        def step(carry):
            basis, hessenberg, _, _, k, _ = carry
            v = product(basis[k])
            size_before = jnp.linalg.norm(v)
            column = jnp.zeros(steps + 1, v.dtype)
            for _ in range(2):  # Twice is enough.
                overlap = basis @ v
                v, column = v - overlap @ basis, column + overlap
            size = jnp.linalg.norm(v)
            exhausted = size <= 10 * jnp.finfo(v.dtype).eps * size_before
            v = jnp.where(exhausted, 0, v / jnp.where(exhausted, 1, size))
            basis = basis.at[k + 1].set(v)
            hessenberg = hessenberg.at[:, k].set(column.at[k + 1].set(size))
            # Normal equations, since the system is well-conditioned. Unused columns
            # get a one on the diagonal.
            unused = jnp.diag((jnp.arange(steps) > k).astype(v.dtype))
            normal = hessenberg.T @ hessenberg + unused
            y = jnp.linalg.solve(normal, hessenberg.T @ first)
            residual = jnp.linalg.norm(first - hessenberg @ y)
            return basis, hessenberg, y, residual, k + 1, exhausted

        residual = jnp.linalg.norm(start)
        y = jnp.zeros(steps, start.dtype)
        carry = (basis, hessenberg, y, residual, 0, jnp.array(False))
        carry = jax.lax.while_loop(proceed, step, carry)
        basis, _, y, residual, num_steps, _ = carry
        return y, basis[:-1], residual, num_steps

    def transpose(self, state, options: dict[str, Any]):
        del options
        return state.transpose(), {}

    def conj(self, state, options: dict[str, Any]):
        del options
        return lx.conj(state), {}

    def assume_full_rank(self):
        return True


FixedPointGMRES.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance for the norm of the residual.
- `max_steps`: The largest number of products.
- `accept`: If that was not enough, the relative residual that still counts as success.
"""
