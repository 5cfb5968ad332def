from ._algebra import (
    Product as Product,
    Scaled as Scaled,
    Stretched as Stretched,
    Subspace as Subspace,
    Sum as Sum,
)
from ._base import (
    AbstractFeatureKernel as AbstractFeatureKernel,
    AbstractKernel as AbstractKernel,
    AbstractRadialKernel as AbstractRadialKernel,
    rescale as rescale,
    smoothness as smoothness,
)
from ._elementary import (
    Constant as Constant,
    Periodic as Periodic,
    Polynomial as Polynomial,
)
from ._feature import Gibbs as Gibbs, Warped as Warped
from ._fixed import fixed_numbers as fixed_numbers
from ._network import LengthscaleNetwork as LengthscaleNetwork
from ._radial import (
    Gaussian as Gaussian,
    Matern as Matern,
    RationalQuadratic as RationalQuadratic,
)
