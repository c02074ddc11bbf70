"""Laws of attention: it is softmax(q k^T / sqrt(d)) v, accumulated in float32, and one table says what computes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxprs import rounded, shapes, traced

from lwd_jax.nn import attention as room
from lwd_jax.nn import blockwise
from lwd_jax.nn.attention import SAVED, Tokens, attention, exchange, joint_attention
from lwd_jax.nn.platform import for_platform
from lwd_jax.nn.sharding import AXES
from lwd_jax.nn.splash import block_sizes, blocks_of, splash_attention
from lwd_jax.nn.stack import REMAT


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(q, k, v, mask=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_equals_the_formula(length):
    q, k, v = draw(2, length, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), by_hand(q, k, v), atol=2e-6)


def test_masked_keys_have_no_say():
    q, k, v = draw(2, 4, 3, 8), draw(2, 6, 3, 8, seed=1), draw(2, 6, 3, 8, seed=2)
    real = np.arange(6) < np.array([4, 6])[:, None]
    made = jax.jit(attention)(q, k, v, real=real)
    np.testing.assert_allclose(made, by_hand(q, k, v, real[:, None, None]), atol=2e-6)
    k[0, 4:] = v[0, 4:] = 9
    np.testing.assert_allclose(made, jax.jit(attention)(q, k, v, real=real), atol=2e-6)


def test_bfloat16_accumulates_in_float32():
    """4096 equal weights of 1/4096: a bfloat16 sum of them would stop growing at 1/16."""
    q, k = np.zeros((1, 1, 1, 8), jnp.bfloat16), np.zeros((1, 4096, 1, 8), jnp.bfloat16)
    made = jax.jit(attention)(q, k, np.ones_like(k))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(made, np.float32), 1.0)


def test_no_matrix_of_logits_is_kept_for_the_backward_pass():
    q = draw(2, 64, 3, 8)
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], q, q, q))
    assert kept and all(leaf.size <= q.size for leaf in kept)


@pytest.fixture
def chosen(monkeypatch):
    """The kernels that were asked for, one after the other; none of them runs."""
    found = []

    def recorded(name):
        def kernel(q, *_, implementation="", **__):
            found.append(implementation or name)
            return q

        return kernel

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded("jax.nn's"))
    monkeypatch.setattr(room, "blockwise_attention", recorded("blocks"))
    return found


@pytest.mark.parametrize(
    ("dtype", "head", "fused"),
    [(jnp.bfloat16, 64, True), (jnp.float16, 128, True), (jnp.float32, 64, False), (jnp.bfloat16, 12, False)],
)
def test_which_kernel_a_gpu_runs(chosen, dtype, head, fused):
    q = np.zeros((1, 2, 1, head), dtype)
    for platform in ("gpu", "cpu"):
        with for_platform(platform):
            attention(q, q, q)
    assert chosen == ["cudnn" if fused else "blocks", "blocks"]


LENGTHS = [(4, 6), (3, 6), (4, 5), (3, 5), (5, 5)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_is_asked_of_cudnn_is_the_same_attention(monkeypatch, lengths, masked):
    """Of any length, the padding anywhere among the keys, gradients too. XLA answers in its place, in float32."""
    asked, original = [], jax.nn.dot_product_attention

    def answer(*arguments, implementation, **more):
        asked.append(implementation)
        return original(*arguments, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    monkeypatch.setattr(room, "_HALF", (jnp.dtype(jnp.float32),))
    q, weights = (draw(2, lengths[0], 3, 8, seed=seed) for seed in (0, 3))
    k, v = (draw(2, lengths[1], 3, 8, seed=seed) for seed in (1, 2))
    real = np.random.default_rng(4).permuted(np.arange(lengths[1]) < np.array([2, 4])[:, None], axis=1)
    real = jnp.asarray(real) if masked else None

    def of(kernel):
        return jax.vjp(lambda q, k, v: kernel(q, k, v, real), q, k, v)

    (found, back), (wanted, back_wanted) = of(room._cudnn), of(room.blockwise)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for ours, theirs in zip(back(weights), back_wanted(weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert asked == ["cudnn"]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_without_cudnn_a_plan_counts_plain_products_and_a_gpu_says_so(monkeypatch, backend):
    def missing(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v = (draw(2, 5, 3, 8, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    real = jnp.array([[True, False, True, True, False], [False, True, True, True, True]])
    if backend == "gpu":
        with pytest.raises(RuntimeError, match="not detected"):
            room._cudnn(q, k, v, real)
    else:
        np.testing.assert_array_equal(room._cudnn(q, k, v, real), room.blockwise(q, k, v, real))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [*LENGTHS, (4429, 4429)])  # SD3's at 1024 px
def test_cudnn_takes_it_and_trains(with_cudnn, lengths, masked):
    q, k = (jax.ShapeDtypeStruct((2, length, 3, 64), jnp.bfloat16) for length in lengths)
    real = jnp.ones((2, lengths[1]), bool) if masked else None

    def loss(q, k, v):
        return attention(q, k, v, real=real).astype(jnp.float32).sum()

    with for_platform("gpu"):
        found = traced(jax.grad(loss, (0, 1, 2)), q, k, k)
    assert "dot_product_attention_fwd" in str(found) and "dot_product_attention_bwd" in str(found)
    assert max(math.prod(shape) for shape in shapes(found)) <= 2 * (max(lengths) + 1) * 3 * 64


def kept_for_backward(platform, dtype):
    """Shapes that the policy "attention" keeps of one remat attention between two products, arguments included."""
    block = jax.checkpoint(lambda x, w: attention(x * w, x, x + w) * w, policy=REMAT["attention"])
    x = jax.ShapeDtypeStruct((1, 4, 2, 64), dtype)
    with for_platform(platform):
        _, backward = jax.eval_shape(lambda x, w: jax.vjp(block, x, w), x, x)
    return sorted(leaf.shape for leaf in jax.tree.leaves(backward))


def test_remat_keeps_the_output_once(with_cudnn):
    """And the log-sum-exp, each once; with cuDNN traced as on a GPU."""
    arguments = [(1, 4, 2, 64)] * 2
    assert kept_for_backward("cpu", jnp.bfloat16) == sorted(arguments + [(1, 2, 4, 64), (1, 2, 4, 1)])
    assert kept_for_backward("gpu", jnp.bfloat16) == sorted(arguments + [(1, 4, 2, 64), (1, 2, 4)])


def test_float32_is_multiplied_in_full_precision():
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    found = traced(jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2)), q, q, q)
    assert (1, 2, 4, 4) in shapes(found)
    assert not rounded(found)


def test_a_kernel_is_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(room.KERNELS, "abacus", lambda q, k, v, real: q + 1)
    q = draw(1, 2, 1, 4)
    with for_platform("abacus"):
        np.testing.assert_array_equal(attention(q, q, q), q + 1)


def test_unequal_keys_and_values_are_refused():
    q = draw(1, 2, 1, 4)
    with pytest.raises(ValueError, match="axis S of 'v'"):
        attention(q, q, draw(1, 3, 1, 4))


# --------------------------------------------------------------------------------------------------- over a mesh


def kinds_of(heads, lengths, seed=0):
    """Two kinds of tokens whose lengths do not divide; of the second, the last ones are padding."""
    first, second = (
        [draw(2, length, heads, 8, seed=seed + 3 * i + j) for j in range(3)] for i, length in enumerate(lengths)
    )
    real = np.arange(lengths[1]) < np.array([lengths[1] - 2, lengths[1]])[:, None]
    return Tokens(*first), Tokens(*second, real)


@pytest.mark.parametrize(
    ("shape", "heads", "way"),
    [
        ((1, 2, 4, 1), 4, "ulysses"),
        ((1, 2, 4, 1), 3, "gather"),
        ((2, 1, 2, 2), 6, "gather"),
        ((1, 1, 2, 4), 8, "ulysses"),
        ((2, 1, 1, 4), 8, "none"),
    ],
)
def test_a_mesh_changes_nothing(shape, heads, way, monkeypatch):
    """Results and gradients, odd lengths and padding included; every way in which positions meet. Alone the positions
    are one block, over the mesh several.
    """
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES)
    kinds = kinds_of(heads, (13, 7))
    weights = [draw(*kind.q.shape, seed=20) for kind in kinds]

    def value(qkv):
        found = joint_attention(*(Tokens(*each, kind.real) for each, kind in zip(qkv, kinds)))
        return sum(jnp.sum(w * x) for w, x in zip(weights, found)), found

    given = [kind[:3] for kind in kinds]
    alone = jax.jit(jax.grad(value, has_aux=True))(given)
    given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    monkeypatch.setattr(blockwise, "SCORES", 64 * heads)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(value, has_aux=True)).lower(given).compile()
    over, text = compiled(given), compiled.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), jax.device_get(over), jax.device_get(alone))
    assert exchange(heads // (shape[3] if heads % shape[3] == 0 else 1), shape[2]) == way
    assert ("all-to-all" in text) == (way == "ulysses") and ("all-gather" in text) >= (way == "gather")


def test_keys_of_one_device_only_are_noticed(monkeypatch):
    """The control: a device that does not ask the others for their keys."""
    monkeypatch.setattr(room, "exchange", lambda heads, parts: "none")
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4, 1), AXES)
    kinds = kinds_of(4, (13, 7))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        over = jax.jit(joint_attention)(*jax.device_put(kinds, NamedSharding(mesh, PartitionSpec())))[0]
    alone = jax.jit(joint_attention)(*kinds)[0]
    assert np.abs(np.asarray(over) - np.asarray(alone)).max() > 1e-2


def test_a_kind_without_queries_gives_nothing():
    first, second = kinds_of(2, (5, 4))
    both = jax.jit(joint_attention)(first, second)
    one, nothing = jax.jit(joint_attention)(first, second._replace(q=None))
    assert nothing is None
    np.testing.assert_allclose(one, both[0], atol=1e-6)


# -------------------------------------------------------------------------------------------------- on a TPU


@pytest.mark.parametrize(
    ("length", "keys", "padded", "heads"),
    [(130, 300, True, (2, 64)), (256, 256, False, (2, 64)), (70, 1700, True, (2, 64)), (530, 600, False, (1, 512))],
)
def test_splash_equals_xla(length, keys, padded, heads):
    """The TPU's kernel, interpreted: result and gradients, for lengths that are no blocks and with keys left out, and
    for the autoencoder's one wide head.
    """
    q, k, v = draw(2, length, *heads), draw(2, keys, *heads, seed=1), draw(2, keys, *heads, seed=2)
    real = np.arange(keys) < np.array([keys - 9, keys])[:, None] if padded else None
    weight = draw(2, length, *heads, seed=3)

    def gradients(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(weight * attend(*qkv)), (0, 1, 2)))(q, k, v)

    ours = gradients(lambda *qkv: splash_attention(*qkv, real, name=SAVED, interpret=True))
    mask = None if real is None else real[:, None, None]
    wanted = gradients(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask, implementation="xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max()), ours, wanted)


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(300, (1, 512)), (1357, (1, 1536)), (4429, (3, 1536)), (16717, (11, 1536)), (65869, (43, 1536))],
)
def test_blocks_hold_the_lengths_in_use(length, blocks):
    """SD3's tokens at 512, 1024, 2048 and 4096 px fill blocks of 1536 to 2 % (at 512 px to 12 %)."""
    assert blocks_of(length) == blocks
    sizes = block_sizes(blocks[1], blocks[1])
    assert blocks[1] % sizes.block_kv_compute == 0 and blocks[1] % sizes.block_q_dkv == 0


def test_wide_heads_have_smaller_blocks():
    """As many channels in a block as of heads of 128, but 512 positions at least."""
    assert blocks_of(4096, 128) == blocks_of(4096, 64) == (3, 1536)
    assert blocks_of(4096, 256) == (6, 768) and blocks_of(4096, 512) == blocks_of(4096, 1024) == (8, 512)
