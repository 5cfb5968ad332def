from ._ball import Ball as Ball
from ._box import Box as Box
from ._combination import (
    AbstractCombination as AbstractCombination,
    Difference as Difference,
    Intersection as Intersection,
    Union as Union,
)
from ._domain import AbstractDomain as AbstractDomain
from ._point_cloud import PointCloud as PointCloud
from ._polygon import Polygon as Polygon
from ._sampling import (
    as_key as as_key,
    farthest as farthest,
    farthest_first as farthest_first,
)
