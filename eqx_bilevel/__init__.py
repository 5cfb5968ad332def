from importlib.metadata import version as _version

from . import plot as plot
from ._adjoint import (
    FixedPointAdjoint as FixedPointAdjoint,
    FrozenAdjoint as FrozenAdjoint,
)
from ._apply import apply as apply
from ._condition import Condition as Condition, GaussianProcess as GaussianProcess
from ._evidence import (
    CrossValidation as CrossValidation,
    NegativeLogEvidence as NegativeLogEvidence,
    NegativeLogPredictive as NegativeLogPredictive,
)
from ._gauss_newton import GaussNewton as GaussNewton
from ._geometry import (
    AbstractCombination as AbstractCombination,
    AbstractDomain as AbstractDomain,
    Ball as Ball,
    Box as Box,
    Difference as Difference,
    Intersection as Intersection,
    PointCloud as PointCloud,
    Polygon as Polygon,
    Union as Union,
)
from ._gpjax import from_gpjax as from_gpjax
from ._hyperprior import NegativeLogHyperprior as NegativeLogHyperprior
from ._jets import Jet as Jet
from ._kernels import (
    AbstractFeatureKernel as AbstractFeatureKernel,
    AbstractKernel as AbstractKernel,
    AbstractRadialKernel as AbstractRadialKernel,
    Constant as Constant,
    Gaussian as Gaussian,
    Gibbs as Gibbs,
    LengthscaleNetwork as LengthscaleNetwork,
    Matern as Matern,
    Periodic as Periodic,
    Polynomial as Polynomial,
    Product as Product,
    RationalQuadratic as RationalQuadratic,
    rescale as rescale,
    Scaled as Scaled,
    smoothness as smoothness,
    Stretched as Stretched,
    Subspace as Subspace,
    Sum as Sum,
    Warped as Warped,
)
from ._learn import learn as learn, Learned as Learned, LearningError as LearningError
from ._matrix_free import MatrixFree as MatrixFree
from ._objectives import (
    AbstractDataObjective as AbstractDataObjective,
    AbstractLeastSquaresObjective as AbstractLeastSquaresObjective,
    AbstractObjective as AbstractObjective,
    Objective as Objective,
)
from ._parameters import (
    AbstractParameter as AbstractParameter,
    Bounded as Bounded,
    Frozen as Frozen,
    Positive as Positive,
    Unconstrained as Unconstrained,
    unwrap as unwrap,
    with_value as with_value,
)
from ._placement import (
    adaptive_points as adaptive_points,
    farthest_points as farthest_points,
)
from ._progress import Progress as Progress
from ._quasi_newton import BoundedBFGS as BoundedBFGS
from ._results import RESULTS as RESULTS
from ._solution import Solution as Solution
from ._solve import solve as solve
from ._sparse import SparseCholesky as SparseCholesky
from ._uncertainty import (
    HyperparameterPosterior as HyperparameterPosterior,
    laplace as laplace,
)
from ._validation import hold_out as hold_out, ValidationResidual as ValidationResidual
from ._whitened import solve_whitened as solve_whitened
from ._windows import solve_windows as solve_windows, Windows as Windows


__version__ = _version("eqx_bilevel")
