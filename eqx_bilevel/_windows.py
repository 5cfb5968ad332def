"""Long times: one solve after the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import wadler_lindig as wl
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._adjoint import FixedPointAdjoint, without_gradient
from ._checks import all_finite, check_num_steps, check_solver, checked, sanitised
from ._closure import function_as_pytree
from ._condition import Condition, GaussianProcess, is_concrete
from ._gauss_newton import GaussNewton
from ._jit import jit
from ._linearised import noise, prior_z
from ._parameters import unwrap
from ._pretty import named_doc
from ._problem import find_condition, Problem
from ._results import RESULTS
from ._solution import Solution
from ._solve import solve_problem
from ._sparse import SparseCholesky
from ._threads import free_cores


class Windows(eqx.Module):
    """Solutions of one time window after the other. They can be called, with points
    whose time says which of them answers.

    **Attributes:**

    - `solutions`: An [`eqx_bilevel.Solution`][], all of whose arrays have one more axis
        in front, of size `num_windows`.
    - `start`: When the first window starts.
    - `length`: How long each of them is.
    """

    solutions: Solution
    start: Float[Array, ""]
    length: Float[Array, ""]
    _axis: int = eqx.field(static=True)

    def __call__(self, x: Float[ArrayLike, "*n d"]) -> PyTree[Float[Array, "*n"]]:
        """Evaluates the solution at one or many points."""
        return self._map(lambda solution, x: solution(x), x)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        shown = ("start", "length", "result", "stats")
        fields = wl.named_objs([(k, getattr(self, k)) for k in shown], **kwargs)
        return named_doc("Windows", fields, **kwargs)

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return len(self.solutions.weights)

    @property
    def result(self) -> RESULTS:
        """An [`eqx_bilevel.RESULTS`][]: that of the first window that failed. Those
        after it start from nothing that is of use.
        """
        failed = self.solutions.result != RESULTS.successful
        return self.window(jnp.argmax(failed)).result

    @property
    def stats(self) -> dict[str, PyTree]:
        """The statistics of all windows, as in [`eqx_bilevel.Solution`][]."""
        return self.solutions.stats

    def window(self, index: int | Int[Array, ""]) -> Solution:
        """The solution in one of the windows."""
        at = lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf
        return jax.tree.map(at, self.solutions)

    def d(self, *axes: int) -> Callable:
        """A partial derivative, as in [`eqx_bilevel.Solution`][]."""
        return lambda x: self._map(lambda solution, x: solution.d(*axes)(x), x)

    def apply(self, operator: Callable, x: Float[ArrayLike, "*n d"]) -> PyTree[Array]:
        """Applies an operator to the solution, as in [`eqx_bilevel.Solution`][]."""
        operator = function_as_pytree(operator)
        return self._map(lambda solution, x: solution.apply(operator, x), x)

    def std(
        self, x: Float[ArrayLike, "*n d"], operator: Callable | None = None
    ) -> PyTree[Float[Array, "*n"]]:
        """Posterior standard deviations, as in [`eqx_bilevel.Solution`][]. They include
        what the windows before have left open.
        """
        operator = function_as_pytree(operator)
        return self._map(lambda solution, x: solution.std(x, operator), x)

    def _map(self, fn: Callable, x: Float[ArrayLike, "*n d"]) -> PyTree[Array]:
        x = jnp.asarray(x)
        points = self.solutions._problem.rows[0].points
        dim = points.shape[-1]
        if x.ndim not in (1, 2) or x.shape[-1] != dim:
            raise ValueError(
                f"`x` must be one point of shape ({dim},) or many of shape (n, {dim}), "
                f"got {x.shape}."
            )
        x = x.astype(points.dtype)
        fn = function_as_pytree(fn)
        return _at(self, fn, x) if x.ndim == 1 else _at_each(self, fn, x)


@jit
def _at(windows: Windows, fn: Callable, x: Float[Array, " d"]) -> PyTree[Array]:
    passed = (x[windows._axis] - windows.start) / windows.length
    last = windows.num_windows - 1
    index = jnp.clip(jnp.floor(passed), 0, last).astype(int)
    return fn(windows.window(index), x)


@jit
def _at_each(windows: Windows, fn: Callable, x: Float[Array, "n d"]) -> PyTree[Array]:
    # One by one: at many points together there would be as many copies of factors.
    return jax.lax.map(lambda x: _at(windows, fn, x), x)


def solve_windows(
    prior: GaussianProcess | Mapping[str, GaussianProcess],
    conditions: Sequence[Condition],
    solver: GaussNewton = GaussNewton(),
    *,
    initial_condition: str,
    num_windows: int,
    length: float | Float[Array, ""],
    axis: int = 0,
    adjoint: optx.AbstractAdjoint = FixedPointAdjoint(),
    max_steps: int = 100,
    throw: bool = True,
) -> Windows:
    """Solves the inner problem over a long time, in windows of equal length. Each
    starts from the one before: from what that one says of the initial condition's
    operator at its end, with the posterior covariance of that as noise.

    What is stated is the first window. In the others the points of all conditions are
    moved in time, and nothing else: operators, targets that are functions, kernel and
    mean are given the true time. Targets that are numbers are the same in each window.

    All windows are compiled as one `jax.lax.scan`, and are differentiable like
    [`eqx_bilevel.solve`][]. With $M$ conditions each keeps a factor of $M^2$ numbers.

    **Arguments:**

    - `prior`, `conditions`, `solver`: As for [`eqx_bilevel.solve`][]; but not with an
        [`eqx_bilevel.SparseCholesky`][]. There is no `initial`: the inner solve
        of each window starts at the solution of the last.

    The remaining arguments are keyword-only.

    - `initial_condition`: The name of the condition at the start. Its operator reads
        all that determines the future: the values, and with second derivatives in time
        `[u.value, u.d(0)]`. Its target, noise or nugget are those of the first window.
    - `num_windows`: How many windows to solve.
    - `length`: How long each of them is. Points are not later than that.
    - `axis`: Which coordinate is the time.
    - `adjoint`, `max_steps`: As for [`eqx_bilevel.solve`][], in each window.
    - `throw`: If a window fails, whether to raise an error, or to return windows whose
        `result` says what happened.

    **Returns:**

    [`eqx_bilevel.Windows`][].

    **Raises:**

    As [`eqx_bilevel.solve`][]; and a `ValueError` if there is no such initial
    condition, if its points are at several times or have a `quadrature`, if others are
    not in the window, and if `length` is not positive or `axis` not a dimension.
    """
    check_solver(solver, adjoint)
    check_num_steps(max_steps, "max_steps")
    check_num_steps(num_windows, "num_windows")
    if isinstance(solver.linear_solver, SparseCholesky):
        raise ValueError(
            "`solve_windows` needs the covariance between windows, which a "
            "`SparseCholesky` has not. Use an `eqx_bilevel.MatrixFree` or a dense "
            "`linear_solver`."
        )
    prior, conditions = checked(prior, conditions)
    found, _ = find_condition(conditions, initial_condition, "`initial_condition`")
    position = [c is found for c in conditions].index(True)
    if found.quadrature is not None:
        raise ValueError("The initial condition must be at points: no `quadrature`.")
    dtype = found.points.dtype
    length = _checked_length(length, dtype)
    dim = found.points.shape[1]
    if not (isinstance(axis, int) and 0 <= axis < dim):
        raise ValueError(f"`axis` must be a dimension below {dim}, got {axis}.")
    _check_times(conditions, position, length, axis)
    with free_cores(conditions, compiling=False):
        return _solve_windows(
            prior,
            conditions,
            position,
            solver,
            adjoint,
            num_windows,
            length,
            axis,
            max_steps,
            throw,
        )


def _checked_length(length: Any, dtype) -> Float[Array, ""]:
    if jnp.ndim(length) != 0 or (is_concrete(length) and not 0 < length < math.inf):
        raise ValueError(f"`length` must be a finite positive number, got {length}.")
    return jnp.asarray(length, dtype)


def _check_times(conditions, position: int, length, axis: int) -> None:
    if not all(map(is_concrete, [length, *[c.points for c in conditions]])):
        return
    times = [np.asarray(c.points)[:, axis] for c in conditions]
    start, size = times[position][0], float(length)
    if np.any(times[position] != start):
        raise ValueError(
            "All points of the initial condition must have the same time, but theirs "
            f"are from {times[position].min():.6g} to {times[position].max():.6g}."
        )
    early, late = min(t.min() for t in times), max(t.max() for t in times)
    if early < start - 1e-6 * size or late > start + (1 + 1e-6) * size:
        raise ValueError(
            f"The first window is from {start:.6g} to {start + size:.6g}, but there "
            f"are points at times from {early:.6g} to {late:.6g}. What is stated is "
            "one window, of this `length`."
        )


class _Flat(eqx.Module):
    # What an operator returns, as one vector.
    operator: Callable

    def __call__(self, u, x):
        leaves = jax.tree.leaves(self.operator(u, x))
        return jnp.concatenate([jnp.reshape(leaf, -1) for leaf in leaves])


class _Known(eqx.Module):
    # At the start of a window, of what the initial condition reads at its points.
    values: Float[Array, "n q"]
    covariance: Float[Array, "nq nq"]


@jit
def _solve_windows(
    prior,
    conditions,
    position,
    solver,
    adjoint,
    num_windows,
    length,
    axis,
    max_steps,
    throw,
):
    problem, fault = sanitised(*unwrap((prior, conditions)))
    known = _as_stated(problem, position)
    weight = unwrap(conditions[position].weight)
    statics = []

    def step(carry, passed):
        known, z = carry
        covariance = known.covariance if weight is None else weight * known.covariance
        stated = [_moved(c, passed, axis) for c in conditions]
        stated[position] = eqx.tree_at(
            lambda c: (c.operator, c.target, c.noise, c.nugget),
            stated[position],
            (_Flat(stated[position].operator), known.values, covariance, None),
            is_leaf=lambda x: x is None,
        )
        problem, own_fault = sanitised(*unwrap((prior, stated)))
        anew = (passed == 0) | jnp.invert(all_finite(z))
        solution = solve_problem(
            prior,
            stated,
            problem,
            RESULTS.where(fault != RESULTS.successful, fault, own_fault),
            solver,
            adjoint,
            without_gradient(jnp.where(anew, prior_z(problem), z)),
            anew,
            # Also if all variances are given: those from before have rounding errors.
            jnp.asarray(solver.system.smallest_nugget(problem), problem.dtype),
            jnp.asarray(max_steps),
        )
        arrays, static = eqx.partition(solution, eqx.is_array)
        statics.append(static)
        end = _moved(stated[position], length, axis)
        # The next window is about as far from this one as this is from the last.
        return (_read(solution, end), without_gradient(solution._z)), arrays

    start = known, prior_z(problem)
    passed = jnp.arange(num_windows, dtype=length.dtype) * length
    _, arrays = jax.lax.scan(step, start, passed)
    solutions = eqx.combine(arrays, statics[0])
    begin = conditions[position].points[0, axis]
    windows = Windows(solutions, begin, length, axis)
    if throw:
        result = windows.result
        windows = result.error_if(windows, result != RESULTS.successful)
    return windows


def _moved(condition: Condition, time, axis: int) -> Condition:
    points = condition.points
    moved = points.at[:, axis].add(time)
    return eqx.tree_at(lambda c: c.points, condition, moved)


def _as_stated(problem: Problem, position: int) -> _Known:
    # Before there is any other window. Without noise or nugget there is no variance,
    # and jitter is added, as it is to all conditions without.
    (rows,) = [r for r in problem.rows if r.position == position]
    size, zero = rows.target.size, jnp.zeros((), problem.dtype)
    weighed = noise(Problem(problem.kernels, (rows,)), zero)
    nothing = jnp.zeros((size, size), problem.dtype)
    return _Known(rows.target, weighed.added_to(nothing))


def _read(solution: Solution, at: Condition) -> _Known:
    operator = unwrap(at.operator)
    values = solution.apply(operator, at.points)
    covariance = solution._covariance([solution._block(operator, at.points)])
    return _Known(values, _positive(covariance))


@jax.custom_jvp
def _positive(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    # Without its negative eigenvalues. They are rounding errors, but grow from window
    # to window where the prior says as little.
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.maximum(values, 0)[None, :]) @ vectors.T


@_positive.defjvp
def _(primals, tangents):
    # Not by the eigenvectors' derivatives, which are infinite where values are equal.
    # By the divided differences of max(x, 0) (Daleckii and Krein).
    values, vectors = jnp.linalg.eigh(primals[0])
    positive = jnp.maximum(values, 0)
    gap = values[:, None] - values[None, :]
    kept = (values > 0).astype(values.dtype)
    both = 0.5 * (kept[:, None] + kept[None, :])
    differ = kept[:, None] != kept[None, :]
    slope = (positive[:, None] - positive[None, :]) / jnp.where(differ, gap, 1)
    slope = jnp.where(differ, slope, both)
    change = vectors @ (slope * (vectors.T @ tangents[0] @ vectors)) @ vectors.T
    return (vectors * positive[None, :]) @ vectors.T, change
