import math
from typing import Any

import equinox as eqx
import eqx_bilevel
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from eqx_bilevel._parameters import (
    AbstractParameter,
    Bounded,
    Frozen,
    learnable,
    Positive,
    positive,
    Unconstrained,
    unwrap,
    value_of,
    with_value,
)


class _Kernel(eqx.Module):
    lengthscale: AbstractParameter = eqx.field(converter=positive)
    variance: Any = 1.0
    name: str = eqx.field(static=True, default="kernel")


def _set_raw(parameter, raw):
    raw = jnp.broadcast_to(jnp.asarray(raw, parameter.raw.dtype), parameter.raw.shape)
    return eqx.tree_at(lambda p: p.raw, parameter, raw)


@pytest.mark.parametrize("value", (1e-300, 1e-10, 0.2, 1.0, 7, 1e300))
def test_positive_round_trip(value):
    parameter = Positive(value)
    assert parameter.value.dtype == jnp.float64
    # `raw` is near 700 at the ends, so that its rounding is worth 700 eps in the value.
    np.testing.assert_allclose(parameter.value, value, rtol=2e-13)
    np.testing.assert_allclose(parameter.raw, math.log(value), rtol=1e-15)


def test_positive_gradient():
    parameter = Positive([0.2, 1.5])
    grad = jax.grad(lambda p: jnp.sum(p.value**2))(parameter)
    # d/draw exp(raw)^2 = 2 exp(raw)^2
    np.testing.assert_allclose(grad.raw, [2 * 0.2**2, 2 * 1.5**2], rtol=1e-14)


@pytest.mark.parametrize("lower, upper", ((0.0, 1.0), (-3, 2), (1e-8, 1e8)))
def test_bounded_gradient(lower, upper):
    value = lower + 0.3 * (upper - lower)
    parameter = Bounded(value, lower, upper)
    np.testing.assert_allclose(parameter.value, value, rtol=1e-14)
    grad = jax.grad(lambda p: p.value)(parameter)
    expected = (value - lower) * (upper - value) / (upper - lower)
    np.testing.assert_allclose(grad.raw, expected, rtol=1e-14)
    second = jax.grad(lambda p: jax.grad(lambda q: q.value)(p).raw)(parameter)
    expected = expected * (lower + upper - 2 * value) / (upper - lower)
    np.testing.assert_allclose(second.raw, expected, rtol=1e-13)


def test_unconstrained():
    parameter = Unconstrained([-1.0, 0.0])
    assert parameter.value.tolist() == [-1.0, 0.0]
    grad = jax.grad(lambda p: jnp.sum(3 * p.value))(parameter)
    assert grad.raw.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))
@pytest.mark.parametrize("raw", (-1000.0, -100.0, 89.0, 710.0, 1000.0, math.inf))
def test_positive_extremes(raw, dtype):
    parameter = _set_raw(Positive(jnp.asarray(1.0, dtype)), raw)
    finfo = jnp.finfo(dtype)
    for fn in (lambda p: p.value, jax.jit(lambda p: p.value)):
        value, grad = fn(parameter), jax.grad(fn)(parameter).raw
        assert value.dtype == dtype
        assert float(finfo.tiny) <= float(value) <= float(finfo.max)
        assert jnp.isfinite(grad)
        # Not clipped earlier than necessary.
        smallest, largest = math.log(finfo.tiny), math.log(finfo.max)
        exact = min(max(raw, smallest), largest)
        tolerance = 2 * float(finfo.eps) * abs(exact)
        assert abs(math.log(value) - exact) < tolerance


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("raw", (-1000.0, -40.0, 40.0, 1000.0, math.inf))
@pytest.mark.parametrize("lower, upper", ((0.3, 0.9), (-2.0, 0.1), (1.0, 1.001)))
def test_bounded_extremes(raw, dtype, lower, upper):
    # In float64, 0.3 + (0.9 - 0.3) > 0.9.
    middle = jnp.asarray((lower + upper) / 2, dtype)
    parameter = _set_raw(Bounded(middle, lower, upper), raw)
    value, grad = jax.value_and_grad(lambda p: p.value)(parameter)
    low, high = jnp.asarray(lower, dtype), jnp.asarray(upper, dtype)
    assert low <= value <= high
    np.testing.assert_allclose(value, low if raw < 0 else high, rtol=2e-6)
    assert jnp.isfinite(grad.raw)


