"""What the benchmarks of a gradient step share: measurements, one to a process."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


def compiled(
    fn: Callable, *arguments: Any, compiler_options: dict[str, Any] | None = None
) -> tuple[Any, float]:
    """A function, compiled, and the seconds that took."""
    start = time.perf_counter()
    jitted = eqx.filter_jit(fn, compiler_options=compiler_options)
    step = jitted.lower(*arguments).compile()
    return step, time.perf_counter() - start


def timed(step: Callable, *arguments: Any, repeats: int) -> tuple[Any, dict]:
    """What a step returns, and the wall time of the fastest of some."""
    seconds = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        outcome = jax.block_until_ready(step(*arguments))
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, cpu = min(seconds)
    return outcome, dict(step_s=round(wall, 5), cpu_per_wall=round(cpu / wall, 2))


def buffers_mb(step: Any) -> float:
    """What a compiled step allocates, according to the compiler."""
    memory = step.compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return round((total + memory.temp_size_in_bytes) / 2**20, 3)


def peak_mb() -> int:
    """The most memory that this process has had so far, compilation included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_own_process(script: str, *arguments: Any) -> dict[str, Any]:
    """Runs a script whose last line is of JSON, passes that on and returns its row."""
    command = [sys.executable, script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    last = run.stdout.splitlines()[-1]
    print(last, flush=True)
    return json.loads(last)
