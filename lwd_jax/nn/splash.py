"""Attention on TPU: the splash kernel of jax.experimental.pallas, for any lengths.

The kernel takes lengths in whole blocks. Queries and keys are filled up to them, and segment ids keep what was filled
in out of what is real.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK = 1536  # positions at most; the lengths of SD3 and FLUX at 1, 2 and 4 thousand pixels fill such blocks
_WIDE = 128  # channels of a head; with more, blocks are smaller, so that as much lies in the chip's fast memory
_UNIT = 256
_COMPUTE = 640  # keys that are multiplied at a time, at most


def blocks_of(length: int, width: int = _WIDE) -> tuple[int, int]:
    """(number, size) of the equal blocks that hold `length` positions of heads of `width` channels."""
    most = max(2 * _UNIT, BLOCK * _WIDE // max(width, _WIDE))
    number = math.ceil(length / most)
    return number, math.ceil(length / number / _UNIT) * _UNIT


def _part(block: int, limit: int) -> int:
    """The largest multiple of 128 that divides a block and is at most `limit`."""
    return max(part for part in range(128, limit + 1, 128) if block % part == 0)


def block_sizes(queries: int, keys: int) -> kernels.BlockSizes:
    """The kernel's blocks for blocks of so many queries and keys: half the queries backwards, where more is kept."""
    compute, half = _part(keys, _COMPUTE), _part(queries, queries // 2)
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=compute,
        block_q_dkv=half,
        block_kv_dkv=keys,
        block_kv_dkv_compute=_part(keys, keys // 2),
        block_q_dq=half,
        block_kv_dq=keys,
    )


def _filled(x: jax.Array, length: int) -> jax.Array:
    """[B L N d] -> [B N length d]."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))


def _segments(real: jax.Array, length: int) -> jax.Array:
    """[B L] bool -> [B length] int32: 0 where a position is real, 1 where it is not or is filled in."""
    return jnp.pad(1 - real.astype(jnp.int32), ((0, 0), (0, length - real.shape[1])), constant_values=1)


def splash_attention(q, k, v, real: jax.Array | None = None, *, name: str, interpret: bool = False):
    """softmax(q k^T / sqrt(d)) v per head, without an L x S matrix; softmax and sums in float32.

    Args:
      q: [B L N d].
      k, v: [B S N d].
      real: [B S] bool, keys to attend to; None = all.
      name: of what the backward pass needs (output and log-sum-exp), for remat policies.
      interpret: run it without a TPU, slowly.

    Returns:
      [B L N d] in the dtype of q.
    """
    batch, length, heads, width = q.shape
    (number_q, block_q), (number_k, block_k) = blocks_of(length, width), blocks_of(k.shape[1], width)
    shape = (number_q * block_q, number_k * block_k)
    segments = None
    if shape[1] != k.shape[1] or real is not None:
        real = jnp.ones((batch, k.shape[1]), bool) if real is None else real
        queries = jnp.ones((batch, length), bool)
        segments = kernels.SegmentIds(_segments(queries, shape[0]), _segments(real, shape[1]))
    kernel = kernels.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([masks.FullMask(shape)] * heads),
        block_sizes=block_sizes(block_q, block_k),
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    filled = _filled(scaled, shape[0]), _filled(k, shape[1]), _filled(v, shape[1])
    out = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))(*filled, segments)
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)
