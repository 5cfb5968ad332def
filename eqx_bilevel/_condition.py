"""What a user states: priors and conditions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._kernels import AbstractKernel
from ._parameters import AbstractParameter, array_doc, learnable, value_of
from ._pretty import named_doc


def _inexact(x: Any, name: str) -> Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers, got {x!r}.") from error
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"`{name}` must be real, got an array of {x.dtype}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    return x


def as_points(points: Any) -> Float[Array, "n d"]:
    if all(map(is_concrete, jax.tree.leaves(points))):
        with jax.ensure_compile_time_eval():  # Constants stay so under `jax.jit`.
            points = _inexact(points, "points")
    else:
        points = _inexact(points, "points")
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            "`points` must have shape `(n, d)`, for `n` points in `d` dimensions, got "
            f"{points.shape}."
        )
    return points


def as_target(target: PyTree) -> PyTree:
    # Numbers become arrays: as Python objects they would each be compiled anew.
    if callable(target):
        _check_of_point(target, "target")
        return target
    return jax.tree.map(lambda x: _inexact(x, "target"), target)


def take_target(target: PyTree, chosen: Int[Array, " k"]) -> PyTree:
    # At some of the points.
    if callable(target):
        return target
    return jax.tree.map(lambda t: t[chosen] if jnp.ndim(t) > 0 else t, target)


def _check_of_point(fn: Any, name: str) -> None:
    # Whether it can be called with one argument, as far as is known.
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"`{name}` is called as `{name}(x)`, with one point `x` of shape `(d,)`, "
            f"and this function cannot be: {error}."
        ) from error


def is_concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def _number(x: Any, name: str, zero: bool) -> Any:
    # A noise, nugget or weight: a non-negative or positive scalar, or a parameter.
    if x is None or isinstance(x, AbstractParameter):
        return x
    x = _inexact(x, name)
    if x.ndim != 0:
        raise ValueError(f"`{name}` must be a scalar, got shape {x.shape}.")
    # By NumPy, since under a trace JAX operations on concrete arrays are traced.
    value = np.asarray(x) if is_concrete(x) else None
    if value is not None and not (0 < value < np.inf or (zero and value == 0)):
        kind = "non-negative" if zero else "positive"
        raise ValueError(f"`{name}` must be a finite {kind} number, got {x}.")
    return x


def _noise(x: Any) -> Any:
    # Standard deviations, or a covariance matrix.
    if x is None or isinstance(x, AbstractParameter) or jnp.ndim(x) == 0:
        return _number(x, "noise", zero=False)
    x = _inexact(x, "noise")
    if x.ndim > 2:
        raise ValueError(
            "`noise` must be a number, an array of them or a matrix, got shape "
            f"{x.shape}."
        )
    if is_concrete(x):
        value = np.asarray(x)
        positive = np.diagonal(value) if x.ndim == 2 else value
        if not (np.all(np.isfinite(value)) and np.all(positive > 0)):
            raise ValueError("`noise` must be finite and positive.")
    return x


def _quadrature(points: Any, weights: Any) -> tuple[Array, Array | None]:
    if weights is None:
        return as_points(points), None
    points, weights = _inexact(points, "points"), _inexact(weights, "quadrature")
    if points.ndim != 3 or 0 in points.shape:
        raise ValueError(
            "With `quadrature`, `points` must have shape `(n, q, d)`, for `n` averages "
            f"over `q` points in `d` dimensions, got {points.shape}."
        )
    n, q, d = points.shape
    if weights.shape not in ((q,), (n, q)):
        raise ValueError(
            f"`quadrature` must have shape ({q},) or ({n}, {q}), got {weights.shape}."
        )
    weights = jnp.broadcast_to(weights, (n, q)).astype(points.dtype)
    return points.reshape(n * q, d), weights


class GaussianProcess(eqx.Module):
    """What is known about an unknown function beforehand: it is a Gaussian process with
    this kernel and this mean.

    All floating-point arrays in it are hyperparameters, and [`eqx_bilevel.learn`][]
    learns them, except for those inside an [`eqx_bilevel.Frozen`][].
    """

    kernel: AbstractKernel
    mean: Callable | AbstractParameter | Array | None

    def __init__(
        self,
        kernel: AbstractKernel,
        mean: Callable | AbstractParameter | ArrayLike | None = None,
    ):
        if not isinstance(kernel, AbstractKernel):
            raise ValueError(
                "`kernel` must be an `eqx_bilevel.AbstractKernel`, got a "
                f"{type(kernel).__name__}."
            )
        if not (mean is None or callable(mean) or isinstance(mean, AbstractParameter)):
            mean = _inexact(mean, "mean")
            if mean.ndim != 0:
                raise ValueError(
                    "`mean` must be a scalar or a function of a point, got an array of "
                    f"shape {mean.shape}."
                )
        if callable(mean):
            _check_of_point(mean, "mean")
        self.kernel = kernel
        self.mean = mean

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        # With the mean as a number, which Equinox would show as an array's shape.
        kernel = wl.TextDoc("kernel=") + wl.pdoc(self.kernel, **kwargs)
        mean = wl.TextDoc("mean=") + array_doc(self.mean, **kwargs)
        return named_doc("GaussianProcess", [kernel, mean], **kwargs)


GaussianProcess.__init__.__doc__ = """**Arguments:**

