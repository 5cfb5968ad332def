"""Burgers' equation at viscosity 0.002, where the kernel learned at 0.02 fails."""

import functools as ft

import burgers_front
from common import Published


title = "Burgers, viscosity 0.002, by continuation"
published = Published({})

viscosity = 0.002

run = ft.partial(burgers_front.run, viscosity=viscosity, num=10)
compare = ft.partial(burgers_front.compare, viscosity=viscosity)
