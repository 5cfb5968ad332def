"""What the fingerprint of a function notices, and what it must not depend on."""

import os
import subprocess
import sys

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from eqx_bilevel._closure import function_as_pytree
from eqx_bilevel._fingerprint import fingerprint


# Each makes something, given the number that is written in it.
_SOURCES = {
    "number": "def f(u, x): return {} * u.d(0, 0)",
    "lambda": "f = lambda u, x: u.value - {}",
    "name": "def f(u, x): return getattr(u, 'a{}')",
    "inner": "def f(u, x):\n  def g(y): return [y + {} for _ in x]\n  return g(x)",
    "default": "def f(u, x, a={}): return a * u.value",
    "keyword default": "def f(u, x, *, a={}): return a * u.value",
    "closure": "def m(a):\n  return lambda u, x: a * u.value\nf = m({})",
    "array": "def m(a):\n  return lambda u, x: a * u.value\nf = m(jnp.array([{}]))",
    "container": "def m(a):\n  return lambda u, x: a['k'][0]\nf = m(dict(k=[{}]))",
    "global": "a = {}\ndef f(u, x): return a * u.value",
    "global array": "a = np.array({})\ndef f(u, x): return a * u.value",
    "another": "def g(x): return {} * x\ndef f(u, x): return g(u.value)",
    "each other": "def g(x): return {} * f(x, x)\ndef f(u, x): return g(u)",
    "partial": "f = ft.partial(lambda a, u, x: a * u.value, {})",
    "partial's": "f = ft.partial(lambda a, u, x: {} * u.value, 2)",
    "jit": "f = jax.jit(lambda u, x: {} * x)",
    "filter_jit": "f = eqx.filter_jit(lambda u, x: {} * x)",
    "vmap": "f = jax.vmap(lambda x: {} * x)",
    "custom": "f = jax.custom_jvp(lambda x: {} * x)",
    "module": "class F(eqx.Module):\n  def __call__(self, u, x): return {}\nf = F()",
    "field": "class F(eqx.Module):\n  a: float\nf = F({})",
    "static": "class F(eqx.Module):\n  a: float = eqx.field(static=True)\nf = F({})",
    "property": "class F(eqx.Module):\n  @property\n  def a(self): return {}\nf = F()",
    "base": "class G:\n  def g(self): return {}\nclass F(G): pass\nf = F()",
    "constant": "class F:\n  a = {}\nf = F()",
    "bound": "class F:\n  def __init__(self, a): self.a = a\n  def g(self): pass\n"
    "f = F({}).g",
    "itself": "class F: pass\nf = F()\nf.f = f\nf.a = {}",
    "set": "f = lambda x: x in {{'a', 'b', 'c', {}}}",
    "optax": "f = optax.chain(optax.clip(1.0), optax.adam({}))",
    "optimistix": "f = optx.BFGS({}, 1e-3)",
    "kernel": "f = eb.Matern(1.0, nu={} + 0.5)",
}


def _made(source, number=3, before=""):
    modules = dict(eqx=eqx, jax=jax, jnp=jnp, np=np, eb=eb, optax=optax, optx=optx)
    scope = dict(modules, ft=__import__("functools"), __name__="users")
    exec(compile(before + source.format(number), f"{number}.py", "exec"), scope)
    return scope["f"]


@pytest.mark.parametrize("name", _SOURCES)
def test_notices_what_is_written(name):
    one, again, other = (
        fingerprint([_made(_SOURCES[name], n, before)])
        for n, before in [(3, ""), (3, "\n\n# Elsewhere.\nb = 5\n"), (4, "")]
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", ["closure", "global", "array", "number", "another"])
def test_notices_it_in_functions_taken_apart(name):
    one, again, other = (
        fingerprint(function_as_pytree(_made(_SOURCES[name], n))) for n in (3, 3, 4)
    )
    assert one == again != other


def test_is_the_same_in_each_process():
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_fingerprint import _made, _SOURCES, fingerprint\n"
        "print(fingerprint([_made(s) for s in _SOURCES.values()]))"
    )
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | dict(PYTHONHASHSEED=seed)
        out = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(out.stdout)
    assert len(found) == 1


def test_arrays_and_keys():
    key = jax.random.key
    different = [1, 1.0, "1", None, (1,), [1], {1: 2}, {2: 1}, jnp.sin, jnp.cos]
    different += [jnp.ones(1), jnp.ones((1, 1)), np.ones(2), jnp.float32(1.0)]
    different += [key(0), key(1)]
    assert len({fingerprint(x) for x in different}) == len(different)
    assert fingerprint({1: 2, 3: 4}) == fingerprint({3: 4, 1: 2})
