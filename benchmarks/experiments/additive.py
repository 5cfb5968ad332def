"""The elliptic equation with a sum of kernels: four hyperparameters."""

import elliptic
import eqx_bilevel as eb
from common import learned_from, Published


title = "Elliptic, additive kernel"
published = Published({"u": (None, 1.03e-5)}, 310)
compare = elliptic.compare


def run(key, n=900):
    kernel = eb.Scaled(eb.Gaussian(1.0), 1.0) + eb.Polynomial(2)
    return learned_from(eb.GaussianProcess(kernel), *elliptic.stated(key, n))
