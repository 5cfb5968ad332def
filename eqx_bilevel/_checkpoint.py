"""A learning run in a file, from which it goes on bit for bit."""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def _as_weak_as(like: Any, leaf: Any) -> Any:
    # Files do not say whether a type is weak, on which it depends what is compiled.
    if eqx.is_array(leaf) and leaf.ndim == 0 and jax.typeof(like).weak_type:
        return jnp.asarray(leaf.item())
    return leaf


# Of the time since the last writing, how much writing may take.
_SHARE = 0.05


@dataclasses.dataclass
class Checkpoint:
    # A file with a line of JSON and then the leaves of a PyTree.

    path: pathlib.Path
    fingerprint: str
    _latest: tuple[dict, PyTree] | None = None
    _written: float = 0.0
    _took: float = 0.0

    def offer(self, header: dict[str, Any], tree: PyTree) -> None:
        # Writes at once, unless too much time would go into writing.
        self._latest = header, tree
        if time.perf_counter() - self._written > self._took / _SHARE:
            self.flush()

    def flush(self) -> None:
        if self._latest is None or jax.process_index() != 0:
            return
        start = time.perf_counter()
        header, tree = self._latest
        # Under another name first: a process that dies here leaves the old file whole.
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            line = json.dumps(dict(header, fingerprint=self.fingerprint))
            file.write(line.encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree)
        os.replace(unfinished, self.path)
        self._latest = None
        self._written = time.perf_counter()
        self._took = self._written - start

    def exists(self) -> bool:
        return self.path.exists()

    def header(self) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            return self._header(file)

    def read(self, like: PyTree) -> PyTree:
        with open(self.path, "rb") as file:
            self._header(file)
            tree = eqx.tree_deserialise_leaves(file, like)
        return jax.tree.map(_as_weak_as, like, tree)

    def _header(self, file) -> dict[str, Any]:
        try:
            header = json.loads(file.readline())
            found = header["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} exists and was not written by "
                "`eqx_bilevel.learn`."
            ) from error
        if found != self.fingerprint:
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} belongs to a run with other "
                "arguments. To resume it, give the same prior, conditions, objective, "
                "optimiser, gradient, key, solver, `max_inner_steps`, `initial`, "
                "`subset` and `scale_search`; or remove the file to start anew."
            )
        return header
