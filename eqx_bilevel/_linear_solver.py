"""Which linear solver solves the inner problem."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import lineax as lx
import numpy as np

from ._condition import Condition, is_concrete
from ._gauss_newton import GaussNewton
from ._kernels import smoothness
from ._matrix_free import MatrixFree
from ._parameters import unwrap
from ._problem import priors_of
from ._sparse import SparseCholesky
from ._system import AbstractSystem, DenseSystem


# So many targets are solved for sooner with sparse factors.
_MANY = 8000
# For so few, a hundred steps of learning take less time than compiling.
_FEW = 500


def _most_dense() -> int:
    # So many targets' Gram matrix takes an eighth of the device's memory: factors, and
    # what comes before them, take as much some times over.
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        room = stats["bytes_limit"]
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Unknown, as on Windows.
        room = 24 * 2**30
    return math.isqrt(room // 64)


def with_system(
    solver: GaussNewton, prior: Any, conditions: Sequence[Condition]
) -> GaussNewton:
    # With all that can be prepared before compiling.
    num = sum(c.num_targets for c in conditions)
    system = solver.linear_solver
    if system is None:
        system = _chosen(prior, conditions, num)
    if isinstance(system, SparseCholesky):
        system = system.prepared(prior, conditions)
    if not isinstance(system, AbstractSystem):
        system = DenseSystem(system, is_small=num <= _FEW)
    return dataclasses.replace(solver, linear_solver=system)


def _chosen(
    prior: Any, conditions: Sequence[Condition], num: int
) -> AbstractSystem | lx.AbstractLinearSolver:
    most = _most_dense()
    if num > min(_MANY, most) and _has_sparse_factors(prior, conditions):
        return SparseCholesky()
    return MatrixFree() if num > most else lx.Cholesky()


def _has_sparse_factors(prior: Any, conditions: Sequence[Condition]) -> bool:
    kernels = [p.kernel for p in priors_of(unwrap(prior)).values()]
    return (
        all(np.isfinite(smoothness(kernel)) for kernel in kernels)
        and conditions[0].points.shape[1] <= 3
        and all(is_concrete(c.points) and c.quadrature is None for c in conditions)
    )
