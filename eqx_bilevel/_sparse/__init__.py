from ._system import SparseCholesky as SparseCholesky
