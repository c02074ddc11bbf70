"""Laws of attention: it is softmax(q k^T / sqrt(d)) v, accumulated in float32, and one table says what computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import rounded, shapes, traced

from lwd_jax.nn import attention as room
from lwd_jax.nn.attention import attention
from lwd_jax.nn.stack import REMAT


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def by_hand(q, k, v, mask=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_equals_the_formula(length):
    q, k, v = draw(2, length, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    np.testing.assert_allclose(attention(q, k, v), by_hand(q, k, v), atol=2e-6)


def test_masked_keys_have_no_say():
    q, k, v = draw(2, 4, 3, 8), draw(2, 6, 3, 8, seed=1), draw(2, 6, 3, 8, seed=2)
    mask = np.arange(6)[None, None, None] < np.array([4, 6])[:, None, None, None]
    made = attention(q, k, v, mask=mask)
    np.testing.assert_allclose(made, by_hand(q, k, v, mask), atol=2e-6)
    np.testing.assert_allclose(made, attention(q, k.at[0, 4:].set(9.0), v.at[0, 4:].set(9.0), mask=mask), atol=2e-6)


def test_bfloat16_accumulates_in_float32():
    """4096 equal weights of 1/4096: a bfloat16 sum of them would stop growing at 1/16."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)
    made = attention(q, k, jnp.ones_like(k))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made.astype(jnp.float32), 1.0)


@pytest.mark.parametrize(
    ("dtype", "head", "fused"),
    [(jnp.bfloat16, 64, True), (jnp.float16, 128, True), (jnp.float32, 64, False), (jnp.bfloat16, 12, False)],
)
def test_which_kernel_a_gpu_runs(monkeypatch, dtype, head, fused):
    chosen = []

    def recorded(q, k, v, mask=None, implementation=None):
        chosen.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q = jnp.zeros((1, 2, 1, head), dtype)
    attention(q, q, q, platform="gpu")
    attention(q, q, q, platform="cpu")
    assert chosen == ["cudnn" if fused else "xla", "xla"]


@pytest.mark.parametrize(
    ("lengths", "masked", "fused"),
    [((4, 6), True, True), ((3, 6), True, False), ((4, 5), True, False), ((3, 5), False, True)],
)
def test_a_mask_over_odd_lengths_is_not_for_cudnn(monkeypatch, lengths, masked, fused):
    """It would raise as soon as a gradient is taken."""
    chosen = []

    def recorded(q, k, v, mask=None, implementation=None):
        chosen.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q, k = (jnp.zeros((1, length, 1, 64), jnp.bfloat16) for length in lengths)
    attention(q, k, k, mask=jnp.ones((1, 1, *lengths), bool) if masked else None, platform="gpu")
    assert chosen == ["cudnn" if fused else "xla"]


def kept_for_backward(platform, dtype):
    """Shapes that the policy "attention" keeps of one remat attention between two products, arguments included."""
    block = jax.checkpoint(lambda x, w: attention(x * w, x, x + w, platform=platform) * w, policy=REMAT["attention"])
    x = jax.ShapeDtypeStruct((1, 4, 2, 64), dtype)
    _, backward = jax.eval_shape(lambda x, w: jax.vjp(block, x, w), x, x)
    return sorted(leaf.shape for leaf in jax.tree.leaves(backward))


def test_remat_keeps_the_output_once(monkeypatch):
    """With cuDNN traced as on a GPU: its output and log-sum-exp, each once; with XLA the output."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
    arguments = [(1, 4, 2, 64)] * 2
    assert kept_for_backward("cpu", jnp.bfloat16) == sorted(arguments + [(1, 4, 2, 64)])
    assert kept_for_backward("gpu", jnp.bfloat16) == sorted(arguments + [(1, 4, 2, 64), (1, 2, 4)])


def test_float32_is_multiplied_in_full_precision():
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    found = traced(jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2)), q, q, q)
    assert (1, 2, 1, 4, 4) in shapes(found) or (1, 2, 4, 4) in shapes(found)
    assert not rounded(found)


def test_a_kernel_is_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(room.KERNELS, "tpu", lambda q, k, v, mask: q + 1)
    q = draw(1, 2, 1, 4)
    np.testing.assert_array_equal(attention(q, q, q, platform="tpu"), q + 1)


def test_unequal_keys_and_values_are_refused():
    q = draw(1, 2, 1, 4)
    with pytest.raises(ValueError, match="axis S of 'v'"):
        attention(q, q, draw(1, 3, 1, 4))
