"""Rows of large arrays, shared between the devices of a mesh.

A mesh with an axis called `points`, which the caller sets by `jax.set_mesh`, shares
them; without one nothing changes.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree


AXIS = "points"


def num_shares() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.axis_names else 1


def on_each(fn: Callable[..., PyTree[Array]], *args: PyTree) -> PyTree[Array]:
    # `fn(which, *args)` on each device, where all of `args` are. `which` is the number
    # of its share. All must return the same.
    arrays, static = eqx.partition(args, eqx.is_array)

    def on_one_device(arrays):
        return fn(jax.lax.axis_index(AXIS), *eqx.combine(arrays, static))

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_one_device, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )(arrays)


def padded(rows: Array) -> Array:
    # With rows of zeros, for all shares to be of the same size.
    padding = -len(rows) % num_shares()
    return jnp.pad(rows, ((0, padding),) + ((0, 0),) * (rows.ndim - 1))


def shared(rows: Array) -> Array:
    # Each device keeps its share. The rest is up to the compiler.
    if num_shares() == 1:
        return rows
    return jax.lax.with_sharding_constraint(rows, PartitionSpec(AXIS))


def tall_qr(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    # That of each share, and then that of their triangles.
    if num_shares() == 1:
        return jnp.linalg.qr(matrix)

    def of_share(mine):
        q, r = jnp.linalg.qr(mine)
        outer, r = jnp.linalg.qr(jax.lax.all_gather(r, AXIS, tiled=True))
        start = jax.lax.axis_index(AXIS) * q.shape[1]
        return q @ jax.lax.dynamic_slice_in_dim(outer, start, q.shape[1]), r

    return jax.shard_map(
        of_share,
        in_specs=PartitionSpec(AXIS),
        out_specs=(PartitionSpec(AXIS), PartitionSpec()),
        check_vma=False,
    )(matrix)
