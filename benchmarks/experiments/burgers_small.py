"""Burgers' equation at viscosity 0.002, where the kernel learned at 0.02 fails."""

import functools as ft

import burgers_front


title = "Burgers, viscosity 0.002, by continuation"
published = burgers_front.Published({"u": (0.108, 2.7)})
viscosity = 0.002

run = ft.partial(burgers_front.run, viscosity=viscosity, num=10)
compare = ft.partial(burgers_front.compare, viscosity=viscosity)
