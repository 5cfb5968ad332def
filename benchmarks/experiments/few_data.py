"""Darcy flow from ten measurements, which are too few: the noise is given.

They are too few for learning how the log-permeability varies, too. Its evidence is best
without any variation in some seeds, and bars are then far too small. So the lengthscale
and the variance are held, and only the mean is learned.
"""

import functools as ft

import darcy
import eqx_bilevel as eb


title = "Darcy flow, ten data"
fields = darcy.fields
noise = darcy.noise
numbers = darcy.numbers
where = darcy.where
stated = ft.partial(darcy.stated, num_data=10, declared=darcy.noise)


def prior():
    held = eb.Scaled(eb.Gaussian(eb.Frozen(0.3)), eb.Frozen(1.0))
    return darcy.prior() | {"a": eb.GaussianProcess(held, mean=0.0)}
