from ._factor import (
    factorise as factorise,
    Functionals as Functionals,
    Pattern as Pattern,
    SparseFactor as SparseFactor,
)
from ._plan import Plan as Plan, plan as plan
from ._regression import (
    conditions_operator as conditions_operator,
    regress as regress,
    SparseRegression as SparseRegression,
)
