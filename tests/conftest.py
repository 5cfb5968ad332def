import os


# The tests run in as many processes as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Small arrays: nearly all of the time goes into compiling.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey():
    return eqxi.GetKey()
