"""The regularised eikonal equation with a deep kernel."""

import eikonal
import eqx_bilevel as eb
import jax
from common import coarse_to_fine
from deep_burgers import kernel


title = "Eikonal, deep kernel"
published = eikonal.published
compare = eikonal.compare


def run(key, n=900):
    key, network_key = jax.random.split(key)
    return coarse_to_fine(
        eb.GaussianProcess(kernel(network_key)),
        lambda n: eikonal.stated(key, n),
        sizes=(n // 3, n),
        steps=(200, 60),
    )
