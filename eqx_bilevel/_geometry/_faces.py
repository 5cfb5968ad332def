"""The bounds and the faces of a box."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ._sampling import as_count, as_counts, as_floats, Count, numbers_of


SIDES = ("lower", "upper")


def corners(
    lower: ArrayLike | Sequence[ArrayLike], upper: ArrayLike | Sequence[ArrayLike]
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    low, up = (jnp.atleast_1d(x) for x in as_floats(lower=lower, upper=upper))
    if low.shape != up.shape or low.ndim != 1 or low.size == 0:
        raise ValueError(
            "`lower` and `upper` must have one number for each dimension, got shapes "
            f"{low.shape} and {up.shape}."
        )
    a, b = numbers_of(lower), numbers_of(upper)
    if a is not None and b is not None:
        if not np.all((a < b) & np.isfinite(a) & np.isfinite(b)):
            raise ValueError(
                "`lower` must be less than `upper` in every dimension, and both must "
                f"be finite, got lower={a.tolist()} and upper={b.tolist()}."
            )
    return low, up


def all_faces(dim: int) -> list[tuple[int, str]]:
    return [(axis, side) for axis in range(dim) for side in SIDES]


def as_faces(dim: int, faces: Any) -> list[tuple[int, str]]:
    if faces is None:
        return all_faces(dim)
    try:
        pairs = [(axis, side) for axis, side in faces]
        ok = len(pairs) > 0 and len(set(pairs)) == len(pairs)
        ok = ok and all(isinstance(pair, tuple | list) for pair in faces)
    except (TypeError, ValueError):
        ok, pairs = False, []
    if not ok:
        raise ValueError(
            "`faces` must be different pairs `(axis, side)`, at least one of them, got "
            f"{faces!r}. This box has the faces {all_faces(dim)}."
        )
    for axis, side in pairs:
        check_face(dim, axis, side)
    return pairs


def check_face(dim: int, axis: int, side: str) -> None:
    if not (isinstance(axis, int | np.integer) and 0 <= axis < dim):
        raise ValueError(
            f"`axis` must be at least 0 and less than {dim}, the dimension of the box, "
            f"got {axis!r}."
        )
    if side not in SIDES:
        raise ValueError(f"`side` must be 'lower' or 'upper', got {side!r}.")


def counts_per_face(
    dim: int, n: Count, method: str, faces: Sequence[tuple[int, str]]
) -> Sequence[Count]:
    if dim == 1:
        as_counts(n, dim)
        return [1] * len(faces)
    if method == "grid":
        counts = as_counts(n, dim)
        return [counts[:axis] + counts[axis + 1 :] for axis, _ in faces]
    quotient, remainder = divmod(as_count(n), len(faces))
    return [quotient + (i < remainder) for i in range(len(faces))]
