"""The true solutions of the experiments, to 1e-8 or better.

Each function takes two one-dimensional arrays and returns the solution on their grid,
of shape (len(t), len(x)), or a pair (u, v) of such arrays for a system. Times are in
[0, 1], in any order.

The errors are the largest differences from a second method, which shares neither the
discretisation of space nor the integration in time, except where it says so. The second
methods are in `tests/test_references.py`, at smaller sizes where these are expensive.

Just after a kink at t = 0 there is one more error, in its place: of up to 3e-6 in
allen_cahn for t < 1e-6, and 2e-7 in schroedinger for t < 1e-9. At t = 0 there is none.

burgers       1e-10. A sine series of 256 to 1536 modes has this error, and the average
              below changes by 1e-15 with the step of its rule.
eikonal       1e-15. A sine series for v.
gray_scott    1e-12. Spectral elements and an implicit method.
allen_cahn    3e-10 for t < 0.003, which decreases like the third power of the number
              of modes; 1e-11 later. Spectral elements and an implicit method.
schroedinger  2e-9, which decreases likewise. Steps of 2.5e-5 with 1536 modes, whose law
              of the high modes begins later; and, to 6e-9, a Runge-Kutta method in a
              rotating frame, with a simpler law.
darcy         1e-8, of values up to 0.024. The corners make Chebyshev series converge
              like the fifth power. Finite volumes.
"""

import numpy as np
from scipy.fft import dct
from scipy.integrate import solve_ivp
from scipy.special import erf


#
# Closed forms
#


def burgers(t, x, nu):
    """u_t + u u_x = nu u_xx for x in (-1, 1), u = -sin(pi x) at t = 0, u = 0 at ends.

    By the Cole-Hopf transform u is an average of the initial values at
    x - sqrt(4 nu t) s with positive weights. The trapezoidal rule in s converges faster
    than exponentially, and at t = 0 nothing is divided by zero.
    """
    step = 0.1
    # The largest weight is at least exp(-1 / (pi nu)) of the one at s = 0.
    reach = np.sqrt(1 / (np.pi * nu) + 45)
    s = step * np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1)

    def row(t):
        y = np.pi * (np.asarray(x)[:, None] - np.sqrt(4 * nu * t) * s)
        exponent = -(s**2) - np.cos(y) / (2 * np.pi * nu)
        weights = np.exp(exponent - exponent.max(axis=1, keepdims=True))
        return -np.sum(weights * np.sin(y), axis=1) / np.sum(weights, axis=1)

    return np.stack([row(each) for each in t])


def eikonal(x, y):
    """u_x^2 + u_y^2 = 1 + 0.01 (u_xx + u_yy) in the unit square, u = 0 on its boundary.

    With u = -0.01 log v this is 1e-4 Laplacian(v) = v, v = 1 on the boundary: v is the
    expectation of exp(-s) at the time s when a Brownian motion leaves the square. Both
    coordinates are independent, and all terms are positive, so that v has full relative
    accuracy down to its minimum of 9e-22.
    """
    step = 0.05
    tau = np.arange(-40, 6, step)
    s = np.exp(tau)
    inside_x, leaves_x = _survival(x, s)
    inside_y, leaves_y = _survival(y, s)
    v = (leaves_x * step * s * np.exp(-s)) @ inside_y.T
    v += (inside_x * step * s * np.exp(-s)) @ leaves_y.T
    edge = np.logical_or.outer(np.isin(x, (0, 1)), np.isin(y, (0, 1)))
    return -0.01 * np.log(np.where(edge, 1.0, v))


# For a Brownian motion of diffusivity 1e-4 that starts at x in (0, 1): the probability
# that it is still there at time s, and the density of the time at which it leaves.
def _survival(x, s):
    x = np.asarray(x)[:, None]
    width = np.sqrt(4e-4 * s)
    images = range(-3, 4)
    inside = sum((-1) ** n * erf((x + n) / width) for n in images)

    def through_zero(x):
        scaled = [(x + 2 * n) / width for n in images]
        return sum(z * np.exp(-(z**2)) for z in scaled) / (np.sqrt(np.pi) * s)

    return inside, through_zero(x) + through_zero(1 - x)


#
# Cosine series
#


# From c to the values of c_0 + 2 sum_k c_k cos(k theta) at theta = 0, pi / K, .., pi,
# and back. Of the last mode these take one half, so it should be negligible or dropped.
def _values(c):
    return dct(c, type=1)


def _coefficients(values):
    return dct(values, type=1) / (2 * (values.shape[-1] - 1))


def _evaluate(c, theta):
    k = np.arange(c.shape[-1])
    return (np.where(k == 0, 1, 2) * c) @ np.cos(np.outer(k, theta))


