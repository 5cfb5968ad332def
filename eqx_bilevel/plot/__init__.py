from ._functions import error as error, solution as solution, std as std
from ._problem import lengthscales as lengthscales, points as points
from ._progress import convergence as convergence, learning as learning
from ._slices import slices as slices
from ._style import subplots as subplots
