"""The mesh that a program is traced for, as models see it: `jax.sharding.use_abstract_mesh` around the call;
without one, nothing is constrained.

A residual stream [B L D] lies over (data, fsdp) by picture and over `context` by position.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")  # what the first axis of a batch is split over


def ambient_mesh() -> AbstractMesh | None:
    """The mesh with the axes AXES that this is traced under, or None; one device has nothing to divide, and is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh is not None and mesh.axis_names == AXES and mesh.size > 1 else None


def axis_size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without a mesh."""
    mesh = ambient_mesh()
    return mesh.shape[axis] if mesh is not None else 1


def batch_axes(size: int) -> tuple[str, ...] | None:
    """The axes that a batch of `size` is split over: all of BATCH_AXES, or none where it does not divide."""
    mesh = ambient_mesh()
    return BATCH_AXES if mesh is not None and size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Pins a residual stream [B L D] to its layout; an axis that does not divide is left whole."""
    if ambient_mesh() is None:
        return x
    context = "context" if x.shape[1] % axis_size("context") == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x.shape[0]), context, None))


def _shares(lengths) -> int:
    """Devices of `context` that each hold a share of every one of these lengths; 1 where one does not divide."""
    parts = axis_size("context")
    return parts if all(length % parts == 0 for length in lengths) else 1


def join_tokens(*kinds: jax.Array) -> jax.Array:
    """Several kinds of tokens [B L ..] as one sequence, in an order in which nothing moves between devices: for every
    device of `context` its share of each kind, one kind after the other. Attention does not mind the order."""
    parts = _shares([x.shape[1] for x in kinds])
    shares = [x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:]) for x in kinds]
    whole = jnp.concatenate(shares, axis=2)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])


def split_tokens(x: jax.Array, *lengths: int) -> tuple[jax.Array, ...]:
    """The inverse of `join_tokens` for kinds of these lengths."""
    parts = _shares(lengths)
    shares = x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:])
    cuts = np.cumsum([length // parts for length in lengths])[:-1]
    return tuple(kind.reshape(x.shape[0], -1, *x.shape[2:]) for kind in jnp.split(shares, cuts, axis=2))
