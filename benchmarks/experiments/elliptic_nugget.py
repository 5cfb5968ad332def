"""The elliptic equation, with the nugget that was published."""

import functools as ft

import elliptic


title = "Elliptic, nugget 1e-10"
published = elliptic.published
run = ft.partial(elliptic.run, nugget=1e-10)
compare = elliptic.compare
