"""Truncated Taylor arithmetic: all mixed derivatives of a function of a pair of points
at once, from one pass through what it computes.

A kernel is traced to its primitive operations on numbers, and these act on numbers
together with their derivatives. Most of these vanish, since most of a kernel depends on
one point only or on differences, and they are never formed: what is left is close to
what one would write by hand.
"""

import contextlib
import functools as ft
import itertools as it
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._jets import Index


# Derivative a in the first point and b in the second.
Key = tuple[Index, Index]


class Unsupported(Exception):
    # Something that must be differentiated automatically instead.
    pass


def closure(indices: Sequence[Index]) -> tuple[Index, ...]:
    # All indices below some of the given ones, lower ones first.
    below = lambda index: it.product(*[range(n + 1) for n in index])
    found = {lower for index in indices for lower in below(index)}
    return tuple(sorted(found, key=lambda index: (sum(index), index)))


def order(key: Key) -> int:
    return sum(key[0]) + sum(key[1])


def _plus(one: Key, two: Key) -> Key:
    return tuple(tuple(map(sum, zip(a, b))) for a, b in zip(one, two))  # pyright: ignore


def _minus(one: Key, two: Key) -> Key:
    return tuple(tuple(m - n for m, n in zip(a, b)) for a, b in zip(one, two))  # pyright: ignore


def _nonnegative(key: Key) -> bool:
    return min(key[0] + key[1]) >= 0


def _binomial(key: Key, part: Key) -> int:
    return math.prod(math.comb(m, n) for a, b in zip(key, part) for m, n in zip(a, b))


class Scope:
    # Which derivatives are kept, and how much work may go into them.

    def __init__(self, left: Sequence[Index], right: Sequence[Index], budget: int):
        lefts, rights = closure(left), closure(right)
        self.keys = frozenset(it.product(lefts, rights))
        self.zero: Key = (lefts[0], rights[0])
        self.budget = budget

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise Unsupported


class Series:
    # A number and its derivatives. Those that are not there are zero.

    def __init__(self, scope: Scope, terms: Mapping[Key, Any]):
        self.scope = scope
        self.terms = dict(terms)

    @property
    def value(self):
        return self.terms[self.scope.zero]

    @property
    def rest(self) -> dict[Key, Any]:
        return {k: v for k, v in self.terms.items() if k != self.scope.zero}

    @property
    def order(self) -> int:
        # The largest order of a derivative that can come out of a function of this.
        reached = {self.scope.zero}
        while True:
            sums = {_plus(k, r) for k in self.rest for r in reached}
            grown = reached | (sums & self.scope.keys)
            if grown == reached:
                return max(map(order, reached))
            reached = grown

    def map(self, fn: Callable) -> "Series":
        self.scope.spend(len(self.terms))
        return Series(self.scope, {k: fn(v) for k, v in self.terms.items()})

    def __add__(self, other):
        terms = dict(self.terms)
        others = other.terms if isinstance(other, Series) else {self.scope.zero: other}
        self.scope.spend(len(others))
        for key, value in others.items():
            terms[key] = terms[key] + value if key in terms else value
        return Series(self.scope, terms)

    def __neg__(self):
        return self.map(lambda v: -v)

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        if not isinstance(other, Series):
            return self.map(lambda v: v * other)
        terms: dict[Key, Any] = {}
        for (k, v), (l, w) in it.product(self.terms.items(), other.terms.items()):
            key = _plus(k, l)
            if key in self.scope.keys:
                term = _times(_binomial(key, k), v * w)
                terms[key] = terms[key] + term if key in terms else term
                self.scope.spend(1)
        return Series(self.scope, terms)

    __radd__, __rmul__ = __add__, __mul__

    def compose(self, chain: Sequence[Any]) -> "Series":
        # phi of this, where `chain` has phi and its derivatives at the value. Since
        #   d_i phi^(n)(f) = phi^(n+1)(f) d_i f,
        # the derivatives of each phi^(n)(f) follow from those of the next, by Leibniz.
        known: dict[tuple[int, Key], Any] = {}
        rest = self.rest

        def derivative(n: int, key: Key):
            if key == self.scope.zero:
                return chain[n]
            if (n, key) not in known:
                known[n, key] = total(n, key)
            return known[n, key]

        def total(n: int, key: Key):
            unit = _first(key)
            lower = _minus(key, unit)
            out = None
            for part, value in rest.items():
                left = _minus(key, part)
                # The derivative in the first direction is in `part`.
                possible = _nonnegative(left) and _nonnegative(_minus(part, unit))
                inner = derivative(n + 1, left) if possible else None
                if inner is not None:
                    term = _times(_binomial(lower, left), inner * value)
                    out = term if out is None else out + term
                    self.scope.spend(1)
            return out

        terms = {key: derivative(0, key) for key in self.scope.keys}
        return Series(self.scope, {k: v for k, v in terms.items() if v is not None})


def _times(count: int, value):
    return value if count == 1 else count * value


def _first(key: Key) -> Key:
    # One derivative in the first direction that there is.
    flat = key[0] + key[1]
    first = next(i for i, n in enumerate(flat) if n > 0)
    unit = tuple(int(i == first) for i in range(len(flat)))
    return unit[: len(key[0])], unit[len(key[0]) :]