@pytest.mark.parametrize("cls", (Positive, Unconstrained, lambda x: Bounded(x, 0, 2)))
def test_dtype(cls):
    for value in (0.5, 1, np.float64(0.5), [0.5, 1.0], np.array([1, 1])):
        parameter = cls(value)
        assert parameter.raw.dtype == parameter.value.dtype == jnp.float64
        # A weak dtype would be lost, and so recompile, at the first update.
        assert not parameter.raw.weak_type
    for value in (np.float32(0.5), jnp.array([0.5, 1.0], dtype=jnp.float32)):
        parameter = cls(value)
        assert parameter.raw.dtype == parameter.value.dtype == jnp.float32
    assert Frozen(0.5).value.dtype == jnp.float64
    assert Frozen(jnp.float32(0.5)).value.dtype == jnp.float32
    for given in ([0.5, 1], (0.5, 1)):
        value = Frozen(given).value
        np.testing.assert_array_equal(value, [0.5, 1.0])
        assert value.dtype == jnp.float64


def test_no_recompile_after_update():
    traces = []

    @eqx.filter_jit
    def fn(kernel):
        traces.append(None)
        return jtu.tree_map(lambda x: 0.9 * x if eqx.is_inexact_array(x) else x, kernel)

    kernel = _Kernel(0.2, Bounded(0.5, 0, 1))
    for _ in range(3):
        kernel = fn(kernel)
    assert len(traces) == 1


@pytest.mark.parametrize("value", (0.0, -0.5, math.nan, math.inf, [0.1, -1.0]))
def test_positive_rejects(value):
    with pytest.raises(ValueError, match="`value` of `Positive` must be finite and"):
        Positive(value)
    with pytest.raises(ValueError, match="got"):
        jax.jit(lambda: Positive(value).value)()


