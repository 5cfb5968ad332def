from ._blocks import (
    covariance as covariance,
    variances as variances,
)
from ._functionals import (
    Block as Block,
    Jets as Jets,
    Kernels as Kernels,
    one_by_one as one_by_one,
    one_sides as one_sides,
)
from ._operator import (
    dense as dense,
    GramOperator as GramOperator,
    Noise as Noise,
)
from ._products import (
    covariance_product as covariance_product,
    symmetric_product as symmetric_product,
)
