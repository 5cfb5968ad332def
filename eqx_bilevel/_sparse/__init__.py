from ._factor import (
    factorise as factorise,
    Functionals as Functionals,
    Pattern as Pattern,
    SparseFactor as SparseFactor,
)
