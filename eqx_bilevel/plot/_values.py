"""The numbers that are drawn."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._learn import Learned
from .._problem import names_of
from .._solution import Solution
from .._uncertainty import HyperparameterPosterior


# Of each unknown, by its name.
Values = dict[str, np.ndarray]


def solution_of(found: Any) -> Any:
    has_solution = isinstance(found, Learned | HyperparameterPosterior)
    return found.solution if has_solution else found


def values_of(fn: Any, points: Array, argument: str) -> Values:
    # Of a solution, or of one function or several. `argument` is what it is called in
    # an error.
    fn = solution_of(fn)
    if isinstance(fn, Solution):
        return _named(fn, _in_chunks(fn, points))
    if isinstance(fn, Mapping):
        each = {k: values_of(f, points, f"{argument}[{k!r}]") for k, f in fn.items()}
        return {name: _only(values) for name, values in each.items()}
    if not callable(fn):
        raise ValueError(
            f"`{argument}` must be an `eqx_bilevel.Solution` or a function of a point, "
            f"got a {type(fn).__name__}."
        )
    out = _in_chunks(lambda x: _mapped(fn, x, argument), points)
    out = out if isinstance(out, Mapping) else {"": out}
    for value in out.values():
        if np.size(value) != len(points):
            raise ValueError(
                f"`{argument}` must return one number for a point, or a dictionary of "
                f"them, got an array of shape {np.shape(value)[1:]}."
            )
    return {name: np.reshape(value, len(points)) for name, value in out.items()}


def stds_of(found: Any, points: Array) -> Values:
    found = found.solution if isinstance(found, Learned) else found
    if isinstance(found, HyperparameterPosterior):
        # Not in chunks, since each call solves for derivatives again.
        return _named(found.solution, found.std(points))
    if isinstance(found, Solution):
        return _named(found, _in_chunks(found.std, points))
    raise ValueError(
        "Standard deviations are those of an `eqx_bilevel.Solution` or of what "
        f"`eqx_bilevel.laplace` returns, got a {type(found).__name__}."
    )


def choose(values: Values, unknown: str | None) -> Values:
    if unknown is None:
        return values
    if unknown not in values:
        raise ValueError(f"`unknown` must be one of {list(values)}, got {unknown!r}.")
    return {unknown: values[unknown]}


def check_unknown(found: Any, unknown: str | None) -> None:
    # Before anything is computed, if what there is can be told then.
    found = solution_of(found)
    if isinstance(found, Solution):
        names = names_of(found.prior).names
        choose(dict.fromkeys(names, np.zeros(0)), unknown)


def pairs(values: Values, exact: Values, unknown: str | None) -> list[tuple]:
    # Names, values and exact values. These may be known for some unknowns only.
    values = choose(values, unknown)
    if len(values) == 1 and len(exact) == 1:
        return [(*next(iter(values.items())), _only(exact))]
    both = [(name, v, exact[name]) for name, v in values.items() if name in exact]
    if len(both) == 0:
        given = "one function" if "" in exact else f"the keys {list(exact)}"
        raise ValueError(
            "`exact` must be a dictionary with some of the unknowns that are drawn, "
            f"{list(values)}, got {given}."
        )
    return both


def _only(values: Values) -> np.ndarray:
    (value,) = values.values()
    return value


def _named(solution: Solution, out: Any) -> Values:
    names = names_of(solution.prior)
    out = {names.names[0]: out} if names.single else out
    return {name: np.asarray(out[name]) for name in names.names}


# Points at a time: more would not be faster, and need more memory.
_CHUNK = 2500


def _in_chunks(fn: Callable, points: Array) -> Any:
    if len(points) <= _CHUNK:
        return jax.tree.map(np.asarray, fn(points))
    # All of the same size, to compile once.
    num_missing = -len(points) % _CHUNK
    padded = jnp.concatenate([points, jnp.repeat(points[-1:], num_missing, axis=0)])
    chunks = [fn(x) for x in jnp.split(padded, len(padded) // _CHUNK)]
    joined = lambda *arrays: np.concatenate(arrays)[: len(points)]
    return jax.tree.map(joined, *chunks)


def _mapped(fn: Callable, points: Array, argument: str) -> Any:
    # A function of one point, as targets are, at many.
    try:
        return jax.vmap(fn)(points)
    except jax.errors.JAXTypeError:  # It is not written in JAX.
        each = [fn(x) for x in np.asarray(points)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must be a function of one point, here an array of shape "
            f"{points.shape[1:]}. Called with one, it raised: {error}"
        ) from error
