"""Functions traced to their primitive operations, which then act on `Series`."""

import contextlib
import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._series import (
    apply,
    automatic,
    CHAINS,
    each,
    integer_power,
    power,
    Series,
    Unsupported,
)


def propagate(fn: Callable, inputs: Sequence[np.ndarray], like: Sequence[Any]):
    # `fn` of arrays, as many as there are inputs, to a number. Inputs are arrays of
    # `Series` and numbers, and `like` are arrays of their shapes.
    closed = jax.make_jaxpr(fn)(*like)
    (out,) = _interpret(closed.jaxpr, closed.consts, inputs)
    return _numbers(out).reshape(-1)[0]


def _interpret(jaxpr, consts, inputs) -> list:
    known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, inputs))
    read = lambda v: v.val if isinstance(v, jex.Literal) else known[v]
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if not any(map(_is_active, operands)):
            outs = _plainly(eqn, operands)
        else:
            outs = _step(eqn, operands)
        known.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _plainly(eqn, operands) -> Sequence[Array]:
    # One operation on arrays.
    params = eqn.primitive.get_bind_params(eqn.params)
    # Indices have to be known now: they are computed and not traced.
    known = not any(map(_is_traced, operands))
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        outs = eqn.primitive.bind(*operands, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _is_active(x) -> bool:
    # Whether it may have derivatives.
    return isinstance(x, np.ndarray) and x.dtype == object


def _numbers(x) -> np.ndarray:
    # Any array, as an array of numbers.
    if _is_active(x):
        return x
    out = np.empty(np.shape(x), object)
    for i in np.ndindex(out.shape):
        out[i] = x[i] if i else x
    return out


def _value(x):
    return x.value if isinstance(x, Series) else x


def _step(eqn, operands) -> list:
    name, params = eqn.primitive.name, eqn.params
    if name in ("pjit", "jit", "closed_call", "remat", "remat2", "checkpoint"):
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        consts = getattr(inner, "consts", ())
        return _interpret(getattr(inner, "jaxpr", inner), consts, operands)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return [_custom(eqn, operands)]
    if name in _MOVES:
        return _move(eqn, operands)
    if name == "reduce_sum":
        return [_reduce(operands[0], params["axes"], operator.add)]
    if name == "reduce_prod":
        return [_reduce(operands[0], params["axes"], _multiply)]
    if name == "dot_general":
        return [_dot(*operands, **params)]
    if name not in _ELEMENTWISE:
        raise Unsupported(name)
    shape = eqn.outvars[0].aval.shape
    elements = [np.broadcast_to(_numbers(x), shape) for x in operands]
    out = np.empty(shape, object)
    for i in np.ndindex(shape):
        out[i] = _element(eqn, [x[i] for x in elements])
    return [out]


# These do nothing but put numbers elsewhere.
_MOVES = (
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "copy_p",
    "dynamic_slice",
    "gather",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "stack",
    "transpose",
    "unstack",
)


def _move(eqn, operands) -> list[np.ndarray]:
    # Whatever it does to the numbers, it does to their positions.
    num = 1 if eqn.primitive.name in ("dynamic_slice", "gather") else len(operands)
    positions, numbers = [], []
    for x in map(_numbers, operands[:num]):
        count = np.arange(x.size, dtype=np.int32).reshape(x.shape)
        positions.append(count + np.int32(len(numbers)))
        numbers.extend(x.reshape(-1))
    where = operands[num:]
    if any(map(_is_active, where)):
        raise Unsupported(eqn.primitive.name)
    positions.extend(where)
    if any(map(_is_traced, positions)):
        raise Unsupported(eqn.primitive.name)
    outs = []
    for moved in map(np.asarray, _plainly(eqn, list(map(_constant, positions)))):
        out = np.empty(moved.shape, object)
        for i in np.ndindex(out.shape):
            if not 0 <= moved[i] < len(numbers):
                raise Unsupported(eqn.primitive.name)
            out[i] = numbers[moved[i]]
        outs.append(out)
    return outs


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)  # pyright: ignore


def _constant(x) -> Array:
    with jax.ensure_compile_time_eval():
        return jnp.asarray(x)


def _multiply(x, y):
    return x * y if isinstance(x, Series) else y * x


def _reduce(x: np.ndarray, axes, combine: Callable) -> np.ndarray:
    kept = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in kept)
    moved = np.transpose(x, (*kept, *axes)).reshape(*shape, -1)
    out = np.empty(shape, object)
    for i in np.ndindex(shape):
        out[i] = ft.reduce(combine, moved[i])
    return out


def _dot(x, y, *, dimension_numbers, **_) -> np.ndarray:
    (axes_x, axes_y), (batch, _) = dimension_numbers
    if batch:
        raise Unsupported
    x, y = _numbers(x), _numbers(y)
    free_x = [a for a in range(x.ndim) if a not in axes_x]
    free_y = [a for a in range(y.ndim) if a not in axes_y]
    shape_x, shape_y = [x.shape[a] for a in free_x], [y.shape[a] for a in free_y]
    x = np.transpose(x, (*free_x, *axes_x)).reshape(*shape_x, -1)
    y = np.transpose(y, (*free_y, *axes_y)).reshape(*shape_y, -1)
    out = np.empty((*shape_x, *shape_y), object)
    for i in np.ndindex(out.shape):
        a, b = x[i[: len(free_x)]], y[i[len(free_x) :]]
        out[i] = ft.reduce(operator.add, map(_multiply, a, b))
    return out


