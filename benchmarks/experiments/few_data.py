"""Darcy flow from ten measurements, which are too few: the noise is given."""

import functools as ft

import darcy


title = "Darcy flow, ten data"
fields, noise, numbers, prior, where = (
    darcy.fields,
    darcy.noise,
    darcy.numbers,
    darcy.prior,
    darcy.where,
)
stated = ft.partial(darcy.stated, num_data=10, declared=darcy.noise)
