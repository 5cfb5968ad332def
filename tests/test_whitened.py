import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

from .helpers import mild, relative_error, truth_of


# `solve_whitened` has the derivatives of Optimistix, which are not used elsewhere.
def judge(hyperparameters, solve):
    solution = solve(*mild.make({**mild.theta, **hyperparameters}))
    objective = eb.ValidationResidual(mild.validation, target=mild.targets)
    return objective(solution), solution(mild.validation)


hyperparameters = {k: mild.theta[k] for k in ("lengthscale", "strength", "targets")}


def value_and_gradient(solve):
    fn = lambda hyperparameters: judge(hyperparameters, solve)
    return jax.jit(jax.value_and_grad(fn, has_aux=True))(hyperparameters)


@pytest.fixture(scope="module")
def reference():
    return value_and_gradient(
        lambda *args: eb.solve(*args, eb.GaussNewton(1e-13, 1e-13))
    )


solvers = [
    optx.LevenbergMarquardt(1e-12, 1e-12),
    optx.GaussNewton(1e-12, 1e-12),
    optx.Dogleg(1e-12, 1e-12),
]


@pytest.mark.parametrize("solver", solvers)
def test_agrees_with_solve(solver, reference):
    (value, found), gradient = value_and_gradient(
        lambda *args: eb.solve_whitened(*args, solver)
    )
    (known_value, known), known_gradient = reference
    assert relative_error(value, known_value) < 1e-7
    assert relative_error(found, known) < 1e-8
    for name, slope in gradient.items():
        assert relative_error(slope, known_gradient[name]) < 1e-6


def test_statistics():
    oracle, stated, y, w = truth_of("mild")
    solution = eb.solve_whitened(*mild.make(mild.theta))
    assert solution.result == eb.RESULTS.successful
    objective = oracle.objective(stated, y, w)
    assert relative_error(solution.stats["objective"], objective) < 1e-8
    norm = oracle.rkhs_norm(stated, y, w)
    assert relative_error(solution.stats["rkhs_norm"], norm) < 1e-8
    residual_norm = jnp.sqrt(jnp.mean(oracle.misfit(y) ** 2))
    assert relative_error(solution.stats["residual_norm"], residual_norm) < 1e-6
    known = eb.solve(*mild.make(mild.theta)).spectral_radius()
    assert relative_error(solution.spectral_radius(), known) < 1e-5


def test_failure():
    problem = mild.make(mild.theta)
    solution = eb.solve_whitened(*problem, max_steps=2, throw=False)
    assert solution.result == eb.RESULTS.nonlinear_max_steps_reached
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        eb.solve_whitened(*problem, max_steps=2)
