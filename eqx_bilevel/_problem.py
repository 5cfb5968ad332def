"""From priors and conditions to what one solve needs.

The conditions are stacked into `M` scalar ones. Those entries of the jets that enter
some operator nonlinearly are stacked into a vector `z` of size `N`. Everything is
relative to the prior mean `m`: the unknown is `v = u - m`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._condition import Condition, GaussianProcess, mean_function
from ._gram import Block, one_sides, variances
from ._jets import (
    derivative,
    Index,
    linearise as linearise_operator,
    Trace,
    trace as trace_operator,
    Unknowns,
)
from ._kernels import AbstractKernel, smoothness
from ._parameters import value_of


class Rows(eqx.Module):
    # One condition, ready to be imposed: `n` points, `q` scalars at each, `p` entries
    # in a jet of which `k` enter nonlinearly. With a quadrature, `N` sums over points.
    operator: Callable
    points: Float[Array, "n d"]
    target: Float[Array, "N q"]
    quadrature: Float[Array, " n"] | None
    mean: Float[Array, "n p"]  # the prior mean's jets
    sides: dict[str, Any]  # what the kernels compute of each point on its own
    variance: Float[Array, "..."]  # Gamma is this, and jitter times `scale`
    scale: Float[Array, ""]
    trace: Trace = eqx.field(static=True)
    unknowns: Unknowns = eqx.field(static=True)
    name: str = eqx.field(static=True)
    position: int = eqx.field(static=True)  # among what was stated

    @property
    def z_entries(self) -> Int[Array, " k"]:
        return jnp.array(self.trace.nonlinear, int)

    @property
    def only_read(self) -> bool:
        # Whether this is no condition, but only points where jets are wanted.
        return self.trace.size == 0

    @property
    def sum_over(self) -> int:
        return len(self.points) // len(self.target)

    def sums(self, values: Float[Array, "n q"]) -> Float[Array, "N q"]:
        # From what holds at points to what the targets are for.
        if self.quadrature is None:
            return values
        weighted = self.quadrature[:, None] * values
        return weighted.reshape(-1, self.sum_over, values.shape[1]).sum(axis=1)

    def at_points(self, weights: Float[Array, "N q"]) -> Float[Array, "n q"]:
        # The transpose of that.
        if self.quadrature is None:
            return weights
        return self.quadrature[:, None] * jnp.repeat(weights, self.sum_over, axis=0)

    @property
    def jets(self) -> Block:
        # The functionals that read all entries of its jets.
        return Block(self.points, None, self.trace.jets, self.sides)

    def block(self, jacobian: Float[Array, "n q p"]) -> Block:
        # Its own functionals.
        if self.quadrature is not None:
            jacobian = self.quadrature[:, None, None] * jacobian
        jets, sides = self.trace.jets, self.sides
        return Block(self.points, jacobian, jets, sides, self.sum_over)


class Problem(eqx.Module):
    kernels: dict[str, AbstractKernel]
    rows: tuple[Rows, ...]

    @property
    def size(self) -> int:
        return sum(r.target.size for r in self.rows)

    @property
    def z_size(self) -> int:
        return sum(len(r.points) * len(r.trace.nonlinear) for r in self.rows)

    @property
    def dtype(self):
        return self.rows[0].points.dtype

    @property
    def conditions(self) -> "Problem":
        rows = tuple(r for r in self.rows if not r.only_read)
        return Problem(self.kernels, rows)

    @property
    def readings(self) -> "Problem":
        return Problem(self.kernels, tuple(r for r in self.rows if r.only_read))


#
# Building it
#


def names_of(prior: Any) -> Unknowns:
    if isinstance(prior, GaussianProcess):
        return Unknowns(("u",), single=True)
    if isinstance(prior, Mapping) and len(prior) > 0:
        wrong = [n for n, p in prior.items() if not isinstance(p, GaussianProcess)]
        if len(wrong) == 0:
            return Unknowns(tuple(prior), single=False)
    is_kernel = isinstance(prior, AbstractKernel)
    hint = " A kernel makes one: `GaussianProcess(kernel)`." if is_kernel else ""
    raise ValueError(
        "`prior` must be an `eqx_bilevel.GaussianProcess`, or a dictionary of them "
        f"with one for each unknown function, got a {type(prior).__name__}.{hint}"
    )


def condition_name(condition: Condition, position: int) -> str:
    return condition.name or f"conditions[{position}]"


def find_condition(
    conditions: Sequence[Condition], name: str | None, whose: str
) -> tuple[Condition, str]:
    # And its name. `None` is the first one. `whose` is who asks, for the message.
    names = [condition_name(c, i) for i, c in enumerate(conditions)]
    name = names[0] if name is None else name
    if name not in names:
        raise ValueError(
            f"{whose} is about condition {name!r}, but the conditions are {names}."
        )
    return conditions[names.index(name)], name


def trace_conditions(prior: Any, conditions: Sequence[Condition]) -> list[Trace]:
    # All that can go wrong whatever the values are, goes wrong here.
    unknowns = names_of(prior)
    if isinstance(conditions, Condition) or not isinstance(conditions, Sequence):
        raise ValueError("`conditions` must be a list of `eqx_bilevel.Condition`s.")
    if len(conditions) == 0:
        raise ValueError("`conditions` is empty: nothing is known of the unknown.")
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ValueError(
                "`conditions` must hold `eqx_bilevel.Condition`s, got a "
                f"{type(condition).__name__}."
            )
    dim, dtype = conditions[0].points.shape[1], conditions[0].points.dtype
    traces = []
    for i, condition in enumerate(conditions):
        name, shape = condition_name(condition, i), condition.points.shape
        if shape[1] != dim:
            raise ValueError(
                "All conditions must have points of the same dimension, but those of "
                f"{name!r} have {shape[1]} and those of "
                f"{condition_name(conditions[0], 0)!r} have {dim}."
            )
        if condition.points.dtype != dtype:
            raise ValueError(
                f"All points must have the same dtype, but those of {name!r} are "
                f"{condition.points.dtype} and the first ones {dtype}."
            )
        traces.append(trace_operator(condition.operator, unknowns, dim, dtype, name))
        _check_smoothness(_kernels(prior), traces[-1], name)
        _check_noise(condition, traces[-1], name)
    _check_names([condition_name(c, i) for i, c in enumerate(conditions)])
    _check_shapes(prior, dim, dtype)
    used = {unknown for t in traces for unknown, _ in t.jets}
    unused = [name for name in unknowns.names if name not in used]
    if unused:
        raise ValueError(f"No condition involves the unknown function(s) {unused}.")
    return traces


def _kernels(prior) -> dict[str, AbstractKernel]:
    return {name: p.kernel for name, p in priors_of(prior).items()}


def mean_functions(prior) -> dict[str, Callable]:
    return {name: mean_function(p) for name, p in priors_of(prior).items()}


def priors_of(prior) -> dict[str, GaussianProcess]:
    single = isinstance(prior, GaussianProcess)
    return {"u": prior} if single else dict(prior)


def _check_names(names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Several conditions have the same name: {repeated}.")


def _check_shapes(prior, dim: int, dtype) -> None:
    # Calls kernels and means as they will be called, for them to raise their errors.
    x = jax.ShapeDtypeStruct((dim,), dtype)
    for p in priors_of(prior).values():
        for what, fn, args in (("kernel", p.kernel, 2), ("mean", mean_function(p), 1)):
            try:
                out = eqx.filter_eval_shape(fn, *[x] * args)
            except Exception as error:
                error.add_note(f"This happened in the `{what}` of a `GaussianProcess`.")
                raise
            if not isinstance(out, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"`{what}` of a `GaussianProcess` must return one number, as a JAX "
                    f"array, but it returned a {type(out).__name__}."
                )
            if out.dtype != dtype:
                raise ValueError(
                    f"The points are {dtype}, but the {what} returns {out.dtype}: give "
                    "hyperparameters and points the same dtype."
                )
            if out.shape != ():
                raise ValueError(
                    f"`{what}` of a `GaussianProcess` must return one number at points "
                    f"of shape ({dim},), but it returned an array of shape {out.shape}."
                )


def _check_smoothness(kernels, trace: Trace, name: str) -> None:
    for unknown, index in trace.jets:
        kernel = kernels[unknown]
        if sum(index) > smoothness(kernel):
            raise ValueError(
                f"The operator of condition {name!r} needs derivatives of order "
                f"{sum(index)}, but functions with kernel {type(kernel).__name__} have "
                f"only {smoothness(kernel)}. Use a smoother kernel."
            )


def _check_noise(condition: Condition, trace: Trace, name: str) -> None:
    if condition.noise is None:
        return
    shape, n = jnp.shape(value_of(condition.noise)), condition.num_targets
    legal = (), (n,), (n * trace.size, n * trace.size)
    if shape not in legal:
        raise ValueError(
            f"The `noise` of condition {name!r} must be a number, an array of shape "
            f"{legal[1]} with one for each point, or a covariance matrix of shape "
            f"{legal[2]}, got shape {shape}."
        )


def build(
    prior,
    conditions: Sequence[Condition],
    readings: Sequence[tuple[Callable, Array]] = (),
) -> Problem:
    # Of an unwrapped prior and unwrapped conditions. Readings are what operators need
    # at these points, as conditions that demand nothing and all of whose jets are part
    # of `z`. All derivatives of these jets are then computed together with those of
    # the conditions, which saves half the work of compiling them.
    unknowns, num = names_of(prior), len(conditions)
    kernels, means = _kernels(prior), mean_functions(prior)
    dtype = conditions[0].points.dtype
    points = [c.points for c in conditions] + [x.astype(dtype) for _, x in readings]
    read = [_jets_read(unknowns, op, x) for (op, _), x in zip(readings, points[num:])]
    traces = [*trace_conditions(prior, conditions), *read]
    rows = [
        Rows(
            operator=_nothing,
            points=x,
            target=jnp.zeros((len(x), 0), dtype),
            quadrature=None,
            mean=jets_of(means, trace.jets, x),
            sides=sides,
            variance=jnp.zeros((), dtype),
            scale=jnp.ones((), dtype),
            trace=trace,
            unknowns=unknowns,
            name="readings",
            position=i if i < num else i - num,
        )
        for i, (x, trace, sides) in enumerate(
            zip(points, traces, _sides(kernels, traces, points))
        )
    ]
    for i, condition in enumerate(conditions):
        name, n = condition_name(condition, i), condition.num_targets
        target, quadrature = condition.target, condition.quadrature
        whose = f"condition {name!r}"
        unscaled = dataclasses.replace(
            rows[i],
            operator=condition.operator,
            target=target_array(target, traces[i], condition.points, n, whose),
            quadrature=None if quadrature is None else quadrature.reshape(-1),
            name=name,
        )
        variance, scale = _variance(condition, _scale(kernels, condition, unscaled))
        rows[i] = dataclasses.replace(unscaled, variance=variance, scale=scale)
    return Problem(kernels, _in_order(rows))


def _jets_read(unknowns: Unknowns, operator: Callable, points: Array) -> Trace:
    at = points.shape[1], points.dtype, "readings"
    jets = trace_operator(operator, unknowns, *at).jets
    return Trace(jets, tuple(range(len(jets))), ((0,),))


def _nothing(u, x):
    return jnp.zeros(0, x.dtype)


def _sides(kernels, traces: Sequence[Trace], points: Sequence[Array]) -> list[dict]:
    # At once where the same derivatives are needed: that is less to compile.
    alike: dict[Any, list[int]] = {}
    for i, trace in enumerate(traces):
        alike.setdefault(trace.jets, []).append(i)
    out: dict[int, dict] = {}
    for jets, indices in alike.items():
        sides = one_sides(kernels, jets, jnp.concatenate([points[i] for i in indices]))
        ends = np.cumsum([len(points[i]) for i in indices])
        for i, end in zip(indices, ends):
            start = end - len(points[i])
            out[i] = jax.tree.map(lambda x, a=start, b=end: x[a:b], sides)
    return [out[i] for i in range(len(traces))]


def row_order(traces: Sequence[Trace]) -> list[int]:
    # Those with the same derivatives stand together, and share blocks: conditions
    # before what is only read.
    def key(i):
        trace = traces[i]
        return trace.jets, trace.size == 0, trace.size, trace.nonlinear

    return sorted(range(len(traces)), key=key)


def _in_order(rows: Sequence[Rows]) -> tuple[Rows, ...]:
    return tuple(rows[i] for i in row_order([r.trace for r in rows]))


def jets_of(
    functions, jets: Sequence[tuple[str, Index]], points
) -> Float[Array, "n p"]:
    at = lambda x: jnp.stack([derivative(functions[name], i)(x) for name, i in jets])
    return jax.vmap(at)(points)


def by_name(
    functions: Any, jets: Sequence[tuple[str, Index]], unknowns: Unknowns, what: str
) -> Mapping[str, Callable]:
    # What stands for the unknowns that have an entry in these jets.
    if unknowns.single and callable(functions):
        functions = {unknowns.names[0]: functions}
    wanted = sorted({name for name, _ in jets})
    known = functions if isinstance(functions, Mapping) else {}
    if not all(callable(known.get(name)) for name in wanted):
        raise ValueError(
            f"`{what}` must be a function of a point, or with several unknowns a "
            f"dictionary with a function for each of {wanted}, got {functions!r}."
        )
    return known


def target_array(
    target, trace: Trace, points, n: int, whose: str
) -> Float[Array, "n q"]:
    dtype = points.dtype
    if callable(target):
        leaves = jax.tree.leaves(jax.vmap(target)(points))
    else:
        leaves = jax.tree.leaves(target)
    shapes = [(n, *shape) for shape in trace.shapes]
    leaves = [jnp.asarray(leaf, dtype) for leaf in leaves]
    if len(leaves) == 1 and leaves[0].ndim == 0:
        leaves = leaves * len(shapes)
    ok = len(leaves) == len(shapes) and all(
        leaf.ndim == 0 or leaf.shape == shape for leaf, shape in zip(leaves, shapes)
    )
    if not ok:
        got = [leaf.shape for leaf in leaves]
        hint = " Numbers at points have to be an array, not a list."
        raise ValueError(
            f"The target of {whose} must be a number, a function of a "
            f"point, or have the shape(s) {shapes} (number of points, then the shape "
            f"of the operator's value), got {got}."
            + (hint if isinstance(target, list) else "")
        )
    full = [jnp.broadcast_to(leaf, s).reshape(n, -1) for leaf, s in zip(leaves, shapes)]
    return jnp.concatenate(full, axis=1)


def _scale(kernels, condition: Condition, rows: Rows) -> Float[Array, ""]:
    # The mean prior variance of the condition, linearised at its reference.
    mean, trace, unknowns = rows.mean, rows.trace, rows.unknowns
    if condition.reference is not None:
        functions = by_name(condition.reference, trace.jets, unknowns, "reference")
        mean = jets_of(functions, trace.jets, rows.points)
    z = mean[:, rows.z_entries]
    at = lambda z, x: linearise_operator(rows.operator, unknowns, trace, z, x)[0]
    jacobian = jax.vmap(at)(z, rows.points)
    if condition.noise is not None:
        # Then only jitter is relative to this. It must not spoil operators that are not
        # differentiable at the reference, such as a square root at zero.
        regular = jnp.all(jnp.isfinite(jacobian), axis=(1, 2))
        z = jnp.where(regular[:, None], z, 1.0)
        jacobian = jax.vmap(at)(z, rows.points)
    return jnp.mean(variances(kernels, [rows.block(jacobian)]))


def _variance(condition: Condition, scale) -> tuple[Array, Array]:
    # What is given, and what jitter multiplies.
    weight = 1.0 if condition.weight is None else value_of(condition.weight)
    if condition.noise is not None:
        noise = value_of(condition.noise)
        variance = noise if jnp.ndim(noise) == 2 else noise**2
        return variance / weight, scale / weight
    nugget = 0.0 if condition.nugget is None else value_of(condition.nugget)
    return nugget * scale / weight, scale / weight
