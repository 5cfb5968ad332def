"""The regularised eikonal equation with a deep kernel."""

import functools as ft

import eikonal
from deep_burgers import kernel


title = "Eikonal, deep kernel (published: network)"
published = eikonal.published
compare = eikonal.compare
run = ft.partial(eikonal.run, kernel=kernel)
