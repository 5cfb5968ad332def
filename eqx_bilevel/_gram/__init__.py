from ._blocks import (
    Block as Block,
    covariance as covariance,
    covariance_product as covariance_product,
    Jets as Jets,
    Kernels as Kernels,
    one_by_one as one_by_one,
    one_sides as one_sides,
    variances as variances,
)
from ._operator import (
    dense as dense,
    GramOperator as GramOperator,
    Noise as Noise,
)
