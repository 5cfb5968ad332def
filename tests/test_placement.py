import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np
import pytest


candidates = jax.random.uniform(jax.random.key(0), (300, 2))


def test_constant_lengthscales_give_euclidean_distances():
    scale = jnp.array([0.1, 0.4])
    found = eb.farthest_points(candidates, 3.0 * eb.Gaussian(scale), 40)
    # By hand.
    scaled = np.asarray(candidates / scale[None, :])
    chosen = [0]
    for _ in range(39):
        apart = scaled[:, None, :] - scaled[None, chosen, :]
        chosen.append(int(np.argmax(np.min(np.sum(apart**2, axis=2), axis=1))))
    np.testing.assert_array_equal(found, candidates[np.array(chosen)])


def test_more_points_where_lengthscales_are_short():
    line = jnp.linspace(0.0, 1.0, 2001)[:, None]
    kernel = eb.Gibbs(lambda x: jnp.where(x[0] < 0.2, 0.01, 0.1))
    found = eb.farthest_points(line, kernel, 60)[:, 0]
    near = jnp.sum(found < 0.2)
    # Twenty lengths on the left and eight on the right.
    assert abs(near / 60 - 20 / 28) < 0.1
    apart = jnp.diff(jnp.sort(found))
    assert jnp.max(apart) < 0.1


@pytest.mark.parametrize("n", [0, 301])
def test_wrong_numbers(n):
    with pytest.raises(ValueError, match=f"which is 300, got {n}"):
        eb.farthest_points(candidates, eb.Gaussian(1.0), n)


def test_under_jit():
    fn = jax.jit(lambda x: eb.farthest_points(x, eb.Gaussian(0.3), 5))
    expected = eb.farthest_points(candidates, eb.Gaussian(0.3), 5)
    np.testing.assert_array_equal(fn(candidates), expected)
