"""Gray-Scott with the kernel that the published code learned, and none learned here.

Points and nuggets are those of the other experiments, so that the rest of what differs
is due to what is learned.
"""

import eqx_bilevel as eb
import gray_scott
import gray_scott_reuse
import numpy as np
from common import Published, Run
from gray_scott_reuse import solve_all, starts


title = "Gray-Scott, published kernel"
published = Published(
    {f"main: {name}": errors for name, errors in gray_scott.published.errors.items()}
    | gray_scott_reuse.published.errors
)

# There a Gaussian is exp(-r^2 / l^2).
lengths = {"u": (1.054, 0.117), "v": (1.503, 0.112)}
prior = {
    name: eb.GaussianProcess(eb.Gaussian(np.array(each) / np.sqrt(2)))
    for name, each in lengths.items()
}


def run(key, n=600):
    conditions, objective = gray_scott.stated(key, n, gray_scott.start)

    def all_four(prior):
        one = eb.solve(prior, conditions, throw=False)
        return one, solve_all(prior, conditions, starts)

    options = dict(steps=0, scale_search=False, throw=False)
    not_learned = eb.learn(prior, conditions, objective, **options)
    return Run(lambda: all_four(gray_scott.prior), all_four(prior), not_learned)


def compare(solutions):
    main, others = solutions
    pairs = {f"main: {name}": pair for name, pair in gray_scott.compare(main).items()}
    return pairs | gray_scott_reuse.compare(others)
