"""Scaled dot-product attention behind one function. What computes it is chosen by the platform; over a mesh every
device attends for its own pictures and heads, and the positions are exchanged over `context`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lwd_jax.nn.blockwise import blockwise_attention
from lwd_jax.nn.platform import platform
from lwd_jax.nn.sharding import ambient_mesh, axis_size, batch_axes
from lwd_jax.shapes import shaped

SAVED = "attention"  # the name under which remat policies know what a kernel's backward pass needs
_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))

# ------------------------------------------------------------------------------------------------------- kernels
# (q [B L N d], k and v [B S N d], real [B S] bool, the keys to attend to, or None) -> [B L N d] in the dtype of q.


def blockwise(q, k, v, real):
    """Plain products, block by block; what its backward pass needs is named `SAVED`."""
    return blockwise_attention(q, k, v, real, name=SAVED)


def _cudnn(q, k, v, real):
    """Fused, never keeps an L x L matrix; half precision and head sizes up to 128 in steps of 8 only.

    To train, cuDNN wants even lengths, and a mask as a bias of L x S. Odd lengths are padded instead, keys that are
    padding are moved behind the others, and it is told how many there are.

    Where jax finds no cuDNN, a program that is traced for a GPU elsewhere has plain products instead, for `lwd plan` to
    count; on a GPU that is an error.

    The output has no name: the remat policy keeps all that the fused primitive returns, the output among it, and would
    keep a named copy beside it.
    """
    if q.dtype not in _HALF or q.shape[-1] % 8 or q.shape[-1] > 128:
        return blockwise(q, k, v, real)
    given, lengths = (q, k, v, real), {}
    (rows, queries), keys = q.shape[:2], k.shape[1]
    if real is not None or queries % 2 or keys % 2:
        found = jnp.full(rows, keys) if real is None else real.sum(1)
        lengths = {
            "query_seq_lengths": jnp.full(rows, queries, jnp.int32),
            "key_value_seq_lengths": found.astype(jnp.int32),
        }
    if real is not None:
        order = jnp.argsort(~real, axis=1, stable=True)[..., None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)[:, :queries]
    except RuntimeError:
        if jax.default_backend() == "gpu":
            raise
    return blockwise(*given)


def splash(q, k, v, real):
    """Fused, never keeps an L x L matrix; what its backward pass needs is named `SAVED`."""
    from lwd_jax.nn.splash import splash_attention  # Pallas takes a second to import, and only a TPU needs it

    return splash_attention(q, k, v, real, name=SAVED)


KERNELS = {"gpu": _cudnn, "tpu": splash}  # platform -> kernel; one that is not named uses `blockwise`


def by_platform(kernels: Mapping[str, Callable]) -> Callable:
    """The kernel of the platform that it is traced for, `blockwise` where none is named for it."""

    def kernel(q, k, v, real):
        return kernels.get(platform(), blockwise)(q, k, v, real)

    return kernel


_attend = by_platform(KERNELS)


# ----------------------------------------------------------------------------------------------------- attention


class Tokens(NamedTuple):
    """One kind of tokens in an attention.

    Attributes:
      q: [B L N d] queries; None: nothing comes of what they attend to.
      k, v: [B S N d] keys and values; S = L but in cross-attention.
      real: [B S] bool, the keys to attend to; the rest is padding. None = all.
    """

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    real: jax.Array | None = None


def _together(kinds: Sequence[Tokens], attend) -> tuple:
    """Attention of all queries to all keys, by `attend`; the results of each kind, None where it has no queries."""
    queries = [kind.q for kind in kinds if kind.q is not None]
    k, v = (jnp.concatenate([getattr(kind, name) for kind in kinds], axis=1) for name in "kv")
    real = None
    if any(kind.real is not None for kind in kinds):
        whole = [jnp.ones(kind.k.shape[:2], bool) if kind.real is None else kind.real for kind in kinds]
        real = jnp.concatenate(whole, axis=1)
    found = attend(jnp.concatenate(queries, axis=1), k, v, real)
    parts = iter(jnp.split(found, np.cumsum([q.shape[1] for q in queries])[:-1], axis=1))
    return tuple(None if kind.q is None else next(parts) for kind in kinds)


def _padded(kind: Tokens, parts: int) -> Tokens:
    """With padding up to multiples of `parts`."""

    def pad(x):
        return None if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % parts), *((0, 0),) * (x.ndim - 2)))

    uneven = kind.k.shape[1] % parts
    real = jnp.ones(kind.k.shape[:2], bool) if kind.real is None and uneven else kind.real
    return Tokens(*map(pad, (kind.q, kind.k, kind.v, real)))


def exchange(heads: int, parts: int) -> str:
    """How positions that are split over `parts` devices meet: "none", "ulysses" (all-to-all: every device gets all
    positions of its share of the heads, arXiv 2309.14509) where the heads divide, else "gather" (all keys and values).

    Args:
      heads: of each device, before the exchange.
    """
    return "none" if parts == 1 else "ulysses" if heads % parts == 0 else "gather"


def _exchanged(way: str, kernel, q, k, v, real):
    """A device's share of the positions -> its share of the result."""

    @jax.named_scope("exchange")
    def whole(x):
        return None if x is None else jax.lax.all_gather(x, "context", axis=1, tiled=True)

    @jax.named_scope("exchange")
    def swap(x, split, concat):
        return jax.lax.all_to_all(x, "context", split_axis=split, concat_axis=concat, tiled=True)

    if way == "ulysses":
        return swap(kernel(*(swap(x, 2, 1) for x in (q, k, v)), whole(real)), 1, 2)
    return kernel(q, whole(k), whole(v), whole(real)) if way == "gather" else kernel(q, k, v, real)


