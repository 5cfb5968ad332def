import os
import threading


# The same random numbers in each run. For others set this to another number.
os.environ.setdefault("EQX_GETKEY_SEED", "0")
# The tests run in as many processes as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# With two threads, JAX 0.10 hangs where batches of matrices meet (see the FAQ).
os.environ.setdefault("NPROC", "8")
# Nearly all of the time goes into compiling, which is faster with these.
flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
flags += " --xla_force_host_platform_device_count=2"  # For tests with several devices.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + flags

import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Small arrays need no optimised programs.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey():
    return eqxi.GetKey()


class Compiled:
    # What XLA compiles, and in which threads.
    def __init__(self):
        self.names: list[str] = []
        self.threads: list[threading.Thread] = []

    def clear(self) -> None:
        self.names.clear()
        self.threads.clear()


@pytest.fixture
def compiled():
    found = Compiled()

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.names.append(kwargs["fun_name"])
            found.threads.append(threading.current_thread())

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    # Each compiled program takes some memory maps, of which a process has only so many:
    # then everything fails, as if there were no memory.
    yield
    jax.clear_caches()
