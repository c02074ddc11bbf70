"""Exact attention in plain products, on any platform, whose memory grows linearly with the number of positions.

At 4096 px a picture has 65,536 tokens, and 262,144 positions at the autoencoder's narrowest level, where a matrix of
scores would take 256 GiB. The scores are therefore made block by block with a running softmax (Milakov and Gimelshein,
arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682) and made again in the backward pass from the saved log-sum-exp
(FlashAttention, arXiv 2205.14135, algorithm 4). What is short enough is one block, and nothing runs in a loop.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lwd_jax.nn.layers import precision_of
from lwd_jax.shapes import Array, shaped

SCORES = 1 << 22  # of a picture's heads, of a block of queries and one of keys: 16 MiB in float32
_UNIT = 8  # blocks are multiples of it
_MASKED = -1e30  # a score; finite, so that rows of nothing else have no difference of infinities


class _How(NamedTuple):
    """What is the same for all calls of one shape.

    Attributes:
      block: the most positions of one block, a multiple of _UNIT; as many as that are one block.
      name: of what the backward pass needs, for remat policies.
    """

    block: int
    name: str


def _blocks(positions: int, limit: int) -> tuple[int, int]:
    """(number, size) of equal blocks of at most `limit` positions; a single block is exactly as long as the input."""
    number = math.ceil(positions / limit)
    if number == 1:
        return 1, positions
    size = math.ceil(positions / number / _UNIT) * _UNIT
    return math.ceil(positions / size), size


def _split(x: Array, number: int, size: int) -> Array:
    """[B .. L D] -> [blocks B .. size D], zeros after the last position."""
    *outer, positions, width = x.shape
    padded = jnp.pad(x, ((0, 0),) * len(outer) + ((0, number * size - positions), (0, 0)))
    return jnp.moveaxis(padded.reshape(*outer, number, size, width), -3, 0)


def _join(x: Array, positions: int) -> Array:
    """The inverse of `_split`."""
    number, *outer, size, width = x.shape
    return jnp.moveaxis(x, 0, -3).reshape(*outer, number * size, width)[..., :positions, :]


def _dot(spec: str, a: Array, b: Array) -> Array:
    """Products in the arrays' own dtype (float32 in full precision), sums in float32."""
    return jnp.einsum(spec, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, real: Array | None) -> Array:
    """[B N q k] float32, not yet divided by sqrt(d): that is done where they are read next, which costs no pass over
    them. real: [B 1 k 1] bool, the keys that are no padding; None = all."""
    scores = _dot("bnqd,bnkd->bnqk", q, k)
    return scores if real is None else jnp.where(real.swapaxes(2, 3), scores, _MASKED)


def _attend(q: Array, keys: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
    """Queries [B N q d] against blocks of keys: output [B N q d] and log-sum-exp [B N q 1], float32."""
    scale = q.shape[-1] ** -0.5

    def step(carry, block):
        top, total, output = carry
        k, v, real = block
        scores = _scores(q, k, real)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp((scores - new_top) * scale)
        kept = jnp.exp((top - new_top) * scale)
        total = total * kept + weights.sum(-1, keepdims=True)
        output = output * kept + _dot("bnqk,bnkd->bnqd", weights.astype(v.dtype), v)
        return (new_top, total, output), None

    column = (*q.shape[:3], 1)
    start = jnp.full(column, -jnp.inf, jnp.float32), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32)
    (top, total, output), _ = jax.lax.scan(step, start, keys)
    return output / total, top * scale + jnp.log(total)


def _keys(k: Array, v: Array, real: Array | None, limit: int) -> tuple[Array, Array, Array | None]:
    """Keys and values [B N S d] in blocks, and which of them are real: [blocks B 1 size 1] bool, None = all."""
    number, size = _blocks(k.shape[2], limit)
    if real is None and number * size > k.shape[2]:
        real = jnp.ones((len(k), k.shape[2]), bool)
    flags = None if real is None else _split(real[:, None, :, None], number, size)
    return _split(k, number, size), _split(v, number, size), flags


def _forward(how: _How, q: Array, k: Array, v: Array, real: Array | None):
    keys = _keys(k, v, real, how.block)
    output, logsum = jax.lax.map(lambda q: _attend(q, keys), _split(q, *_blocks(q.shape[2], how.block)))
    output = checkpoint_name(_join(output, q.shape[2]).astype(q.dtype), how.name)
    logsum = checkpoint_name(_join(logsum, q.shape[2]), how.name)
    return output, (q, k, v, real, output, logsum)


def _backward(how: _How, residuals, gradient: Array):
    q, k, v, real, output, logsum = residuals
    blocks = _blocks(q.shape[2], how.block)
    inner = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True)
    queries = tuple(_split(x, *blocks) for x in (q, gradient.astype(v.dtype), inner, logsum))
    scale = q.shape[-1] ** -0.5

    def of_keys(dq, keys):
        k_j, v_j, real_j = keys

        def of_queries(carry, queries):
            dk, dv = carry
            q_i, g_i, inner_i, logsum_i = queries
            weights = jnp.exp(_scores(q_i, k_j, real_j) * scale - logsum_i)
            dscores = (weights * (_dot("bnqd,bnkd->bnqk", g_i, v_j) - inner_i)).astype(k_j.dtype)
            dk += _dot("bnqk,bnqd->bnkd", dscores, q_i)
            dv += _dot("bnqk,bnqd->bnkd", weights.astype(g_i.dtype), g_i)
            return (dk, dv), _dot("bnqk,bnkd->bnqd", dscores, k_j)

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        (dk, dv), dq_part = jax.lax.scan(of_queries, (zeros, zeros), queries)
        return dq + dq_part, ((scale * dk).astype(k.dtype), dv.astype(v.dtype))

    zeros = jnp.zeros(queries[0].shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(of_keys, zeros, _keys(k, v, real, how.block))
    return _join(scale * dq, q.shape[2]).astype(q.dtype), _join(dk, k.shape[2]), _join(dv, k.shape[2]), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, real):
    return _forward(how, q, k, v, real)[0]


_attention.defvjp(_forward, _backward)


@shaped("q: B L N d, k: B S N d, v: B S N d, real: B S -> B L N d")
def blockwise_attention(q: Array, k: Array, v: Array, real: Array | None = None, *, name: str, block: int = 0) -> Array:
    """softmax(q k^T / sqrt(d)) v per head; scores, softmax and sums in float32.

    Args:
      q: [B L N d] queries.
      k, v: [B S N d] keys and values.
      real: [B S] bool, the keys to attend to; None = all.
      name: under which remat policies know the output and the log-sum-exp, all that the backward pass needs beside
        the arguments.
      block: the most positions of one block, a multiple of 8; 0 = as many as make SCORES scores a picture.

    Returns:
      [B L N d] in the dtype of q.
    """
    how = _How(block or math.isqrt(SCORES // q.shape[2]) // _UNIT * _UNIT, name)
    return _attention(how, *(x.swapaxes(1, 2) for x in (q, k, v)), real).swapaxes(1, 2)
