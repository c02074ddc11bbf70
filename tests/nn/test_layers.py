"""Laws of the layers and the modulation: they equal torch's, and their float32 islands are float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxprs import rounded, shapes, traced

from lwd_jax.nn.layers import Dense, RMSNorm, gelu, layer_norm, parameter
from lwd_jax.nn.modulation import Modulation, gated, modulate
from lwd_jax.nn.platform import for_platform
from lwd_jax.nn.sharding import AXES


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3e-4])
def test_layers_equal_torch(size):
    """Also of inputs whose squares are smaller than the norms' eps."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, scale = np.float32(size) * (3 * draw(2, 5, 12) + 1), draw(12, seed=1)
    given = torch.from_numpy(x)
    np.testing.assert_allclose(jax.jit(layer_norm)(x), functional.layer_norm(given, (12,), eps=1e-6), atol=2e-6)
    made = jax.jit(RMSNorm().apply)({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(made, functional.rms_norm(given, (12,), torch.from_numpy(scale), 1e-6), atol=2e-6)
    np.testing.assert_allclose(jax.jit(gelu)(x), functional.gelu(given, approximate="tanh"), atol=2e-6)
    kernel, bias = draw(12, 7, seed=2), draw(7, seed=3)
    made = jax.jit(Dense(7).apply)({"params": {"kernel": kernel, "bias": bias}}, x)
    expected = functional.linear(given, torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias))
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_keeps_its_input_alone(dtype):
    """And its gradient is that of JAX's own, which keeps more."""
    x, slope = (3 * draw(3, 40)).astype(dtype), draw(3, 40, seed=1).astype(dtype)

    def own(x):
        return jax.nn.gelu(x, approximate=True)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, x, slope):
        result, pullback = jax.vjp(function, x)
        return result, pullback(slope)[0]

    for made, expected in zip(both(gelu, x, slope), both(own, x, slope)):
        np.testing.assert_array_equal(made, expected)
    backward, own_backward = jax.vjp(gelu, x)[1], jax.eval_shape(lambda x: jax.vjp(own, x)[1], x)
    kept, more = ([leaf for leaf in jax.tree.leaves(f) if leaf.shape == x.shape] for f in (backward, own_backward))
    assert len(kept) == 1 < len(more)
    np.testing.assert_array_equal(kept[0], x)


def test_norm_statistics_are_float32():
    """A mean of 256 with a spread of 1: bfloat16 statistics would see almost no spread at all."""
    x = (256 + 2 * draw(4, 64)).astype(jnp.bfloat16)
    made = jax.jit(layer_norm)(x)
    np.testing.assert_allclose(made, jax.jit(layer_norm)(x.astype(np.float32)), atol=1e-6)
    assert made.dtype == jnp.float32


def test_rms_norm_rounds_once():
    """Its statistics, its scale and their products are float32: what bfloat16 loses, it loses in the result."""
    x, scale = draw(64, 40).astype(jnp.bfloat16), draw(40, seed=1)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale
    # Not jitted: XLA leaves out a rounding to bfloat16 and back, and would hide it here.
    made = RMSNorm().apply({"params": {"scale": scale}}, x)
    assert made.dtype == x.dtype
    np.testing.assert_allclose(np.float64(made), expected, rtol=2**-8 + 1e-6)  # half of the last of 8 bits


def slopes(params, x, weight):
    """Of a Dense with respect to its parameters and its input [B L in]."""
    return jax.grad(lambda params, x: jnp.sum(weight * Dense(40).apply({"params": params}, x)), (0, 1))(params, x)


def of_a_dense():
    params = {"kernel": draw(24, 40, seed=1), "bias": draw(40, seed=2)}
    return params, draw(4, 16, 24), draw(4, 16, 40, seed=3)


def test_on_a_cpu_no_gradient_is_transposed():
    """Nor is anything else computed than elsewhere, where the axes of a picture's rows are left to the compiler."""
    found = {}
    for name in ("cpu", "tpu"):
        with for_platform(name):
            compiled = jax.jit(lambda *given: slopes(*given)).lower(*of_a_dense()).compile()  # traced for each
            found[name] = compiled(*of_a_dense()), "f32[40,64]" in compiled.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found["cpu"][0], found["tpu"][0])
    assert not found["cpu"][1]
    assert found["tpu"][1], "XLA:CPU needs no help any more: Dense can do without."


