"""Burgers' equation at viscosity 0.002, where the kernel learned at 0.02 fails."""

import functools as ft

import burgers_front
from common import place_most, Published


title = "Burgers, viscosity 0.002, by continuation"
published = Published({"u": (0.108, 2.7)})

viscosity = 0.002


def stated(key, viscosity, n, place):
    return burgers_front.stated(key, viscosity, n, ft.partial(place_most, place))


def run(key, n=1000):
    options = dict(num=10, stated=stated, enough=1e-5)
    return burgers_front.run(key, n, viscosity, **options)


compare = ft.partial(burgers_front.compare, viscosity=viscosity)