# From c' = rates * c + coefficients of the reaction, for increasing times.
def _react_and_diffuse(reaction, rates, c, t):
    def velocity(_, c):
        c = c.reshape(rates.shape)
        return (rates * c + _coefficients(reaction(_values(c)))).ravel()

    # Half of what is stable, for interpolation between steps to be accurate too.
    options = dict(rtol=1e-12, atol=1e-14, max_step=2 / np.max(np.abs(rates)))
    # An empty interval of time is refused.
    span = (0, max(t[-1], 1e-9))
    found = solve_ivp(velocity, span, c.ravel(), "DOP853", t, **options)
    return found.y.T.reshape(-1, *rates.shape)


def gray_scott(t, x, u, v, num_modes=128):
    """u_t = 1e-3 u_xx - u v^2 + 0.04 (1 - u), v_t = 2e-3 v_xx + u v^2 - 0.1 v.

    For x in (0, 1), with u_x = v_x = 0 at both ends. The functions u(x) and v(x) are
    the initial data, which satisfy this too.
    """
    nodes = np.linspace(0, 1, num_modes + 1)
    squares = (np.pi * np.arange(num_modes + 1)) ** 2
    rates = np.stack([-1e-3 * squares - 0.04, -2e-3 * squares - 0.1])

    def reaction(values):
        u, v = values
        return np.stack([0.04 - u * v**2, u * v**2])

    t, order = np.unique(t, return_inverse=True)
    start = _coefficients(np.stack([u(nodes), v(nodes)]))
    c = _react_and_diffuse(reaction, rates, start, t)[order]
    u, v = np.moveaxis(_evaluate(c, np.pi * np.asarray(x)), 1, 0)
    return u, v


gray_scott_starts = {
    "main": (lambda x: -np.cos(3 * np.pi * x), lambda x: np.cos(2 * np.pi * x)),
    "a": (lambda x: np.cos(7 * np.pi * x), lambda x: -np.cos(2 * np.pi * x)),
    "b": (lambda x: -np.cos(4 * np.pi * x), lambda x: np.cos(5 * np.pi * x)),
    "c": (lambda x: np.cos(8 * np.pi * x), lambda x: np.cos(5 * np.pi * x)),
}


#
# Cosine series of initial values with a kink
#
# The periodic initial values have a jump of slope at the ends, and so coefficients that
# decay like k^-2, which no affordable number of modes exhausts. But they are known, and
# the high ones evolve by a simple law.
#


# sum c_k cos(k theta) and sum c_k sin(k theta) / k over first <= k < 2^17, where c_k =
# 2 coefficient(k) exp(t rate(k)).
def _tail(coefficient, rate, first, t, theta):
    cosines = sines = 0
    size = 2**13
    for start in range(first, 2**17, size):
        k = np.arange(start, min(start + size, 2**17))
        c = 2 * coefficient(k) * np.exp(np.outer(t, rate(k)))
        angles = np.outer(k, theta)
        cosines = cosines + c @ np.cos(angles)
        sines = sines + (c / k) @ np.sin(angles)
    return cosines, sines


def allen_cahn(t, x, num_modes=1536):
    """u_t = 1e-4 u_xx + 5 u - 5 u^3, periodic in (-1, 1), u = x^2 cos(pi x) at t = 0.

    The slope jumps by 4 at x = 1 and t = 0, and is smooth before u = -1 there, where
    (5 u - 5 u^3)' = -10, has changed.
    """

    def rate(k):
        return -1e-4 * (np.pi * k) ** 2

    def integral(n):  # of x^2 cos(n pi x) from 0 to 1
        nonzero = np.where(n == 0, 1, n)
        return np.where(n == 0, 1 / 3, 2 * (-1.0) ** n / (np.pi * nonzero) ** 2)

    def coefficient(k):
        return (integral(k - 1) + integral(k + 1)) / 2

    def reaction(u):
        return 5 * u - 5 * u**3

    x = np.asarray(x)
    times, order = np.unique(t, return_inverse=True)
    k = np.arange(num_modes + 1)
    c = _react_and_diffuse(reaction, rate(k), coefficient(k), times)[:, :num_modes]
    tail, _ = _tail(coefficient, lambda k: rate(k) - 10, num_modes, times, np.pi * x)
    u = _evaluate(c, np.pi * x) + tail
    # The tail has an end too.
    u[times == 0] = x**2 * np.cos(np.pi * x)
    return u[order]


# A splitting of order 6 for the case that one part is quadratic in momenta, by Blanes
# and Moan (2002): fractions of a step for the potential, which begins and ends it, and
# for the Laplacian.
_potential = [
    0.0414649985182624,
    0.198128671918067,
    -0.0400061921041533,
    0.0752539843015807,
    -0.0115113874206879,
]
_potential += [0.5 - sum(_potential)]
_potential += _potential[::-1]
_laplacian = [
    0.123229775946271,
    0.290553797799558,
    -0.127049212625417,
    -0.246331761062075,
    0.357208872795928,
]
_laplacian += [1 - 2 * sum(_laplacian)]
_laplacian += _laplacian[-2::-1]


