"""Truncated Taylor arithmetic: all mixed derivatives of a function of a pair of points
at once, from one pass through what it computes.

A kernel is traced to its primitive operations on numbers, and these act on numbers
together with their derivatives. Most of these vanish, since most of a kernel depends on
one point only or on differences, and they are never formed: what is left is close to
what one would write by hand.
"""

import itertools as it
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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

    def __init__(
        self,
        left: Sequence[Index],
        right: Sequence[Index],
        budget: int | float = math.inf,
    ):
        lefts, rights = closure(left), closure(right)
        self.keys = frozenset(it.product(lefts, rights))
        self.zero: Key = (lefts[0], rights[0])
        self.budget = budget

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise Unsupported


class Series:
    # A number and its derivatives. Those that are not there are zero. Each is a Python
    # number, or an array: then operations are meant for each of its elements.

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
            _accumulate(terms, key, value)
        return Series(self.scope, terms)

    def __neg__(self):
        return self.map(_negative)

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        if other is self:
            return self.square()
        if not isinstance(other, Series):
            return self.map(lambda v: _times(v, other))
        terms: dict[Key, Any] = {}
        for (k, v), (l, w) in it.product(self.terms.items(), other.terms.items()):
            key = _plus(k, l)
            if key in self.scope.keys:
                _accumulate(terms, key, _times(_binomial(key, k), _times(v, w)))
                self.scope.spend(1)
        return Series(self.scope, terms)

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> "Series":
        terms: dict[Key, Any] = {}
        ordered = list(self.terms.items())
        for i, (k, v) in enumerate(ordered):
            for l, w in ordered[i:]:
                key = _plus(k, l)
                if key in self.scope.keys:
                    count = _binomial(key, k) * (1 if k == l else 2)
                    _accumulate(terms, key, _times(count, _times(v, w)))
                    self.scope.spend(1)
        return Series(self.scope, terms)

    def _chain_rule(self, key: Key):
        # With f this number: (count, k, d) such that the derivative `key` of g(f) is
        # the sum of count * (derivative k of g'(f)) * d.
        unit = _first(key)
        lower = _minus(key, unit)
        for part, value in self.rest.items():
            left = _minus(key, part)
            # The derivative in the first direction is in `part`.
            if _nonnegative(left) and _nonnegative(_minus(part, unit)):
                yield _binomial(lower, left), left, value

    def _from_derivative(self, value, derivative: Callable) -> "Series":
        # g(f), given its value and what reads derivatives of g'(f) off a dictionary of
        # the lower ones of g(f).
        terms = {self.scope.zero: value}
        for key in sorted(self.scope.keys - {self.scope.zero}, key=order):
            for count, left, part in self._chain_rule(key):
                inner = derivative(terms, left)
                if inner is not None:
                    _accumulate(terms, key, _times(count, _times(inner, part)))
                    self.scope.spend(1)
        return Series(self.scope, terms)

    def exp(self) -> "Series":
        return self._from_derivative(jnp.exp(self.value), dict.get)

    def log(self) -> "Series":
        inverse = self.reciprocal().terms
        read = lambda terms, key: inverse.get(key)
        return self._from_derivative(jnp.log(self.value), read)

    def reciprocal(self) -> "Series":
        # All derivatives of (1 / f) f vanish.
        inverse = 1 / self.value
        terms = {self.scope.zero: inverse}
        for key in sorted(self.scope.keys - {self.scope.zero}, key=order):
            total: dict[Key, Any] = {}
            for part, value in self.rest.items():
                left = _minus(key, part)
                if _nonnegative(left) and left in terms:
                    product = _times(_binomial(key, part), _times(value, terms[left]))
                    _accumulate(total, key, product)
                    self.scope.spend(1)
            if total:
                terms[key] = _times(_negative(inverse), total[key])
        return Series(self.scope, terms)

    def compose(self, chain: Sequence[Any]) -> "Series":
        # phi of this, where `chain` has phi and its derivatives at the value.
        known: dict[tuple[int, Key], Any] = {}

        def derivative(n: int, key: Key):
            # Of phi^(n).
            if key == self.scope.zero:
                return chain[n]
            if (n, key) not in known:
                total: dict[Key, Any] = {}
                for count, left, part in self._chain_rule(key):
                    inner = derivative(n + 1, left)
                    if inner is not None:
                        product = _times(count, _times(inner, part))
                        _accumulate(total, key, product)
                        self.scope.spend(1)
                known[n, key] = total.get(key)
            return known[n, key]

        terms = {key: derivative(0, key) for key in self.scope.keys}
        return Series(self.scope, {k: v for k, v in terms.items() if v is not None})


