"""Threads of BLAS, which otherwise take the cores from everything else."""

import contextlib
import os
from collections.abc import Sequence

from threadpoolctl import threadpool_limits

from ._condition import Condition
from ._mesh import num_shares


# With more conditions factorisations take longer than all else on one thread.
_MOST_FOR_ONE_THREAD = 2000


def free_cores(
    conditions: Sequence[Condition], compiling: bool
) -> contextlib.AbstractContextManager:
    # OpenBLAS's threads wait in busy loops, and take the cores from the compiler; from
    # programs, where there are few; and from other devices of a mesh on the same CPU.
    cores, shares = os.cpu_count() or 1, num_shares()
    few = sum(c.num_targets for c in conditions) <= _MOST_FOR_ONE_THREAD
    threads = None
    if shares > 1:
        threads = max(1, cores // shares)
    if few and (compiling or cores <= 2):
        threads = 1
    if threads is None:  # Looking for libraries takes two milliseconds.
        return contextlib.nullcontext()
    return threadpool_limits(threads, user_api="blas")
