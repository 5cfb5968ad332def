"""Progress, callbacks, and learning that goes on from a file."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from eqx_bilevel._progress import hyperparameters


def _operator(u, x):
    return -u.laplacian + u.value**3


def _value(u, x):
    return u.value


def _exact(x):
    return jnp.sin(3 * x[0]) + 0.3 * x[0]


def _source(x):
    return 9 * jnp.sin(3 * x[0]) + _exact(x) ** 3


grid = jnp.linspace(0.0, 2.0, 50)[:, None]
conditions = [
    eb.Condition(_operator, grid[2:-2:4], _source, nugget=1e-8, name="pde"),
    eb.Condition(_value, grid[jnp.array([0, -1])], _exact, nugget=1e-8, name="ends"),
]
prior = eb.GaussianProcess(eb.Positive(2.0) * eb.Gaussian(0.3))
objective = eb.ValidationResidual(grid[4:-4:4], "pde")
batches = eb.ValidationResidual(grid[4:-4:4], "pde", batch_size=4)


def _learn(optimiser, objective=objective, prior=prior, **kwargs):
    kwargs = dict(steps=12, scale_search=3, key=jax.random.key(3)) | kwargs
    return eb.learn(prior, conditions, objective, optimiser, throw=False, **kwargs)


class Killed(BaseException):
    pass


def _killed_after(num):
    def callback(progress):
        if progress.step == num:
            raise Killed

    return callback


def _same(one, other):
    assert one.history.keys() == other.history.keys()
    for name in one.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(one.history[name], other.history[name])
    assert one.scale_search == other.scale_search
    assert one.converged == other.converged
    trees = [(each.prior, each.conditions, each.objective) for each in (one, other)]
    assert eqx.tree_equal(*trees)
    np.testing.assert_array_equal(one.solution(grid), other.solution(grid))


@pytest.mark.parametrize(
    "optimiser, options",
    [
        (None, {}),
        (None, dict(scale_search=False)),
        (optx.LevenbergMarquardt(1e-4, 1e-8), {}),
        (optax.adam(0.3), dict(objective=batches)),
        # Far too long steps, of which some are taken back.
        (optax.sgd(10.0), dict(scale_search=False)),
    ],
    ids=["default", "without_search", "levenberg_marquardt", "batches", "too_long"],
)
def test_goes_on_bit_for_bit(tmp_path, optimiser, options):
    whole = _learn(optimiser, **options)
    steps = len(whole.history["objective"])
    assert steps > 3
    for done in sorted({0, 1, steps // 2, steps - 1}):
        path = tmp_path / f"{done}.eqx"
        kwargs = dict(checkpoint=path, **options)
        with pytest.raises(Killed):
            _learn(optimiser, callback=_killed_after(done + 1), **kwargs)
        assert len(_saved(path)["rows"]) == done
        seen = []
        callback = lambda progress: seen.append(progress.step)
        _same(whole, _learn(optimiser, callback=callback, **kwargs))
        # Nothing that was in the file is done again.
        assert seen == list(range(done + 1, steps + 1))


def _saved(path):
    with open(path, "rb") as file:
        return json.loads(file.readline())


def test_saved_before_the_first_step(tmp_path):
    path, saved = tmp_path / "run.eqx", []

    def callback(progress):
        if progress.step == 0:
            assert not path.exists()
        else:
            saved.append(_saved(path))
            return True

    learned = _learn(optax.adam(0.1), checkpoint=path, callback=callback)
    (first,) = saved
    assert first["rows"] == [] and first["seconds"] > 0
    tried = [(tuple(lengths), objective) for lengths, objective in first["tried"]]
    assert tried == learned.scale_search and len(tried) > 2


@pytest.mark.parametrize("step", [0, 1, 3])
def test_interrupted(tmp_path, step):
    def interrupt(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    path = tmp_path / "run.eqx"
    whole = _learn(optax.adam(0.1), steps=4)
    with pytest.raises(KeyboardInterrupt) as error:
        _learn(optax.adam(0.1), steps=4, checkpoint=path, callback=interrupt)
    (note,) = error.value.__notes__
    if step == 0:
        assert f"Nothing was saved in `checkpoint` {str(path)!r}" in note
    else:
        assert f"{step - 1} step(s) " in note and repr(str(path)) in note
        assert len(_saved(path)["rows"]) == step - 1
    _same(whole, _learn(optax.adam(0.1), steps=4, checkpoint=path))
    with pytest.raises(KeyboardInterrupt) as error:
        _learn(optax.adam(0.1), callback=interrupt)
    assert not hasattr(error.value, "__notes__")


def test_resuming_compiles_nothing_anew(tmp_path):
    traced = itertools.count()

    def counted(solution):
        next(traced)
        return jnp.sum((solution(grid) - jax.vmap(_exact)(grid)) ** 2)

    settings = dict(objective=eb.Objective(counted), checkpoint=tmp_path / "run.eqx")
    _learn(None, steps=2, **settings)
    once = next(traced)
    _learn(None, steps=4, **settings)
    assert next(traced) == once + 1 > 1


def test_more_steps(tmp_path):
    path = tmp_path / "run.eqx"
    whole = _learn(optax.adam(0.1))
    _learn(optax.adam(0.1), steps=5, checkpoint=path)
    part = _learn(optax.adam(0.1), checkpoint=path)
    _same(whole, part)
    # All is done: the file says so, and nothing changes.
    calls = []
    again = _learn(optax.adam(0.1), checkpoint=path, callback=calls.append)
    _same(whole, again)
    assert calls == []
    assert np.all(np.diff(again.history["seconds"]) > 0)


_PROGRAM = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # As in conftest.py.
sys.path.insert(0, {folder!r})
from test_checkpoint import _learn, optax
learned = _learn(
    optax.adam(0.1), steps=2000, patience=2000, checkpoint={path!r},
    callback=lambda progress: print(progress.step, flush=True) or {stop},
)
"""


