"""Operators are traced: which derivatives they ask for, and which enter nonlinearly."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Shaped


# How often to differentiate along each dimension: (0, 0) is the value, (2, 0) is the
# second derivative along the first dimension.
Index = tuple[int, ...]


def derivative(fn: Callable, index: Index) -> Callable:
    # Nested forward mode: `fn` may return any pytree.
    for axis, order in enumerate(index):
        for _ in range(order):
            fn = _along(fn, axis)
    return fn


def _along(fn: Callable, axis: int) -> Callable:
    def differentiated(x):
        direction = jnp.zeros_like(x).at[axis].set(1)
        return jax.jvp(fn, (x,), (direction,))[1]

    return differentiated


def derivatives(fn: Callable, indices: Sequence[Index], x: Array) -> dict[Index, Any]:
    # Several at once, with as few evaluations as possible: those along one dimension
    # only come together with the lower ones, and for all dimensions at a time.
    pure = [index for index in indices if sum(index) == max(index)]
    axes = sorted({axis for index in pure for axis, n in enumerate(index) if n > 0})
    order = max(map(sum, pure), default=0)
    mixed = {index: derivative(fn, index)(x) for index in indices if index not in pure}
    if order == 0:
        return {index: fn(x) for index in pure} | mixed

    def along(direction):
        g = lambda x: (fn(x),)
        for _ in range(order):
            g = _and_next(g, direction)
        return g(x)

    found = jax.vmap(along)(jnp.eye(x.size, dtype=x.dtype)[jnp.array(axes)])
    at = lambda index: axes.index(index.index(max(index))) if sum(index) else 0
    pick = lambda index: jax.tree.map(lambda leaf: leaf[at(index)], found[sum(index)])
    return {index: pick(index) for index in pure} | mixed


def _and_next(fn: Callable, direction: Array) -> Callable:
    # From a tuple of derivatives to one with one more.
    def longer(x):
        values, tangents = jax.jvp(fn, (x,), (direction,))
        return *values, tangents[-1]

    return longer


class Jet:
    """An unknown function at a point, as an operator sees it: its value and its partial
    derivatives there. What an operator uses is found out by tracing it, so nothing has
    to be declared.

    With one unknown, an operator is called as `operator(u, x)` with `u` a `Jet`. With
    several unknowns, `u` is a dictionary of them.
    """

    def __init__(self, get: Callable[[Index], Float[Array, ""]], dim: int):
        self._get = get
        self._dim = dim

    @property
    def value(self) -> Float[Array, ""]:
        """The value."""
        return self._get((0,) * self._dim)

    def d(self, *axes: int) -> Float[Array, ""]:
        """A partial derivative: `u.d(0)` is the first derivative along dimension 0,
        `u.d(1, 1)` the second along dimension 1, and `u.d(0, 1)` the mixed one.
        """
        index = [0] * self._dim
        for axis in axes:
            if not isinstance(axis, int | np.integer):
                raise ValueError(
                    "`u.d` takes one integer for each derivative, such as `u.d(0, 0)`, "
                    f"got {axis!r}."
                )
            if not -self._dim <= axis < self._dim:
                raise ValueError(
                    f"`u.d({', '.join(map(str, axes))})` asks for a derivative along "
                    f"dimension {axis}, but the points have {self._dim} dimension(s), "
                    f"counted from 0 to {self._dim - 1}."
                )
            index[axis] += 1
        return self._get(tuple(index))

    @property
    def grad(self) -> Float[Array, " d"]:
        """All first derivatives."""
        return jnp.stack([self.d(i) for i in range(self._dim)])

    @property
    def laplacian(self) -> Float[Array, ""]:
        """The sum of the second derivatives along each dimension."""
        terms = [self.d(i, i) for i in range(self._dim)]
        return sum(terms[1:], terms[0])

    @property
    def hessian(self) -> Float[Array, "d d"]:
        """All second derivatives."""
        dims = range(self._dim)
        return jnp.stack([jnp.stack([self.d(i, j) for j in dims]) for i in dims])

    def __getattr__(self, name):
        if name.startswith("_"):  # Python and JAX look for such.
            raise AttributeError(name)
        raise AttributeError(
            f"`u` has no `{name}`. An unknown function has `u.value`, `u.grad`, "
            "`u.laplacian` and `u.hessian`, and its partial derivatives are `u.d(0)`, "
            "`u.d(0, 1)` and so on, by the numbers of the coordinates of `x`."
        )

    def __call__(self, *args):
        raise _not_a("function")

    def __getitem__(self, name):
        raise TypeError(
            f"`u[{name!r}]` is for several unknown functions. There is one, and `u` is "
            "its jet: use `u.value`, `u.d(0)`, `u.grad`, ..."
        )

    def __repr__(self):
        return f"Jet(dim={self._dim})"


def _not_a(kind: str) -> TypeError:
    return TypeError(
        f"`u` is not a {kind} but what an unknown function and its derivatives are at "
        "`x`: use `u.value`, `u.d(0)`, `u.grad`, ..."
    )


def _no_number(self, *other):
    raise _not_a("number")


# Not in the class, where type checkers would take them for granted.
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Jet, f"__{_name}__", _no_number)
    setattr(Jet, f"__r{_name}__", _no_number)
for _name in ("neg", "abs"):
    setattr(Jet, f"__{_name}__", _no_number)


@jtu.register_pytree_node_class
class _Jets(dict):
    # What an operator gets if there are several unknowns.

    def tree_flatten(self):
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names, jets):
        return dict(zip(names, jets))

    def __missing__(self, name):
        raise KeyError(
            f"There is no unknown function {name!r}: the prior has {list(self)}."
        )

    def __getattr__(self, name):
        if hasattr(Jet, name):
            raise AttributeError(
                f"`u.{name}` is for one unknown function. Here `u` is a dictionary "
                f"with the jets of {list(self)}: use `u[{next(iter(self))!r}].{name}`."
            )
        raise AttributeError(name)


class Unknowns(NamedTuple):
    # Which unknowns an operator is given.
    names: tuple[str, ...]
    single: bool  # whether it gets the jet itself instead of a dictionary


class Trace(NamedTuple):
    # What an operator was found to do. Hashable, hence static.
    jets: tuple[tuple[str, Index], ...]  # (unknown, index), in a fixed order
    nonlinear: tuple[int, ...]  # positions in `jets`
    shapes: tuple[tuple[int, ...], ...]  # of the arrays that it returns

    @property
    def size(self) -> int:
        # How many scalars it returns.
        return sum(math.prod(shape) for shape in self.shapes)


def view(names: Sequence[str], single: bool, get: Callable, dim: int):
    # `get(name, index)` gives an entry of a jet.
    views = {
        name: Jet(lambda index, name=name: get(name, index), dim) for name in names
    }
    return views[names[0]] if single else _Jets(views)


def _ravel(out: Any, dtype) -> Float[Array, " q"]:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(out)]
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
        raise ValueError(
            "An operator returned complex numbers. Use one unknown for the real and "
            "one for the imaginary part, and return both residuals."
        )
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def evaluate(
    operator: Callable,
    unknowns: Unknowns,
    jets: Sequence[tuple[str, Index]],
    values: Any,
    x: Float[Array, " d"],
) -> Any:
    # What the operator returns where its jets have these values.
    table = {jet: values[i] for i, jet in enumerate(jets)}
    get = lambda name, index: table[name, index]
    return operator(view(unknowns.names, unknowns.single, get, x.shape[0]), x)


def residual(
    operator: Callable,
    unknowns: Unknowns,
    jets: Sequence[tuple[str, Index]],
    values: Sequence[Shaped[Array, ""]],
    x: Float[Array, " d"],
) -> Float[Array, " q"]:
    # Flattened, as a function of the numbers that make up its jets.
    return _ravel(evaluate(operator, unknowns, jets, values, x), x.dtype)


_WHAT_IS_CALLED = (
    "Note that `u.d` is called, `u.d(0)`, and that the others are not: `u.value`, "
    "`u.laplacian`."
)


def trace(operator: Any, unknowns: Unknowns, dim: int, dtype, name: str) -> Trace:
    # `name` is the condition's, for messages.
    if not callable(operator):
        raise ValueError(
            f"The operator of condition {name!r} must be a callable `(u, x)`, but is "
            f"a {type(operator).__name__}."
        )
    asked = {}

    def record(unknown, index):
        asked[unknown, index] = None
        return jnp.zeros((), dtype)

    def run(x):
        out = operator(view(unknowns.names, unknowns.single, record, dim), x)
        if any(isinstance(leaf, Jet) for leaf in jax.tree.leaves(out)):
            raise ValueError(
                f"The operator of condition {name!r} returned the unknown itself. "
                "Return a number made from it, such as `u.value`."
            )
        if len(jax.tree.leaves(out)) == 0:
            raise ValueError(f"The operator of condition {name!r} returned nothing.")
        for leaf in jax.tree.leaves(out):
            if not eqx.is_array_like(leaf):
                raise ValueError(
                    f"The operator of condition {name!r} must return numbers, got a "
                    f"{type(leaf).__name__}. {_WHAT_IS_CALLED}"
                )
            if jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
                raise ValueError(
                    f"The operator of condition {name!r} must return what is to equal "
                    "the target, but it returned a truth value."
                )
        return [
            _ravel(leaf, dtype).reshape(jnp.shape(leaf))
            for leaf in jax.tree.leaves(out)
        ]

    point = jax.ShapeDtypeStruct((dim,), dtype)
    try:
        out = eqx.filter_eval_shape(run, point)
    except Exception as error:
        kind = (
            "a jet" if unknowns.single else f"a dictionary with keys {unknowns.names}"
        )
        error.add_note(
            f"This happened in the operator of condition {name!r}, which is called as "
            f"`operator(u, x)` with `u` {kind} and `x` of shape ({dim},)."
        )
        if "not callable" in str(error):
            error.add_note(_WHAT_IS_CALLED)
        raise
    if len(asked) == 0:
        raise ValueError(
            f"The operator of condition {name!r} does not depend on the unknown: it "
            "should use `u.value`, `u.d(...)`, `u.grad`, `u.laplacian` or `u.hessian`."
        )
    order = lambda jet: (unknowns.names.index(jet[0]), sum(jet[1]), jet[1])
    jets = tuple(sorted(asked, key=order))
    nonlinear = _nonlinear(operator, unknowns, jets, point)
    return Trace(jets, nonlinear, tuple(leaf.shape for leaf in out))


def _nonlinear(operator, unknowns, jets, point) -> tuple[int, ...]:
    # An entry of a jet enters nonlinearly if the operator's derivative, with respect to
    # whatever entry, depends on it; or if it goes into something piecewise constant.
    def derivatives(x, *values):
        out = []
        for i, value in enumerate(values):

            def along(v, i=i):
                rest = [*values[:i], v, *values[i + 1 :]]
                return residual(operator, unknowns, jets, rest, x)

            out.append(jax.jvp(along, (value,), (jnp.ones_like(value),))[1])
        return out

    scalar = jax.ShapeDtypeStruct((), point.dtype)
    jaxpr = jax.make_jaxpr(derivatives)(point, *[scalar] * len(jets)).jaxpr
    inputs = [frozenset(), *[frozenset([i]) for i in range(len(jets))]]
    jumps: set[int] = set()
    return tuple(sorted(jumps.union(*_dependences(jaxpr, inputs, jumps))))


def dependences(
    operator: Callable, unknowns: Unknowns, trace: Trace, x: Float[Array, " d"]
) -> tuple[frozenset[int], ...]:
    # On which entries of its jets each scalar that an operator returns may depend:
    # those of one array on the same. Whatever the values are.
    def leaves(x, *values):
        out = evaluate(operator, unknowns, trace.jets, values, x)
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(out)]

    scalars = [jnp.zeros((), x.dtype)] * len(trace.jets)
    jaxpr = jax.make_jaxpr(leaves)(x, *scalars).jaxpr
    inputs = [frozenset(), *[frozenset([i]) for i in range(len(trace.jets))]]
    each = zip(_dependences(jaxpr, inputs, set()), trace.shapes)
    return tuple(used for used, shape in each for _ in range(math.prod(shape)))


# Primitives that just call their `jaxpr` on their operands.
_CALLS = ("jit", "pjit", "closed_call", "remat", "remat2", "checkpoint")
# Those whose derivative may be zero although they are not constant. So are all that
# return integers or booleans.
_JUMPS = ("sign", "floor", "ceil", "round", "stop_gradient", "cond", "scan", "while")


def _dependences(jaxpr, inputs: Sequence[frozenset], jumps: set) -> list[frozenset]:
    # On which inputs each output of a jaxpr may depend. Never too few: whatever is not
    # understood is taken to depend on all of its operands. `jumps` collects what is
    # given to the primitives whose derivatives tell nothing.
    nothing = frozenset()
    found = dict(zip(jaxpr.invars, inputs))
    read = lambda v: nothing if isinstance(v, jex.Literal) else found.get(v, nothing)
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in _CALLS else None
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(operands):
            outs = _dependences(inner, operands, jumps)
        else:
            outs = [nothing.union(*operands)] * len(eqn.outvars)
            smooth = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
            if eqn.primitive.name in _JUMPS or not smooth:
                jumps.update(*operands)
        found.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def linearise(
    operator: Callable,
    unknowns: Unknowns,
    trace: Trace,
    z: Float[Array, " k"],
    x: Float[Array, " d"],
) -> tuple[Float[Array, "q p"], Float[Array, " q"]]:
    # `jacobian, offset` with `operator = jacobian @ jets - offset` to first order
    # around those jets whose nonlinear entries are `z`. Neither depends on the other
    # entries, so these are put to zero.
    values = jnp.zeros(len(trace.jets), x.dtype)
    values = values.at[jnp.array(trace.nonlinear, int)].set(z)
    fn = lambda v: residual(operator, unknowns, trace.jets, list(v), x)
    jacobian = jax.jacfwd(fn)(values)
    return jacobian, jacobian @ values - fn(values)


def nonlinear_part(
    operator: Callable,
    unknowns: Unknowns,
    trace: Trace,
    z: Float[Array, " k"],
    x: Float[Array, " d"],
) -> Float[Array, " q"]:
    # The operator where all entries that enter linearly are zero. The operator itself
    # is this plus a part that is linear in those entries and independent of `z`.
    values = jnp.zeros(len(trace.jets), x.dtype)
    values = values.at[jnp.array(trace.nonlinear, int)].set(z)
    return residual(operator, unknowns, trace.jets, list(values), x)
