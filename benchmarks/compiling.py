"""How long a learning run compiles: Burgers' equation at 300 + 100 points, with the
network of 2802 weights, in a fresh process.

The same run twice, for three steps: what the first takes more than the second is
tracing and compiling.

    python benchmarks/compiling.py
    python benchmarks/compiling.py --adam
"""

import argparse
import json
import time

import eqx_bilevel as eb
import jax
import optax
from hypergradient import cases, stated
from measuring import peak_mb


jax.config.update("jax_enable_x64", True)


def run(adam: bool) -> float:
    start = time.perf_counter()
    prior, conditions, objective, kernel = stated(cases["burgers"], 300, 100)
    options = dict(optimiser=optax.adam(1e-3), gradient="frozen", scale_search=False)
    options = dict(options if adam else {}, steps=3, throw=False)
    eb.learn(prior(kernel), conditions, objective, **options)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adam", action="store_true", help="with frozen gradients")
    adam = parser.parse_args().adam
    first, again = run(adam), run(adam)
    seconds = dict(first_s=first, again_s=again, compile_s=first - again)
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    print(json.dumps(dict(adam=adam, **rounded, peak_mb=peak_mb())))