@jax.named_scope("attention")
def joint_attention(*kinds: Tokens, kernel=_attend) -> tuple:
    """Attention of several kinds of tokens to all of them: softmax(q k^T / sqrt(d)) v per head.

    Under a mesh (see nn.sharding) pictures lie over (data, fsdp), heads over tensor and positions over context; kinds
    whose length does not divide are padded. Attention does not mind the order of keys, so that nothing moves to bring
    the kinds together.

    Args:
      kinds: the tokens.
      kernel: what computes a device's part, see KERNELS; by default that of the platform.

    Returns:
      For every kind [B L N d] in the dtype of q, or None where it has no queries; the softmax accumulates in float32.
      Float32 operands are multiplied in full precision. Remat policies know what the kernels name `SAVED`.
    """
    if ambient_mesh() is None:
        return _together(kinds, kernel)
    context, tensor = axis_size("context"), axis_size("tensor")
    batch, _, heads, _ = kinds[0].k.shape
    split = "tensor" if heads % tensor == 0 else None
    way = exchange(heads // tensor if split else heads, context)

    def local(kinds):
        return _together(kinds, functools.partial(_exchanged, way, kernel))

    rows = batch_axes(batch)
    spec, flags = PartitionSpec(rows, "context", split, None), PartitionSpec(rows, "context")
    given = [_padded(kind, context) for kind in kinds]
    specs = [Tokens(*(None if x is None else s for x, s in zip(kind, (spec, spec, spec, flags)))) for kind in given]
    found = jax.shard_map(local, in_specs=(specs,), out_specs=spec, check_vma=False)(given)
    return tuple(None if x is None else x[:, : kind.q.shape[1]] for x, kind in zip(found, kinds))


@shaped("q: B L N d, k: B S N d, v: B S N d -> B L N d")
def attention(q, k, v, *, real=None, kernel=_attend):
    """`joint_attention` of one kind of tokens, with real [B S] bool: the keys to attend to; None = all."""
    return joint_attention(Tokens(q, k, v, real), kernel=kernel)[0]