def test_messages():
    with pytest.raises(ValueError, match=r"got \[0\.1, -1\.0\]"):
        Positive([0.1, -1.0])
    with pytest.raises(ValueError, match="real numbers, got dtype complex128"):
        Unconstrained(1j)
    with pytest.raises(ValueError, match="real numbers, got dtype bool"):
        Positive(True)
    for value in (0.0, 1.0, -1, 2.0, math.nan, [0.5, 1.0]):
        with pytest.raises(ValueError, match="between lower=0.0 and upper=1.0, got"):
            Bounded(value, 0, 1)
    for bounds in ((1, 1), (1, 0), (0, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="`lower` and `upper` of `Bounded`"):
            Bounded(0.5, *bounds)


def test_not_representable_is_no_mistake():
    # Subnormal in float64.
    parameter = Positive(1e-310)
    assert jnp.isfinite(parameter.raw)
    assert parameter.value >= jnp.finfo(jnp.float64).tiny
    # In float32, 0.3 lies on the bound of 0.3.
    with pytest.raises(ValueError, match="strictly"):
        Bounded(jnp.float32(0.3), 0, 0.3)


def test_traced_construction():
    def fn(x):
        return (
            Positive(x).value + Bounded(x, 0, 1).value + Unconstrained([x, x]).value[1]
        )

    for transform in (jax.jit, lambda f: f):
        value, grad = jax.value_and_grad(transform(fn))(0.2)
        np.testing.assert_allclose(value, 0.6, rtol=1e-14)
        np.testing.assert_allclose(grad, 3.0, rtol=1e-14)
    np.testing.assert_allclose(
        jax.vmap(fn)(jnp.array([0.1, 0.9])), [0.3, 2.7], rtol=1e-14
    )
    # A wrong value cannot be reported under a trace, but it must not go unnoticed.
    assert jnp.isnan(jax.jit(lambda x: Positive(x).value)(-1.0))
    assert jnp.isnan(jax.jit(lambda x: Bounded(x, 0, 1).value)(2.0))


def test_vmap_over_modules(getkey):
    lengthscales = jr.uniform(getkey(), (3,), minval=0.1, maxval=1)
    kernels = eqx.filter_vmap(lambda x: _Kernel(x, Frozen(x)))(lengthscales)
    out = eqx.filter_vmap(lambda k: k.lengthscale.value + k.variance.value)(kernels)
    np.testing.assert_allclose(out, 2 * lengthscales, rtol=1e-14)


def test_frozen_has_no_gradient():
    kernel = _Kernel(Frozen(Positive(0.2)), Frozen({"a": jnp.array(2.0), "n": 3}))

    @eqx.filter_jit
    def fn(kernel):
        k = unwrap(kernel)
        return k.lengthscale * k.variance["a"] ** k.variance["n"]

    value, grad = eqx.filter_value_and_grad(fn)(kernel)
    np.testing.assert_allclose(value, 1.6, rtol=1e-14)
    leaves = [x for x in jtu.tree_leaves(grad) if eqx.is_array(x)]
    assert len(leaves) == 2 and all(x == 0 for x in leaves)
    _, tangent = jax.jvp(lambda x: Frozen(x).value * x, (3.0,), (1.0,))
    assert tangent == 3.0


def test_frozen_network(getkey):
    mlp = eqx.nn.MLP(1, "scalar", 4, 1, key=getkey())
    x = jnp.ones(1)
    assert Frozen(mlp).value(x) == mlp(x)
    grad = eqx.filter_grad(lambda m: m.value(x))(Frozen(mlp))
    assert all(jnp.all(g == 0) for g in jtu.tree_leaves(grad))
    grad = eqx.filter_grad(lambda m: m(x))(mlp)
    assert any(jnp.any(g != 0) for g in jtu.tree_leaves(grad))


def test_unwrap():
    tree = {
        "kernel": _Kernel([0.2, 0.3], Frozen((Bounded(0.5, 0, 1), _Kernel(2.0)))),
        "list": [Unconstrained(3.0), None, jnp.array(4), "text", 5.0],
    }
    out = unwrap(tree)
    assert isinstance(out["kernel"], _Kernel) and out["kernel"].name == "kernel"
    np.testing.assert_allclose(out["kernel"].lengthscale, [0.2, 0.3], rtol=1e-14)
    bounded, inner = out["kernel"].variance
    np.testing.assert_allclose([bounded, inner.lengthscale], [0.5, 2.0], rtol=1e-14)
    assert out["list"] == [3.0, None, 4, "text", 5.0]
    leaves = jtu.tree_leaves(out, is_leaf=lambda x: isinstance(x, AbstractParameter))
    assert not any(isinstance(leaf, AbstractParameter) for leaf in leaves)
    assert isinstance(tree["kernel"].lengthscale, Positive)


def test_value_of_and_positive():
    assert value_of("anything") == "anything"
    assert value_of(Unconstrained(2.0)) == 2.0
    bounded = Bounded(0.5, 0, 1)
    assert _Kernel(bounded).lengthscale is bounded
    assert positive(bounded) is bounded
    assert isinstance(_Kernel(0.5).lengthscale, Positive)
    with pytest.raises(ValueError, match="greater than zero"):
        _Kernel(-0.5)


def test_learnable():
    tree = {
        "kernel": _Kernel([0.2, 0.3], Frozen((Bounded(0.5, 0, 1), jnp.ones(2)))),
        "list": [Unconstrained(3.0), None, jnp.array(4), jnp.ones(2), 5.0],
    }
    spec = learnable(tree)
    assert jtu.tree_structure(spec) == jtu.tree_structure(tree)
    assert spec["kernel"].lengthscale.raw is True
    assert jtu.tree_leaves(spec["kernel"].variance) == [False, False]
    assert jtu.tree_leaves(spec["list"]) == [True, False, True, False]
    params, rest = eqx.partition(tree, spec)
    assert [x.shape for x in jtu.tree_leaves(params)] == [(2,), (), (2,)]
    assert eqx.tree_equal(eqx.combine(params, rest), tree)
    assert not any(jtu.tree_leaves(learnable(Frozen(Positive(0.2)))))


def test_structure_is_kept():
    parameter = Bounded(0.3, 0, 1)
    leaves, treedef = jtu.tree_flatten(parameter)
    assert eqx.tree_equal(jtu.tree_unflatten(treedef, leaves), parameter)
    moved = eqx.tree_at(lambda p: p.raw, parameter, jnp.array(0.0))
    assert moved.value == 0.5


def test_with_value():
    new = with_value(Positive(0.2), [0.5, 0.7])
    assert isinstance(new, Positive)
    np.testing.assert_allclose(new.value, [0.5, 0.7], rtol=1e-14)
    new = with_value(Unconstrained(jnp.float32(0.2)), -0.5)
    assert new.value == -0.5 and new.value.dtype == jnp.float32
    frozen = Frozen(Positive(0.2))
    assert with_value(frozen, 0.5) is frozen
    with pytest.raises(ValueError, match="greater than zero"):
        with_value(Positive(0.2), -1.0)

    class Mine(AbstractParameter):
        @property
        def value(self):
            return 1.0

    with pytest.raises(NotImplementedError, match="Mine"):
        with_value(Mine(), 0.5)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize(
    "lower, upper",
    ((0.0, 1.0), (0.1, 0.3), (-1e3, -0.1), (1.0, 1.001), (1e-8, 1e8), (-1.0, 1e-3)),
)
@pytest.mark.parametrize("where", ("below", "lower", "upper", "above"))
def test_with_value_bounded(where, lower, upper, dtype):
    width = upper - lower
    value = {"below": lower - width, "above": upper + width}
    value |= {"lower": lower, "upper": upper}
    parameter = Bounded(jnp.asarray(lower + 0.5 * width, dtype), lower, upper)
    new = with_value(parameter, value[where])
    assert isinstance(new, Bounded)
    assert (new.lower, new.upper) == (lower, upper)
    low, high = jnp.asarray(lower, dtype), jnp.asarray(upper, dtype)
    assert low < new.value < high
    assert jnp.isfinite(new.raw)
    end = low if where in ("below", "lower") else high
    scale = max(width, abs(lower), abs(upper))
    assert abs(new.value - end) <= 16 * float(jnp.finfo(dtype).eps) * scale


def test_with_value_keeps_small_values():
    # A bound's margin that is wide in proportion to the interval would destroy this.
    new = with_value(Bounded(1.0, 1e-8, 1e2), 1e-7)
    np.testing.assert_allclose(new.value, 1e-7, rtol=1e-6)


def test_with_value_traced():
    def fn(x):
        kernels = Positive(0.2), Bounded(0.3, 0, 1), Unconstrained(0.4)
        return sum(with_value(k, x * value_of(k)).value for k in kernels)

    value, grad = jax.jit(jax.value_and_grad(fn))(1.5)
    np.testing.assert_allclose(value, 1.35, rtol=1e-14)
    np.testing.assert_allclose(grad, 0.9, rtol=1e-14)


def test_repr():
    assert repr(Positive(0.2)) == "Positive(0.2)"
    assert repr(Positive(jnp.float32(0.2))) == "Positive(0.2)"
    assert repr(Positive(3)) == "Positive(3.0)"
    assert repr(Positive(1e-10)) == "Positive(1e-10)"
    assert repr(Positive([0.1, 2.0])) == "Positive([0.1, 2.0])"
    assert repr(Positive(jnp.ones((20, 3)))) == "Positive(f64[20,3])"
    assert repr(Unconstrained(-0.5)) == "Unconstrained(-0.5)"
    assert repr(Bounded(0.3, 0, 1)) == "Bounded(0.3, lower=0.0, upper=1.0)"
    assert repr(Frozen(Positive(0.2))) == "Frozen(Positive(0.2))"
    assert repr(Frozen(0.2)) == "Frozen(0.2)"
    assert repr(Frozen((0.2, "a"))) == "Frozen((0.2, 'a'))"


def test_repr_nested():
    kernel = _Kernel(0.2, Frozen(_Kernel(Bounded(0.3, lower=0, upper=1))))
    inner = "_Kernel(lengthscale=Bounded(0.3, lower=0.0, upper=1.0))"
    text = f"_Kernel(lengthscale=Positive(0.2), variance=Frozen({inner}))"
    formatted = eqx.tree_pformat(kernel, width=1000)
    assert formatted.replace(", variance=1.0", "").replace(", name='kernel'", "") == (
        text
    )
    assert "lengthscale=Positive(0.2)" in repr([kernel])


@pytest.mark.parametrize(
    "mean, shown",
    [
        (None, "None"),
        (1.5, "1.5"),
        (Frozen(1.0), "Frozen(1.0)"),
        (_Kernel(0.2), "_Kernel(lengthscale=Positive(0.2), ...)"),
    ],
)
def test_repr_of_a_prior(mean, shown):
    prior = eqx_bilevel.GaussianProcess(eqx_bilevel.Gaussian(0.5), 1.0)
    prior = eqx.tree_at(lambda p: p.mean, prior, mean)
    text = eqx.tree_pformat(prior, width=1000)
    start = "GaussianProcess(kernel=Gaussian(lengthscale=Positive(0.5)), mean="
    assert text.startswith(start + shown.removesuffix(", ...)"))
    # Of something else in its place, such as whether it is learned.
    assert "mean=True" in repr(eqx.tree_at(lambda p: p.mean, prior, True))


def test_repr_without_a_number():
    seen = []

    @jax.jit
    def fn(p):
        seen.append(repr(p))
        seen.append(repr(Frozen(p)))
        return p.value

    fn(Positive([0.1, 0.2]))
    jax.vmap(fn)(Positive([0.1, 0.2]))
    assert seen[:2] == ["Positive(f64[2])", "Frozen(Positive(f64[2]))"]
    assert seen[2:] == ["Positive(f64[])", "Frozen(Positive(f64[]))"]

    # A concrete parameter is shown even while something else is traced.
    constant = Positive(0.2)
    jax.jit(lambda x: (seen.append(repr(constant)), x)[1])(1.0)
    assert seen[-1] == "Positive(0.2)"

    bounded = Bounded(0.3, 0, 1)
    assert repr(learnable(bounded)) == "Bounded(True, lower=0.0, upper=1.0)"
    assert repr(eqx.filter(bounded, False)) == "Bounded(None, lower=0.0, upper=1.0)"
    struct = eqx.filter_eval_shape(lambda: Positive(0.2))
    assert repr(struct).startswith("Positive(ShapeDtypeStruct")
