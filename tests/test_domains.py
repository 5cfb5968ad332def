"""Problems on domains that are not boxes, whose solutions are known."""

import equinox as eqx
import eqx_bilevel as eb
import jax
import jax.numpy as jnp
import numpy as np


def _value(u, x):
    return u.value


def _max_error(solution, exact, domain, key):
    x = domain.interior(500, key=key)
    return jnp.max(jnp.abs(solution(x) - jax.vmap(exact)(x)))


def test_robin_on_a_disk(getkey):
    disk = eb.Ball([1.0, -0.5], 0.8)
    exact = lambda x: jnp.exp(x[0]) * jnp.sin(x[1])  # Harmonic.

    def robin(u, x):
        return u.grad @ disk.normal(x) + u.value

    def flux(x):
        # By hand.
        across = (x - jnp.array([1.0, -0.5])) / 0.8
        gradient = jnp.exp(x[0]) * jnp.array([jnp.sin(x[1]), jnp.cos(x[1])])
        return jnp.sum(gradient * across) + exact(x)

    conditions = [
        eb.Condition(
            lambda u, x: -u.laplacian + u.value**3,
            disk.interior(100, key=getkey()),
            lambda x: exact(x) ** 3,
        ),
        eb.Condition(robin, disk.boundary(40, key=getkey()), flux),
    ]
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian([0.8, 0.8])), conditions)
    assert _max_error(solution, exact, disk, getkey()) < 1e-5


def test_dirichlet_on_an_l_shape(getkey):
    domain = eb.Polygon([[-1, -1], [1, -1], [1, 0], [0, 0], [0, 1], [-1, 1]])
    exact = lambda x: jnp.sin(2 * x[0]) * jnp.cos(x[1])
    conditions = [
        eb.Condition(
            lambda u, x: -u.laplacian,
            domain.interior(150, key=getkey()),
            lambda x: 5 * exact(x),
        ),
        eb.Condition(_value, domain.boundary(60, key=getkey()), exact),
    ]
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian([0.8, 0.8])), conditions)
    assert _max_error(solution, exact, domain, getkey()) < 1e-5


class _Flux(eqx.Module):
    domain: eb.AbstractDomain

    def __call__(self, u, x):
        return u.grad @ self.domain.normal(x)


def test_a_hole_with_a_neumann_condition(getkey):
    # The normal of the whole points into the hole.
    hole = eb.Ball([0.0, 0.0], 0.5)
    domain = eb.Box([-1.0, -1.0], [1.0, 1.0]) - hole
    exact = lambda x: jnp.sin(2 * x[0] + x[1])
    slope = lambda x: jnp.cos(2 * x[0] + x[1]) * (2 * x[0] + x[1])  # x . grad u
    around = domain.boundary(120, key=getkey())
    on_hole = np.asarray(jnp.abs(hole.signed_distance(around)) < 1e-12)
    assert 20 < np.sum(on_hole) < 40
    conditions = [
        eb.Condition(
            lambda u, x: -u.laplacian,
            domain.interior(150, key=getkey()),
            lambda x: 5 * exact(x),
        ),
        eb.Condition(_Flux(domain), around[on_hole], lambda x: -slope(x) / 0.5),
        eb.Condition(_value, around[~on_hole], exact),
    ]
    solution = eb.solve(eb.GaussianProcess(eb.Gaussian([0.8, 0.8])), conditions)
    assert _max_error(solution, exact, domain, getkey()) < 1e-4
