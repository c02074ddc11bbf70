"""Exact single-head self-attention whose memory grows linearly with the number of positions.

The picture's positions attend to all others at the autoencoder's narrowest level: 262,144 of them at 4096 px, where a
matrix of scores would take 256 GiB. The scores are therefore made block by block with a running softmax (Milakov and
Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682) and made again in the backward pass from the saved
log-sum-exp (FlashAttention, arXiv 2205.14135, algorithm 4). The head size of 512 is past what cuDNN's kernels take.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lwd_jax.nn.layers import precision_of
from lwd_jax.shapes import Array, shaped

BLOCK = 2048  # positions per block: 16 MiB of float32 scores a picture
_LANES = 128  # blocks are multiples of it


def _blocks(positions: int, limit: int) -> tuple[int, int]:
    """(number, size) of equal blocks of at most `limit` positions; a single block is exactly as long as the input."""
    number = math.ceil(positions / limit)
    if number == 1:
        return 1, positions
    size = math.ceil(positions / number / _LANES) * _LANES
    return math.ceil(positions / size), size


def _split(x: Array, number: int, size: int) -> Array:
    """[B N D] -> [blocks B size D], zeros after the last position."""
    batch, positions, width = x.shape
    padded = jnp.pad(x, ((0, 0), (0, number * size - positions), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, number, size, width), 1, 0)


def _join(x: Array, positions: int) -> Array:
    """The inverse of `_split`."""
    number, batch, size, width = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, number * size, width)[:, :positions]


def _dot(spec: str, a: Array, b: Array) -> Array:
    """Products in the arrays' own dtype (float32 in full precision), sums in float32."""
    return jnp.einsum(spec, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, real: Array) -> Array:
    """[B q k] float32; -inf where a key is padding. real: [k] bool."""
    return jnp.where(real, _dot("bqd,bkd->bqk", q, k) * q.shape[-1] ** -0.5, -jnp.inf)


def _attend(q: Array, k: Array, v: Array, real: Array) -> tuple[Array, Array]:
    """Queries [B q D] against all blocks of keys [n B k D]: output [B q D] and log-sum-exp [B q 1], float32."""

    def step(carry, block):
        top, total, output = carry
        k_j, v_j, real_j = block
        scores = _scores(q, k_j, real_j)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        kept = jnp.exp(top - new_top)
        total = total * kept + weights.sum(-1, keepdims=True)
        output = output * kept + _dot("bqk,bkd->bqd", weights.astype(v_j.dtype), v_j)
        return (new_top, total, output), None

    batch, size, width = q.shape
    start = (
        jnp.full((batch, size, 1), -jnp.inf, jnp.float32),  # the first block always holds a real key: never -inf - -inf
        jnp.zeros((batch, size, 1), jnp.float32),
        jnp.zeros((batch, size, width), jnp.float32),
    )
    (top, total, output), _ = jax.lax.scan(step, start, (k, v, real))
    return output / total, top + jnp.log(total)


def _blocks_of_keys(k: Array, v: Array, limit: int) -> tuple[Array, Array, Array]:
    """Keys and values in blocks, and which of their positions are real: [blocks size] bool."""
    number, size = _blocks(k.shape[1], limit)
    real = (jnp.arange(number * size) < k.shape[1]).reshape(number, size)
    return _split(k, number, size), _split(v, number, size), real


def _forward(q: Array, k: Array, v: Array, limit: int):
    keys = _blocks_of_keys(k, v, limit)
    output, logsum = jax.lax.map(lambda q_i: _attend(q_i, *keys), _split(q, *_blocks(q.shape[1], limit)))
    output = _join(output, q.shape[1]).astype(v.dtype)
    return output, (q, k, v, output, logsum)


def _backward(limit: int, residuals, gradient: Array):
    q, k, v, output, logsum = residuals
    blocks = _blocks(q.shape[1], limit)
    inner = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True)
    q_n, g_n, inner_n = (_split(x, *blocks) for x in (q, gradient.astype(v.dtype), inner))
    scale = q.shape[-1] ** -0.5

    def of_keys(dq, keys):
        k_j, v_j, real_j = keys

        def of_queries(carry, queries):
            dk, dv = carry
            q_i, g_i, inner_i, logsum_i = queries
            weights = jnp.exp(_scores(q_i, k_j, real_j) - logsum_i)
            dscores = (weights * (_dot("bqd,bkd->bqk", g_i, v_j) - inner_i) * scale).astype(k_j.dtype)
            dk += _dot("bqk,bqd->bkd", dscores, q_i)
            dv += _dot("bqk,bqd->bkd", weights.astype(g_i.dtype), g_i)
            return (dk, dv), _dot("bqk,bkd->bqd", dscores, k_j)

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        (dk, dv), dq_part = jax.lax.scan(of_queries, (zeros, zeros), (q_n, g_n, inner_n, logsum))
        return dq + dq_part, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(q_n.shape, jnp.float32), _blocks_of_keys(k, v, limit))
    return _join(dq, q.shape[1]).astype(q.dtype), _join(dk, k.shape[1]), _join(dv, k.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, limit):
    return _forward(q, k, v, limit)[0]


_attention.defvjp(_forward, _backward)


@shaped("q: B L D, k: B S D, v: B S D -> B L D")
def blockwise_attention(q: Array, k: Array, v: Array, block: int = BLOCK) -> Array:
    """softmax(q k^T / sqrt(D)) v, scores and sums in float32.

    Args:
      q: [B L D] queries.
      k, v: [B S D] keys and values.
      block: the most positions of one block; as many as that are one block.

    Returns:
      [B L D] in the dtype of v.
    """
    return _attention(q, k, v, block)