def _accumulate(terms: dict, key: Key, value) -> None:
    terms[key] = _add(terms[key], value) if key in terms else value


# Operations of `lax` are traced faster than those of `jax.numpy`, each of which is a
# `jit` of its own. And many derivatives are known to be 1.


def _add(x, y):
    return jax.lax.add(x, y) if _alike(x, y) else x + y


def _times(x, y):
    for one, other in ((x, y), (y, x)):
        if isinstance(one, int | float) and abs(one) == 1:
            return other if one == 1 else _negative(other)
    return jax.lax.mul(x, y) if _alike(x, y) else x * y


def _negative(x):
    return jax.lax.neg(x) if isinstance(x, Array) else -x


def _alike(x, y) -> bool:
    arrays = isinstance(x, Array) and isinstance(y, Array)
    return arrays and x.shape == y.shape and x.dtype == y.dtype


def _first(key: Key) -> Key:
    # One derivative in the first direction that there is.
    flat = key[0] + key[1]
    first = next(i for i, n in enumerate(flat) if n > 0)
    unit = tuple(int(i == first) for i in range(len(flat)))
    return unit[: len(key[0])], unit[len(key[0]) :]


#
# Functions of a number: their derivatives at a value
#


def _root(value, x, exponent, n: int) -> list:
    # Of x^e, where `value` is that, and x is not zero.
    out = [value]
    if n > 0:
        inverse = 1 / x
        for i in range(n):
            out.append((exponent - i) * inverse * out[-1])
    return out


def power(x, exponent, n: int) -> list:
    # Not by division, which fails at zero.
    traced = isinstance(exponent, jax.core.Tracer)  # pyright: ignore
    if not traced and jnp.ndim(exponent) == 0 and float(exponent).is_integer():
        return integer_power(x, int(exponent), n)
    out, factor = [], 1
    for _ in range(n + 1):
        out.append(factor * x**exponent)
        # The factor is zero if the exponent was: then it may be anything.
        factor, exponent = factor * exponent, jnp.where(exponent == 0, 1, exponent - 1)
    return out


def _sine(x, n: int):
    cycle = [jnp.sin(x), jnp.cos(x), -jnp.sin(x), -jnp.cos(x)]
    return [cycle[i % 4] for i in range(n + 1)]


def _cosine(x, n: int):
    return _sine(x, n + 1)[1:]


def automatic(fn: Callable, x, n: int):
    out = []
    for _ in range(n + 1):
        out.append(fn(x))
        fn = lambda x, fn=fn: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]
    return out


def integer_power(x, exponent: int, n: int) -> list:
    # Not by division, which fails at zero.
    out, factor = [], 1
    for i in range(n + 1):
        left = exponent - i
        zero = exponent >= 0 and left < 0
        out.append(jnp.zeros_like(x) if zero else factor * jax.lax.integer_pow(x, left))
        factor = factor * left
    return out


CHAINS: dict[str, Callable] = {
    "sqrt": lambda x, n: _root(jnp.sqrt(x), x, 0.5, n),
    "rsqrt": lambda x, n: _root(1 / jnp.sqrt(x), x, -0.5, n),
    "sin": _sine,
    "cos": _cosine,
}


def apply(fn: Callable[[Any, int], list], f):
    return f.compose(fn(f.value, f.order))


def each(fn: Callable, ndim: int) -> Callable:
    # A function of scalars, of arrays element by element.
    for _ in range(ndim):
        fn = jax.vmap(fn)
    return fn
