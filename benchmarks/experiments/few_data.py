"""Darcy flow from ten measurements, which are too few: the noise is given."""

import functools as ft

import darcy


title = "Darcy flow, ten data"
fields = darcy.fields
noise = darcy.noise
numbers = darcy.numbers
prior = darcy.prior
where = darcy.where
stated = ft.partial(darcy.stated, num_data=10, declared=darcy.noise)