#
# Functions of a number: their derivatives at a value
#


def _exp(x, n: int):
    return [jnp.exp(x)] * (n + 1)


def _log(x, n: int):
    return [jnp.log(x), *_power(1 / x, x, -1, n - 1)]


def _power(value, x, exponent, n: int) -> list:
    # Of c x^e, where `value` is that.
    out = [value]
    if n > 0:
        inverse = 1 / x
        for i in range(n):
            out.append((exponent - i) * inverse * out[-1])
    return out[: n + 1]


def _reciprocal(x, n: int):
    return _power(1 / x, x, -1, n)


def _sine(x, n: int):
    cycle = [jnp.sin(x), jnp.cos(x), -jnp.sin(x), -jnp.cos(x)]
    return [cycle[i % 4] for i in range(n + 1)]


def _cosine(x, n: int):
    return _sine(x, n + 1)[1:]


def _automatic(fn: Callable, x, n: int):
    out = []
    for _ in range(n + 1):
        out.append(fn(x))
        fn = lambda x, fn=fn: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]
    return out


_CHAINS: dict[str, Callable] = {
    "exp": _exp,
    "log": _log,
    "sqrt": lambda x, n: _power(jnp.sqrt(x), x, 0.5, n),
    "rsqrt": lambda x, n: _power(1 / jnp.sqrt(x), x, -0.5, n),
    "sin": _sine,
    "cos": _cosine,
}


def _apply(fn: Callable[[Any, int], list], f):
    return f.compose(fn(f.value, f.order))


#
# Tracing
#


def propagate(fn: Callable, inputs: Sequence[np.ndarray], like: Sequence[Array]):
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
    positions, numbers = [], []
    for x in operands:
        if not _is_active(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer):
            positions.append(x)  # Where to.
            continue
        x = _numbers(x)
        count = np.arange(x.size, dtype=np.int32).reshape(x.shape)
        positions.append(count + len(numbers))
        numbers.extend(x.reshape(-1))
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
    position = next(i for i, x in enumerate(operands) if _is_active(x))
    shape = np.shape(operands[position])

    def fn(x):
        rest = list(operands)
        rest[position] = jnp.reshape(x, shape)
        (out,) = _plainly(eqn, rest)
        return jnp.reshape(out, ())

    out = np.empty(eqn.outvars[0].aval.shape, object)
    f = operands[position].reshape(-1)[0]
    if isinstance(f, Series):
        f = _apply(lambda x, n: _automatic(fn, x, n), f)
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
    plain = lambda *v: eqn.primitive.bind(*v, **params)
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
        inverse = _apply(_reciprocal, y)
        return inverse * x
    if name == "integer_pow" and params["y"] == 2:
        return x * x
    if name == "integer_pow":
        return _apply(lambda v, n: _integer_power(v, params["y"], n), x)
    if name == "pow" and not active[1]:
        return _apply(lambda v, n: _power(plain(v, y), v, y, n), x)
    if name == "pow":
        logarithm = _apply(_log, x) if isinstance(x, Series) else jnp.log(x)
        return _apply(_exp, y * logarithm)
    if name == "select_n":
        return _select(values[0], operands[1:])
    if name in ("max", "min"):
        smaller = values[0] < values[1]
        first_last = [y, x] if name == "min" else [x, y]
        return _select(smaller, first_last)
    if name in ("floor", "ceil", "round", "sign", "stop_gradient"):
        return plain(*values)
    if name == "abs":
        return x * jnp.sign(x.value)
    if name == "convert_element_type":
        return x.map(plain)
    if len(operands) == 1 and name in _CHAINS:
        return _apply(_CHAINS[name], x)
    if len(operands) == 1 and name in _AUTOMATIC:
        return _apply(lambda v, n: _automatic(plain, v, n), x)
    raise Unsupported(name)


_AUTOMATIC = (
    *("tanh", "logistic", "log1p", "expm1", "erf", "erfc", "erf_inv", "cbrt", "tan"),
    *("sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos", "atan"),
    *("lgamma", "digamma", "exp2"),
)


def _integer_power(x, exponent: int, n: int) -> list:
    # Not by division, which fails at zero.
    out, factor = [], 1
    for i in range(n + 1):
        left = exponent - i
        zero = exponent >= 0 and left < 0
        out.append(jnp.zeros_like(x) if zero else factor * jax.lax.integer_pow(x, left))
        factor = factor * left
    return out


def _select(which, cases: list):
    active = [c for c in cases if isinstance(c, Series)]
    if not active:
        return jax.lax.select_n(which, *cases)
    scope = active[0].scope
    terms = [c.terms if isinstance(c, Series) else {scope.zero: c} for c in cases]
    zero = jnp.zeros_like(active[0].value)
    keys = set().union(*terms)
    pick = lambda k: jax.lax.select_n(
        which, *[jnp.asarray(t.get(k, zero), zero.dtype) for t in terms]
    )
    return Series(scope, {k: pick(k) for k in keys})