- `kernel`: The covariance of the process, an [`eqx_bilevel.AbstractKernel`][].
- `mean`: The mean: `None` for zero, a number, or a function from a point of shape
    `(d,)` to a number, which may be an Equinox module. It must be as often
    differentiable as the operators ask for.

**Raises:**

A `ValueError` if either is of the wrong kind.
"""


def mean_function(prior: GaussianProcess) -> Callable:
    # Of an unwrapped prior.
    mean = prior.mean
    if mean is None:
        return lambda x: jnp.zeros((), x.dtype)
    elif callable(mean):
        return lambda x: jnp.asarray(mean(x), x.dtype)
    else:
        return lambda x: jnp.asarray(value_of(mean), x.dtype)


class Condition(eqx.Module):
    """What is demanded of the unknown functions at points: there, an operator of them
    equals a target. A PDE, boundary and initial data and observations are conditions.

    Arrays in a condition are data, and are not learned by [`eqx_bilevel.learn`][]
    unless they are wrapped in a parameter such as [`eqx_bilevel.Positive`][] or
    [`eqx_bilevel.Unconstrained`][].
    """

    operator: Callable
    points: Float[Array, "_ d"]
    target: PyTree
    noise: AbstractParameter | Float[Array, "..."] | None
    nugget: AbstractParameter | Float[Array, ""] | None
    weight: AbstractParameter | Float[Array, ""] | None
    reference: Callable | Mapping[str, Callable] | None
    quadrature: Float[Array, "n q"] | None
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        operator: Callable,
        points: ArrayLike,
        target: PyTree = 0.0,
        *,
        noise: AbstractParameter | ArrayLike | None = None,
        nugget: AbstractParameter | ArrayLike | None = None,
        weight: AbstractParameter | ArrayLike | None = None,
        reference: Callable | Mapping[str, Callable] | None = None,
        quadrature: ArrayLike | None = None,
        name: str | None = None,
    ):
        if not callable(operator):
            raise ValueError(
                "`operator` must be a callable `(u, x)`, got a "
                f"{type(operator).__name__}."
            )
        points, quadrature = _quadrature(points, quadrature)
        if quadrature is not None and callable(target):
            raise ValueError(
                "With `quadrature`, `target` must be numbers: it belongs to averages "
                "and not to points."
            )
        if noise is not None and nugget is not None:
            raise ValueError(
                "Give `noise` (a standard deviation, for measured data) or `nugget` (a "
                "relative variance, for equations that hold exactly), not both."
            )
        self.operator = operator
        self.points = points
        self.target = as_target(target)
        self.noise = _noise(noise)
        self.nugget = _number(nugget, "nugget", zero=True)
        self.weight = _number(weight, "weight", zero=False)
        self.reference = reference
        self.quadrature = quadrature
        self.name = name

    @property
    def num_targets(self) -> int:
        """For how many points there is a target; or with `quadrature`, for how many
        averages.
        """
        return len(self.points if self.quadrature is None else self.quadrature)


Condition.__init__.__doc__ = """**Arguments:**

- `operator`: A callable `(u, x)` that returns a number, an array or a PyTree of them.
    `x` is one point, of shape `(d,)`, and `u` is the [`eqx_bilevel.Jet`][] of the
    unknown there: `u.value`, `u.d(0)`, `u.grad`, `u.laplacian`, `u.hessian`. If the
    prior is a dictionary then so is `u`. Linear or nonlinear.
- `points`: An array of shape `(n, d)`.
- `target`: What the operator equals. A number, an array of shape `(n, ...)`, where
    `...` is the shape of the operator's value, a PyTree of these if that is one, or a
    function of one point.

The remaining arguments are keyword-only.

- `noise`: The standard deviation of the target's error, in its units: one number, or
    an array of shape `(n,)`, which serves for all values that the operator returns at a
    point. If these have errors of different size then make a condition of each. For
    errors that are not independent, the covariance matrix of all targets (variances,
    in squared units), of shape `(n q, n q)` for `q` values at each point, those of the
    first point first.
- `nugget`: A relative variance: it is multiplied by the mean prior variance of this
    condition's linearised operator. If neither is given then the nugget is chosen by
    [`eqx_bilevel.solve`][], as small as rounding allows.
- `weight`: Multiplies the squared residual of this condition, i.e. divides its
    variance, also if that is an automatic nugget.
- `reference`: Where the operator is linearised to find that prior variance: a function
    of one point that stands for the unknown, or a dictionary of them. Default: the
    prior's mean.
- `quadrature`: For measured averages: the weights of a quadrature rule, of shape
    `(q,)` or `(n, q)`. `points` then has shape `(n, q, d)`, and what equals the
    `target` are the `n` weighted sums over `q` points of what the operator returns.
- `name`: Used in messages, and to refer to this condition.

**Raises:**

A `ValueError` if an argument is of the wrong kind, shape or sign.
"""


def learned_in(prior: PyTree, conditions: PyTree) -> PyTree[bool]:
    # What is learned of both: all arrays in the prior; but in conditions parameters
    # only, since points and targets are data.
    is_parameter = lambda x: isinstance(x, AbstractParameter)
    in_conditions = jax.tree.map(
        lambda x: learnable(x) if is_parameter(x) else False,
        conditions,
        is_leaf=is_parameter,
    )
    return learnable(prior), in_conditions