# The values at the increasing times t. Both parts of the equation are solved exactly in
# turn: h_t = i |h|^2 h leaves |h| as it is.
def _split_steps(h, frequencies, t, longest):
    now = 0.0
    for each in t:
        num_steps = int(np.ceil((each - now) / longest))
        step = (each - now) / max(num_steps, 1)
        phases = [np.exp(-1j * step * a * frequencies) for a in _laplacian]
        for _ in range(num_steps):
            h = h * np.exp(1j * step * _potential[0] * np.abs(h) ** 2)
            for phase, b in zip(phases, _potential[1:]):
                h = _values(phase * _coefficients(h))
                h = h * np.exp(1j * step * b * np.abs(h) ** 2)
        now = each
        yield h


def schroedinger(t, x, num_modes=1024, step=8e-5):
    """h = u + i v, with i h_t + h_xx / 2 + |h|^2 h = 0, h = 2 sech(x) at t = 0.

    Periodic in (-5, 5), where the slope of the initial values jumps by 0.054 at x = 5.
    Modes of large wavenumber q move so fast that, up to terms in q^-2, they are those
    of h = (1 - P D^-1) r: here r obeys the linear equation with the mean m of 2 |h|^2,
    which is constant, D^-1 is integration and P_x = 2 |h|^2 - m.
    """
    # Steps of 1e-4 and more are in resonance with some modes, and lose another 1e-8.
    # On the grid, the last modes exchange with those that it has not.
    num_kept = 4 * num_modes // 5
    mean = 1.6 * np.tanh(5)

    def wavenumber(k):
        return np.pi * k / 5

    # The integral of 2 sech(x) cos(wavenumber x) from 0 to infinity, less that from 5.
    def coefficient(k):
        q = wavenumber(k)
        decay = np.exp(-np.pi * q / 2)
        odd = np.array([1, -3, 5, -7, 9])
        terms = odd * np.exp(-5 * abs(odd)) / (odd**2 + q[:, None] ** 2)
        beyond = 4 * (-1.0) ** k * np.sum(terms, axis=1)
        return (2 * np.pi * decay / (1 + decay**2) - beyond) / 5

    def rate(k):
        return 1j * (mean - wavenumber(k) ** 2 / 2)

    x = np.asarray(x)
    times, order = np.unique(t, return_inverse=True)
    k = np.arange(num_modes + 1)
    start = _values(coefficient(k).astype(complex))
    steps = _split_steps(start, wavenumber(k) ** 2 / 2, times, step)
    values = np.stack(list(steps))
    theta = wavenumber(1) * x
    tail, integral = _tail(coefficient, rate, num_kept, times, theta)
    potential = 2 * _coefficients(2 * np.abs(values) ** 2)[:, 1:num_kept]
    p = (potential / wavenumber(k[1:num_kept])) @ np.sin(np.outer(k[1:num_kept], theta))
    low = _evaluate(_coefficients(values)[:, :num_kept], theta)
    h = low + tail - p * integral / wavenumber(1)
    h[times == 0] = 2 / np.cosh(x)
    h = h[order]
    return h.real, h.imag


#
# Chebyshev collocation
#


def darcy_log_permeability(x):
    """Of points, of shape (n, 2)."""
    s = np.sin(2 * np.pi * x).sum(axis=1)
    return np.logaddexp(s, -s)


def darcy(x, degree=48):
    """-div(exp(a) grad u) = 1 in the unit square, u = 0 on its boundary, with
    exp(a) = exp(s) + exp(-s), s = sin 2 pi x + sin 2 pi y.

    At points, of shape (n, 2).
    """
    theta = np.pi * np.arange(degree + 1) / degree
    nodes = 0.5 * (1 - np.cos(theta))
    # Barycentric weights, and the matrix of the derivative (Berrut and Trefethen).
    weights = (-1.0) ** np.arange(degree + 1)
    weights[[0, -1]] *= 0.5
    apart = nodes[:, None] - nodes[None, :] + np.eye(degree + 1)
    d = weights[None, :] / weights[:, None] / apart
    np.fill_diagonal(d, 0)
    np.fill_diagonal(d, -d.sum(axis=1))
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    permeability = np.exp(darcy_log_permeability(grid))[:, None]
    eye = np.eye(degree + 1)
    dx, dy = np.kron(d, eye), np.kron(eye, d)
    operator = -(dx @ (permeability * dx) + dy @ (permeability * dy))
    inner = np.all((grid > 0) & (grid < 1), axis=1)
    u = np.zeros(len(grid))
    u[inner] = np.linalg.solve(operator[np.ix_(inner, inner)], np.ones(inner.sum()))

    def interpolation(x):
        difference = x[:, None] - nodes[None, :]
        exact = np.abs(difference) < 1e-14
        terms = weights / np.where(exact, 1.0, difference)
        terms = np.where(exact.any(axis=1, keepdims=True), exact, terms)
        return terms / terms.sum(axis=1, keepdims=True)

    left, right = interpolation(x[:, 0]), interpolation(x[:, 1])
    return np.einsum("ni,ij,nj->n", left, u.reshape(degree + 1, -1), right)