@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (2, 2, 1, 2)])
def test_rows_that_lie_apart_stay_apart(shape):
    """Over a mesh no token moves for a product or for its gradients."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES)
    expected = jax.jit(slopes)(*of_a_dense())
    tokens = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    layout = (NamedSharding(mesh, PartitionSpec()), tokens, tokens)
    given = jax.device_put(of_a_dense(), layout)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(slopes, out_shardings=layout[:2]).lower(*given).compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), compiled(*given), expected)
    text = compiled.as_text()
    assert "all-reduce" in text and not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_dense_keeps_the_accumulator_where_asked():
    x = np.full((1, 512), 1 + 2**-7, jnp.bfloat16)
    params = {"kernel": np.full((512, 1), 1 + 2**-7, np.float32), "bias": np.zeros(1, np.float32)}
    # Not jitted: XLA leaves out a rounding to bfloat16 and back, and would hide it here.
    wide = Dense(1, dtype=jnp.bfloat16, out_dtype=jnp.float32).apply({"params": params}, x)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, 512 * (1 + 2**-7) ** 2, rtol=1e-7)
    assert Dense(1, dtype=jnp.bfloat16).apply({"params": params}, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_gradient_of_a_bias_is_summed_in_float32(platform):
    """In bfloat16 ones added one by one would end at 256."""
    params, x = {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}, np.ones((2, 900, 4))
    weight = np.random.default_rng(0).uniform(0.9, 1.1, (2, 900, 3)).astype(jnp.bfloat16)

    def loss(bias):
        y = Dense(3, dtype=jnp.bfloat16).apply({"params": params | {"bias": bias}}, x)
        return jnp.sum(y.astype(jnp.float32) * weight)

    with for_platform(platform):
        gradient = jax.jit(jax.grad(loss))(params["bias"])
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, weight.astype(np.float64).sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("adapted", [False, True])
def test_parts_are_one_input_that_is_never_joined(dtype, error, adapted):
    """The same result and gradients as of the joined input, rounded once; without an adapter nothing has its shape."""
    parts = tuple(draw(2, 5, size, seed=size).astype(dtype) for size in (12, 29, 7))
    params = {"kernel": draw(48, 6), "bias": draw(6, seed=1)}
    params |= {"lora_a": draw(48, 3, seed=2), "lora_b": draw(3, 6, seed=3)} if adapted else {}
    fixed = {"lora_scale": np.float32(0.7)} if adapted else {}

    def apart(params, parts):
        return Dense(6, dtype=dtype).apply({"params": params | fixed}, *parts).astype(jnp.float32)

    def joined(params, parts):
        return Dense(6).apply({"params": params | fixed}, jnp.concatenate(parts, -1).astype(jnp.float32))

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, params, parts):
        result, pullback = jax.vjp(function, params, parts)
        return jax.tree.leaves((result, pullback(draw(2, 5, 6, seed=4))))

    for one, other in zip(both(apart, params, parts), both(joined, params, parts), strict=True):
        one, other = np.float32(one), np.float32(other)
        assert np.linalg.norm(one - other) <= error * np.linalg.norm(other)
    back = traced(lambda *given: jax.vjp(apart, *given)[1](jnp.ones((2, 5, 6))), params, parts)
    assert ((2, 5, 48) in shapes(back)) == adapted
    # In float32 a GPU would multiply at half the rate.
    assert {v.aval.dtype for e in back if e.primitive.name == "dot_general" for v in e.invars} == {jnp.dtype(dtype)}
    # Nor is a part of the kernel kept for the backward pass: of a stack that would be a copy of every kernel.
    pullback = jax.eval_shape(lambda parts: jax.vjp(lambda parts: apart(params, parts), parts)[1], parts)
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert (48, 6) in kept and not {(12, 6), (29, 6), (7, 6)} & set(kept)


def test_the_sum_over_parts_is_rounded_once():
    """256 and 1.5 are 257.5, 258 in bfloat16; of a rounded 257 + 0.5 nothing would be left."""
    x, kernel = np.ones((1, 1), jnp.bfloat16), np.array([[256], [1], [0.5]], np.float32)
    params = {"kernel": kernel, "bias": np.zeros(1, np.float32)}
    assert np.asarray(Dense(1, dtype=jnp.bfloat16).apply({"params": params}, x, x, x)) == 258  # not jitted: see above


def test_float32_products_are_in_full_precision():
    """A GPU would round float32 operands to TF32, a TPU to bfloat16."""
    x, params = draw(2, 8), {"kernel": draw(8, 3), "bias": draw(3)}
    assert not rounded(traced(jax.grad(lambda p: Dense(3).apply({"params": p}, x).sum()), params))
    assert rounded(traced(lambda x, kernel: x @ kernel, x, params["kernel"]))  # the control


def test_modulation_starts_as_the_identity():
    """adaLN-Zero: shift, scale and gate are 0, so a block passes its tokens through."""
    emb, x, y = draw(2, 8), draw(2, 3, 8, seed=1), draw(2, 3, 8, seed=2)
    start = jax.jit(Modulation(24, dtype=jnp.bfloat16).init_with_output)
    (shift, scale, gate), _ = start(jax.random.key(0), emb)
    assert shift.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(modulate)(x, shift, scale), jax.jit(layer_norm)(x))
    np.testing.assert_array_equal(jax.jit(gated)(x, gate, y), x)


def test_modulate_and_gated_are_their_formulas():
    x, y, a, b = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(2, 8, seed=2), draw(2, 8, seed=3)
    expected = np.asarray(jax.jit(layer_norm)(x)) * (1 + b[:, None]) + a[:, None]
    np.testing.assert_allclose(jax.jit(modulate)(x, a, b), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(gated)(x, a, y), x + a[:, None] * y, atol=1e-6)
    assert jax.jit(gated)(x.astype(jnp.bfloat16), a, y).dtype == jnp.bfloat16


def test_an_initialiser_runs_once_and_a_wrong_shape_is_refused():
    """Flax would trace it at every call; its error for a parameter of another shape is kept."""
    calls = []

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            def init(key, shape, dtype):
                calls.append(shape)
                return jax.random.normal(key, shape, dtype)

            return x * parameter(self, "gain", init, x.shape[-1:], jnp.float32)

    x = np.ones((2, 3), np.float32)
    made = Layer().init(jax.random.key(0), x)
    np.testing.assert_array_equal(np.asarray(Layer().apply(made, x))[0], made["params"]["gain"])
    assert calls == [(3,)]
    with pytest.raises(ScopeParamShapeError):
        Layer().apply(made, np.ones((2, 4), np.float32))
