"""Darcy flow from ten measurements, which are too few."""

import functools as ft

import darcy


title = "Darcy flow, ten data"
stated = ft.partial(darcy.stated, num_data=10, declared=darcy.noise)