def test_killed_process(tmp_path):
    path = tmp_path / "run.eqx"
    folder = str(pathlib.Path(__file__).parent)
    program = _PROGRAM.format(folder=folder, path=str(path), stop=False)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    until = time.monotonic() + 300
    while not path.exists() or path.stat().st_size == 0:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = len(_saved(path)["rows"])
    assert done < 2000
    stop = lambda progress: progress.step >= done + 3
    options = dict(steps=2000, patience=2000)
    went_on = _learn(optax.adam(0.1), checkpoint=path, callback=stop, **options)
    whole = _learn(optax.adam(0.1), callback=stop, **options)
    # The steps before were compiled in another process.
    _same(whole, went_on)


def test_file_of_other_arguments(tmp_path):
    path = tmp_path / "run.eqx"
    _learn(optax.adam(0.1), steps=2, checkpoint=path)
    other = eb.GaussianProcess(eb.Positive(2.0) * eb.Gaussian(0.4))
    for optimiser, options in [
        (optax.adam(0.1), dict(prior=other)),
        (optax.adam(0.1), dict(objective=2.0 * objective)),
        (optax.adam(0.1), dict(gradient="frozen")),
        (optax.adam(0.1), dict(solver=eb.GaussNewton(rtol=1e-6))),
        (optax.adam(0.1), dict(max_inner_steps=3)),
        (optax.adam(0.1), dict(initial=_exact)),
        (optax.adam(0.2), {}),
        (optx.BFGS(1e-3, 1e-3), {}),
    ]:
        with pytest.raises(ValueError, match="run with other arguments"):
            _learn(optimiser, checkpoint=path, **options)
    for content in (b"", b"\x00\x01", b"[]\n", b"{}\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="was not written by"):
            _learn(optax.adam(0.1), checkpoint=path)
    assert list(tmp_path.iterdir()) == [path]


def test_callbacks():
    seen = []
    stop = lambda progress: progress.step == 3
    learned = _learn(optax.adam(0.1), callback=[seen.append, stop])
    assert len(learned.history["objective"]) == 3 and not learned.converged
    best = np.argmin(learned.history["objective"])
    assert eqx.tree_equal(learned.prior, seen[best - 3].prior)
    steps = [progress for progress in seen if progress.step > 0]
    assert [progress.step for progress in steps] == [1, 2, 3]
    searched = [p.lengths[0] for p in seen if p.step == 0]
    assert searched == [tried.lengths[0] for tried in learned.scale_search]
    for progress in steps:
        # What a callback gets belongs together.
        solution = eb.solve(progress.prior, progress.conditions)
        np.testing.assert_allclose(solution(grid), progress.solution(grid), atol=1e-6)
        np.testing.assert_allclose(objective(solution), progress.objective, rtol=1e-3)
        named = progress.hyperparameters
        kernel = progress.prior.kernel
        assert len(named) == 2
        (lengthscale,) = [v for k, v in named.items() if k.endswith("lengthscale")]
        leaves = [p.value for p in jax.tree.leaves(kernel, is_leaf=_is_parameter)]
        assert lengthscale in leaves
    assert [len(progress.history["objective"]) for progress in steps] == [1, 2, 3]
    history = steps[-1].history
    for name, values in learned.history.items():
        np.testing.assert_array_equal(history[name], values)
    assert np.isnan(steps[0].seconds_left)
    pace = (steps[2].seconds - steps[0].seconds) / 2
    np.testing.assert_allclose(steps[2].seconds_left, (12 - 3) * pace)


def _is_parameter(x):
    return isinstance(x, eb.AbstractParameter)


def test_names_of_hyperparameters():
    class Decay(eqx.Module):
        rate: eb.AbstractParameter

        def __call__(self, u, x):
            return u["v"].d(0) + self.rate * u["v"].value

    network = eb.LengthscaleNetwork(1, "scalar", 5, 1, key=jax.random.key(0))
    priors = {
        "v": eb.GaussianProcess(eb.Gaussian([0.3]) + eb.Gaussian(eb.Frozen(1.0))),
        "w": eb.GaussianProcess(eb.Gibbs(network), mean=eb.Unconstrained(0.5)),
    }
    stated = [
        eb.Condition(Decay(eb.Positive(2.0)), grid, name="decay"),
        eb.Condition(lambda u, x: u["w"].value, grid, noise=eb.Positive(0.1)),
    ]
    named = hyperparameters(priors, stated)
    assert named.pop("decay.operator.rate") == 2.0
    np.testing.assert_allclose(named.pop("conditions[1].noise"), 0.1)
    assert named.pop("w.mean") == 0.5
    lengths = {k: v for k, v in named.items() if "lengthscale" in k}
    # Not that which is frozen; of the network what has few enough numbers.
    assert list(lengths)[0].startswith("v.kernel.") and list(lengths.values())[0] == 0.3
    assert all(k.startswith("w.kernel.lengthscale.") for k in list(lengths)[1:])


def test_lines_and_bar(capsys):
    options = dict(steps=3, scale_search=2, verbose=True)
    learned = _learn(optax.adam(0.1), **options)
    lines = capsys.readouterr().out.splitlines()
    expected = ["Compiling", *["scale"] * len(learned.scale_search), "Compiling"]
    assert [line.split()[0] for line in lines] == [*expected, *["step"] * 3]
    last = lines[-1]
    assert f"best {learned.history['best'][-1]:.6e}" in last
    assert "s left" in last and "lengthscale" in last
    _learn(optax.adam(0.1), **(options | dict(verbose="bar")))
    assert "3/3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`verbose` must be"):
        _learn(optax.adam(0.1), verbose="lines")
