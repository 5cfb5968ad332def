"""The inner solver: Gauss-Newton with one unknown per scalar condition."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from ._linearised import linearise, prior_z, residuals, slope_product, split
from ._problem import Problem
from ._system import AbstractSystem, DenseSystem, Regression


# A full step's relative change below which the minimum is close.
_NEARLY = 3e-2
# So many steps without progress there are enough.
_PATIENCE = 5


class Root(NamedTuple):
    # What is solved for: a point of linearisation, and the solution of the problem
    # linearised there.
    z: Float[Array, " N"]
    weights: Float[Array, " M"]


class _Iterate(eqx.Module):
    # A function v, as far as the conditions and its norm are concerned.
    z: Float[Array, " N"]
    linear: Float[Array, " M"]  # what its linear entries contribute to the conditions
    norm: Float[Array, ""]  # |v|_k^2
    known: Bool[Array, ""]  # whether the last two are


def _unknown(z, like: _Iterate) -> _Iterate:
    return _Iterate(z, like.linear, like.norm, jnp.array(False))


def _move(start: _Iterate, end: _Iterate, inner, step) -> _Iterate:
    # start + step * (end - start); `inner` is the inner product of the two.
    mix = lambda a, b: a + step * (b - a)
    squares = (1 - step) ** 2 * start.norm + step**2 * end.norm
    norm = squares + 2 * step * (1 - step) * inner
    return _Iterate(
        mix(start.z, end.z), mix(start.linear, end.linear), norm, jnp.array(True)
    )


# Step lengths that are tried.
_NUM_STEP_SIZES = 16


def _line_search(problem, linearised, start, regression):
    # The next iterate, between this one and the minimiser of the linearised problem. It
    # costs O(M): along this line everything in the objective (1) is known without the
    # kernel, since |v|^2 = w^T phi v for v = k phi^T w, and phi v = rhs - Gamma w.
    w, rhs = regression.weights, linearised.rhs
    noise = regression.noise.if_usable(regression.usable)
    slope = lambda z: slope_product(problem, linearised, z - prior_z(problem))
    applied = rhs - noise.mv(w)
    linear = applied - slope(regression.z)
    end = _Iterate(regression.z, linear, w @ applied, jnp.array(True))
    inner = w @ (slope(start.z) + start.linear)

    def objective(step):
        at = _move(start, end, inner, step)
        misfit = residuals(problem, at.z, at.linear)
        return 0.5 * (at.norm + jnp.sum(noise.whiten(misfit) ** 2))

    sizes = 0.5 ** jnp.arange(_NUM_STEP_SIZES, dtype=w.dtype)
    objectives = jax.vmap(objective)(jnp.append(sizes, 0.0))
    values, now = objectives[:-1], objectives[-1]
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    predicted = now - 0.5 * w @ rhs
    # The full step, unless it is bad; then the best of the shorter ones.
    full = values[0] <= now - 2e-4 * predicted
    full = full | jnp.invert(start.known) | jnp.invert(jnp.isfinite(now))
    step = jnp.where(full, 1.0, sizes[jnp.argmin(values)])
    return _move(start, end, inner, step), step


# Points that are remembered.
_MEMORY = 5


class _Anderson(eqx.Module):
    # Anderson acceleration of z <- T(z). Close to the minimum, where differences of the
    # objective are nothing but rounding, it takes the place of the line search.
    changes: Float[Array, "m N"]  # of T(z) - z, from step to step
    moves: Float[Array, "m N"]  # of T(z)
    last_residual: Float[Array, " N"]
    last_image: Float[Array, " N"]
    count: Int[Array, ""]

    @staticmethod
    def empty(like: Float[Array, " N"]) -> "_Anderson":
        zeros = jnp.zeros((_MEMORY, like.size), like.dtype)
        return _Anderson(zeros, zeros, like, like, jnp.array(0))

    def next(self, z, image, scale) -> tuple[Float[Array, " N"], "_Anderson"]:
        # `scale` makes entries comparable.
        residual = (image - z) / scale
        i, first = jnp.maximum(self.count - 1, 0) % _MEMORY, self.count == 0
        put = lambda a, x: a.at[i].set(jnp.where(first, 0, x))
        changes = put(self.changes, residual - self.last_residual)
        moves = put(self.moves, image - self.last_image)
        normal = changes @ changes.T
        size = jnp.maximum(jnp.trace(normal), jnp.finfo(z.dtype).tiny)
        normal = normal / size + 1e-13 * jnp.eye(_MEMORY, dtype=z.dtype)
        coefficients = jnp.linalg.solve(normal, changes @ residual / size)
        new = _Anderson(changes, moves, residual, image, self.count + 1)
        return image - coefficients @ moves, new


class _GaussNewtonState(eqx.Module):
    # Where to linearise next.
    proposal: _Iterate
    anderson: _Anderson
    jitter: Float[Array, ""]
    # Of the last linearisation that could be solved.
    factor: PyTree[Array]
    rounding: Float[Array, ""]
    change: Float[Array, ""]
    least_change: Float[Array, ""]  # so far
    num_stalled: Int[Array, ""]  # steps since
    num_left: Int[Array, ""]
    num_products: Int[Array, ""]  # in all, of iterative linear solves
    step_size: Float[Array, ""]
    # Used for termination.
    done: Bool[Array, ""]
    result: optx.RESULTS


def tree_where(which, one, two):
    arrays, static = eqx.partition((one, two), eqx.is_array)
    chosen = jax.tree.map(lambda a, b: jnp.where(which, a, b), *arrays)
    return eqx.combine(chosen, static[0])


class GaussNewton(optx.AbstractLeastSquaresSolver):
    """Gauss-Newton in the space of the conditions: each step solves the linearised
    problem in closed form, with one unknown for each scalar condition. See
    [the method](../method.md).

    It is an Optimistix least-squares solver for the problems that
    [`eqx_bilevel.solve`][] states, and for no others. In contrast to
    `optimistix.GaussNewton` it is globalised: steps are shortened until they decrease
    the objective. This costs next to nothing since the objective along a step is known
    without evaluating the kernel again. Close to the minimum, where rounding hides how
    the objective changes, Anderson acceleration takes over. It converges also where
    full steps would not.

    It has converged when a full step would change the unknown's values at the points
    (those which enter some operator nonlinearly) by less than the tolerance, or by no
    more than rounding does; also by up to a hundred times that, if for some steps there
    has been no progress.
    """

    rtol: float = 1e-8
    atol: float = 1e-10
    norm: Callable[[PyTree], Scalar] = optx.max_norm
    linear_solver: lx.AbstractLinearSolver | AbstractSystem | None = None
    verbose: bool | Callable[..., None] = False

    @property
    def system(self) -> AbstractSystem:
        if isinstance(self.linear_solver, AbstractSystem):
            return self.linear_solver
        return DenseSystem(self.linear_solver or lx.Cholesky())

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        problem, dtype = args, args.dtype
        zero = jnp.zeros((), dtype)
        start = options["start"]
        return _GaussNewtonState(
            proposal=_Iterate(y.z, jnp.zeros(problem.size, dtype), zero, start),
            anderson=_Anderson.empty(y.z),
            jitter=options["jitter"],
            factor=self.system.no_factor(problem),
            num_products=jnp.array(0),
            rounding=zero,
            change=zero + jnp.inf,
            least_change=zero + jnp.inf,
            num_stalled=jnp.array(0),
            num_left=options["max_steps"],
            step_size=zero,
            done=jnp.array(False),
            result=optx.RESULTS.successful,
        )

    def step(self, fn, y, args, options, state, tags):
        problem, here = args, state.proposal
        linearised = linearise(problem, here.z)
        last = state.factor, y.weights
        new = self.system.regress(problem, linearised, state.jitter, last)
        change, excess, scale = self._compare(problem, here.z, new)
        near = change < _NEARLY
        searched, step_size = _line_search(problem, linearised, here, new)
        accelerated, anderson = state.anderson.next(here.z, new.z, scale)
        anderson = tree_where(near, anderson, _Anderson.empty(here.z))
        proposal = tree_where(near, _unknown(accelerated, searched), searched)
        step_size = jnp.where(near, 1.0, step_size)
        # If steps do not get smaller any more: rounding allows no more.
        progress = change < 0.9 * state.least_change
        num_stalled = jnp.where(progress, 0, state.num_stalled + 1)
        converged = (excess <= 1) | ((excess <= 100) & (num_stalled >= _PATIENCE))
        # Otherwise try again with more jitter.
        smallest = self.system.smallest_nugget(problem)
        # In small steps at first, since accuracy is in proportion.
        factor = jnp.where(state.jitter < 10 * smallest, 4, 10).astype(problem.dtype)
        jitter = jnp.maximum(factor * state.jitter, smallest)
        too_much = jnp.invert(new.usable) & (jitter > largest_nugget(problem))
        solved = _GaussNewtonState(
            proposal=proposal,
            anderson=anderson,
            jitter=state.jitter,
            factor=new.factor,
            num_products=state.num_products + new.num_products,
            rounding=jnp.max(jnp.abs(new.rounding), initial=0),
            change=change,
            least_change=jnp.minimum(change, state.least_change),
            num_stalled=num_stalled,
            num_left=state.num_left,
            step_size=step_size,
            done=converged,
            result=optx.RESULTS.successful,
        )
        # Keeping factors and weights for that would cost a copy of all in each step.
        failed = eqx.tree_at(
            lambda s: (s.jitter, s.done, s.factor, s.change),
            state,
            (jitter, too_much, self.system.no_factor(problem), state.change + jnp.inf),
        )
        root = Root(here.z, new.weights)
        y, state = tree_where(new.usable, (root, solved), (y, failed))
        num_left = state.num_left - 1
        result = optx.RESULTS.successful
        for fault, kind in (
            ((num_left <= 0) & ~state.done, optx.RESULTS.nonlinear_max_steps_reached),
            (too_much, optx.RESULTS.singular),
        ):
            result = optx.RESULTS.where(fault, kind, result)  # pyright: ignore
        where = lambda s: (s.num_left, s.result)
        state = eqx.tree_at(where, state, (num_left, result))
        self._report(state)
        return y, state, None

    def _compare(self, problem, z, new: Regression):
        # By how much a full step changes z: relatively, and in tolerances. Each
        # derivative of each condition has its own scale, returned as well.
        zero = jnp.zeros((), z.dtype)
        changes, excesses, scales = [zero], [zero], []
        parts = (split(problem, a) for a in (z, new.z, new.rounding))
        for before, after, rounding in zip(*parts):
            size = jnp.max(jnp.abs(after), axis=0, initial=0)
            change = jnp.max(jnp.abs(after - before), axis=0, initial=0)
            limit = 10 * jnp.max(jnp.abs(rounding), axis=0, initial=0)
            tolerance = jnp.maximum(self.atol + self.rtol * size, limit)
            excesses.append(jnp.max(change / tolerance, initial=0))
            changes.append(jnp.max(change / (size + self.atol), initial=0))
            scales.append(jnp.broadcast_to(size + self.atol, after.shape).reshape(-1))
        scale = jnp.concatenate(scales)
        return jnp.max(jnp.stack(changes)), jnp.max(jnp.stack(excesses)), scale

    def _report(self, state):
        if callable(self.verbose):
            self.verbose(
                change=("Relative change of a full step", state.change),
                step_size=("Step size", state.step_size),
                jitter=("Jitter", state.jitter),
            )
        elif self.verbose:
            jax.debug.print(
                "Gauss-Newton: relative change of a full step {:.1e}, "
                "step size {:.1e}, jitter {:.0e}",
                state.change,
                state.step_size,
                state.jitter,
            )

    def terminate(self, fn, y, args, options, state, tags):
        return state.done, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        # The factor is that of the linearisation at `y`.
        return y, aux, {"state": state}


GaussNewton.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, with respect to the largest value of each derivative.
- `atol`: Absolute tolerance.
- `norm`: Unused: as in other Optimistix solvers, but tolerances are for each value.
- `linear_solver`: A direct Lineax solver for symmetric positive definite matrices, an
    [`eqx_bilevel.SparseCholesky`][] or an [`eqx_bilevel.MatrixFree`][]. (An iterative
    one of Lineax, such as `lx.CG`, leaves errors that `result` does not see.) Default:
    `lx.Cholesky()`; `SparseCholesky()` if conditions have more than 8000 targets, or
    fewer if the Gram matrix takes more than an eighth of the device's memory, the
    kernels are of finite smoothness and the points, in at most three dimensions, are
    known; and otherwise `MatrixFree()` if the Gram matrix takes more than that.
- `verbose`: Whether to print one line for each step; or a function that is called with
    keyword arguments `name=(description, value)` instead, as in Optimistix.
"""


def largest_nugget(problem: Problem) -> float:
    return float(jnp.finfo(problem.dtype).eps) ** 0.25
