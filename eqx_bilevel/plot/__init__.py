from ._functions import (
    error as error,
    slices as slices,
    solution as solution,
    std as std,
)
from ._progress import learning as learning
from ._style import subplots as subplots