def _custom(eqn, operands) -> np.ndarray:
    # A function of one number that comes with its own derivative.
    sizes = [np.size(x) for x in operands if _is_active(x)]
    single = len(eqn.outvars) == 1 and eqn.outvars[0].aval.size == 1
    if sizes != [1] or not single:
        raise Unsupported
    if eqn.primitive.name == "custom_vjp_call":  # For JAX to say what it thinks of it.
        raise Unsupported
    position = next(i for i, x in enumerate(operands) if _is_active(x))
    shape = np.shape(operands[position])

    def at_one(x):
        rest = list(operands)
        rest[position] = jnp.reshape(x, shape)
        (out,) = _plainly(eqn, rest)
        return jnp.reshape(out, ())

    fn = lambda x: each(at_one, jnp.ndim(x))(x)

    out = np.empty(eqn.outvars[0].aval.shape, object)
    f = operands[position].reshape(-1)[0]
    if isinstance(f, Series):
        f = apply(lambda x, n: automatic(fn, x, n), f)
    else:
        f = fn(f)
    out[(0,) * out.ndim] = f
    return out


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "is_finite")


def _element(eqn, operands: list):
    # One number of an operation that acts on each.
    name, params = eqn.primitive.name, eqn.params
    values = [_value(x) for x in operands]
    active = [isinstance(x, Series) for x in operands]
    plain = lambda *v: eqn.primitive.bind(*_broadcast(v), **params)
    if not any(active) or name in _COMPARISONS:
        return plain(*values)
    x, y = operands[0], operands[-1]
    if name in ("add", "add_any"):
        return x + y
    if name == "sub":
        return x - y
    if name == "neg":
        return -x
    if name == "mul":
        return _multiply(x, y)
    if name == "square":
        return x * x
    if name == "div":
        if not isinstance(y, Series):
            return x * (1 / y)
        inverse = y.reciprocal()
        return inverse * x
    if name == "integer_pow" and params["y"] == 2:
        return x * x
    if name == "integer_pow":
        return apply(lambda v, n: integer_power(v, params["y"], n), x)
    if name == "pow" and not active[1]:
        return apply(lambda v, n: power(v, y, n), x)
    if name == "pow":
        logarithm = x.log() if isinstance(x, Series) else jnp.log(x)
        return (y * logarithm).exp()
    if name == "select_n":
        return _select(values[0], operands[1:])
    if name in ("max", "min"):
        smaller = values[0] < values[1]
        first_last = [y, x] if name == "min" else [x, y]
        return _select(smaller, first_last)
    if name in ("floor", "ceil", "round", "sign", "stop_gradient"):
        return plain(*values)
    if name == "abs" and not jnp.iscomplexobj(x.value):
        # At zero as JAX does it, so that |x|^2 has the derivatives of x^2 there.
        return x * jnp.where(x.value >= 0, 1.0, -1.0).astype(x.value.dtype)
    if name == "convert_element_type":
        smooth = jnp.issubdtype(params["new_dtype"], jnp.inexact)
        return x.map(plain) if smooth else plain(x.value)
    if name == "exp":
        return x.exp()
    if name == "log":
        return x.log()
    if len(operands) == 1 and name in CHAINS:
        return apply(CHAINS[name], x)
    if len(operands) == 1 and name in _AUTOMATIC:
        return apply(lambda v, n: automatic(plain, v, n), x)
    raise Unsupported(name)


_AUTOMATIC = (
    *("tanh", "logistic", "log1p", "expm1", "erf", "erfc", "erf_inv", "cbrt", "tan"),
    *("sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos", "atan"),
    *("lgamma", "digamma", "exp2"),
)
# What `_element` may be asked for. There are others that keep the shape and are none.
_ELEMENTWISE = frozenset(
    (
        *_COMPARISONS,
        *CHAINS,
        *_AUTOMATIC,
        *("add", "add_any", "sub", "neg", "mul", "square", "div", "abs", "sign"),
        *("integer_pow", "pow", "exp", "log", "max", "min", "select_n"),
        *("floor", "ceil", "round", "stop_gradient", "convert_element_type"),
        *("and", "or", "not", "xor"),
    )
)


def _select(which, cases: list):
    active = [c for c in cases if isinstance(c, Series)]
    if not active:
        return jax.lax.select_n(*_broadcast([which, *cases]))
    scope = active[0].scope
    terms = [c.terms if isinstance(c, Series) else {scope.zero: c} for c in cases]
    zero = jnp.zeros_like(active[0].value)
    keys = set().union(*terms)
    get = lambda term, key: jnp.asarray(term.get(key, zero), zero.dtype)
    pick = lambda k: jax.lax.select_n(*_broadcast([which, *[get(t, k) for t in terms]]))
    return Series(scope, {k: pick(k) for k in keys})


def _broadcast(values: Sequence) -> Sequence:
    return jnp.broadcast_arrays(*values) if len(values) > 1 else values
