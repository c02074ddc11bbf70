"""Laws of adapters: they start at the base, merging them changes nothing, no gradient has the size of a kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jaxprs import traced
from tiny_models import SD3, backbone

from lwd_jax.adapters import attach
from lwd_jax.adapters.dropout import dropout, streams
from lwd_jax.adapters.factors import frozen, is_factor, merged, saved, trainable
from lwd_jax.adapters.lora import scale as scale_of
from lwd_jax.adapters.lora import settings_of
from lwd_jax.config import Adapter
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.nn.layers import Dense
from lwd_jax.train.state import merge, split
from lwd_jax.weights.table import flat, nested

LORA = Adapter(kind="lora", rank=3, alpha=6.0, targets=("q", "v", "out", "text/up", "modulation"))
MINOR = Adapter(kind="minor_components", rank=3, targets=LORA.targets)
MODULE = backbone(0)[0]


@functools.cache
def base():
    return backbone(0)[1]


@functools.cache
def adapted(adapter=LORA):
    # Decompositions of many shapes are one program; draws of many shapes are compiled faster one by one.
    start = attach if adapter.kind == "lora" else jax.jit(attach, static_argnums=2)
    return start(base(), jax.random.key(1), adapter)


def trained(params, seed=0):
    """The same with factors that have moved."""
    rng = np.random.default_rng(seed)
    moved = {name: (0.1 * rng.standard_normal(flat(params)[name].shape)).astype(np.float32) for name in factors(params)}
    return merge(params, nested(moved))


def factors(params):
    return [name for name in trainable(flat(params)) if is_factor(name)]


def inputs(batch=2):
    rng = np.random.default_rng(2)
    shapes = (batch, 6, 10, 4), (batch, 5, SD3.joint_attention_dim), (batch, SD3.pooled_projection_dim)
    z, tokens, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return z, np.linspace(0.2, 0.9, batch, dtype=np.float32), Conditioning(tokens, pooled=pooled)


@functools.cache
def forward():
    return jax.jit(lambda params, z, t, cond: MODULE.apply({"params": params}, z, t, cond))


def output(params):
    return np.asarray(forward()(params, *inputs()))


def apart(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("init", ["gaussian", "zero"])
def test_lora_starts_at_its_base_bit_for_bit(init):
    params = adapted(dataclasses.replace(LORA, init=init))
    zero = {name[-1] for name in factors(params) if not np.any(np.asarray(flat(params)[name]))}
    assert zero == {"gaussian": {"b"}, "zero": {"a"}}[init]
    np.testing.assert_array_equal(output(params), output(base()))
    assert {name: leaf for name, leaf in flat(params).items() if not is_factor(name)}.keys() == flat(base()).keys()


def test_the_drawn_factor_has_the_deviation_1_over_rank():
    kernel = {"kernel": np.zeros((2, 400, 300))}
    params = attach({"blocks": {"q": kernel, "k": kernel}}, jax.random.key(0), Adapter("lora", 4, ("q", "k")))
    first, other = (np.asarray(params["blocks"][name]["lora_a"]) for name in "qk")
    assert first.shape == (2, 400, 4) and first.std() == pytest.approx(1 / 4, rel=0.03)
    assert apart(first[0], first[1]) > 1, "every layer of a stack has its own"
    assert apart(first, other) > 1, "and so has every kernel of a layer"


@pytest.mark.parametrize("stabilised,scale", [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_scale(stabilised, scale):
    params = adapted(dataclasses.replace(LORA, rank_stabilised=stabilised))
    assert scale_of(settings_of(saved(params))) == pytest.approx(scale), "as told of the factors alone"
    leaves = flat(params)
    found = {name: leaf for name, leaf in leaves.items() if name.endswith("lora_scale")}
    assert len(found) > 8
    for name, leaf in found.items():
        assert leaf.shape == leaves[name.replace("lora_scale", "kernel")].shape[:-2]
        np.testing.assert_allclose(leaf, scale, rtol=1e-6)


def test_minor_components_are_the_smallest_and_start_at_the_base():
    """Against numpy's decomposition in float64; the kernel and what trains in it add up to the kernel."""
    params, name = adapted(MINOR), "joint_blocks/text/out"
    leaves, kernel = flat(jax.device_get(params)), np.asarray(flat(base())[f"{name}/kernel"], np.float64)
    for layer in range(kernel.shape[0]):
        u, s, v = np.linalg.svd(kernel[layer])
        minor = (u[:, -3:] * s[-3:]) @ v[-3:]
        a, b = leaves[f"{name}/lora_a"][layer], leaves[f"{name}/lora_b"][layer]
        np.testing.assert_allclose(a @ b, minor, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
        still = kernel[layer] + leaves[f"{name}/fixed_a"][layer] @ leaves[f"{name}/fixed_b"][layer]
        np.testing.assert_allclose(still, kernel[layer] - minor, atol=1e-6)
    for path, leaf in flat(jax.jit(merged)(params)).items():
        np.testing.assert_allclose(leaf, flat(base())[path], atol=1e-6)
        np.testing.assert_array_equal(leaves[path], flat(base())[path])
    assert apart(output(params), output(base())) < 1e-6


def test_minor_components_start_at_a_bfloat16_base_too():
    """The components lie below the last bit of the kernel, where subtracting them from it would do nothing."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((64, 48)).astype(jnp.bfloat16)
    plain = {"q": {"kernel": kernel, "bias": np.zeros(48, np.float32)}}
    params = jax.jit(attach, static_argnums=2)(plain, jax.random.key(0), Adapter("minor_components", 2, ("q",)))
    x, layer = rng.standard_normal((5, 64)).astype(np.float32), jax.jit(Dense(48).apply)
    plain = layer({"params": plain["q"]}, x)
    np.testing.assert_allclose(layer({"params": params["q"]}, x), plain, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("adapter", [LORA, MINOR], ids=lambda adapter: adapter.kind)
def test_merged_equals_adapted(adapter):
    params = trained(adapted(adapter))
    assert apart(output(params), output(base())) > 1e-2
    plain = jax.jit(merged)(params)
    assert apart(output(plain), output(params)) < 1e-5
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base())
    fixed = jax.jit(frozen)(params)
    assert apart(output(fixed), output(params)) < 1e-6
    assert not factors(fixed)


def test_minor_components_over_a_lora_start_at_both():
    """The 4K adapters of URAE: over the base with its 2K adapter fused, of whose kernels they are the components."""
    lora = trained(adapted())
    params = jax.jit(attach, static_argnums=2)(frozen(lora), jax.random.key(1), MINOR)
    assert apart(output(params), output(lora)) < 2e-6
    name = "joint_blocks/picture/q"
    fused = np.asarray(flat(jax.jit(merged)(lora))[f"{name}/kernel"], np.float64)
    leaves = flat(jax.device_get(params))
    u, s, v = np.linalg.svd(fused[0])
    np.testing.assert_allclose(
        leaves[f"{name}/lora_a"][0] @ leaves[f"{name}/lora_b"][0], (u[:, -3:] * s[-3:]) @ v[-3:], atol=1e-6
    )
    assert leaves[f"{name}/fixed_a"].shape[-1] == 6
    moved = trained(params, seed=5)
    assert apart(output(jax.jit(merged)(moved)), output(moved)) < 1e-5


def test_without_adapters_everything_stays():
    for whole in (frozen(base()), merged(base()), saved(base())):
        assert jax.tree.structure(whole) == jax.tree.structure(base())
        assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(base())))
    assert trainable(flat(base())) == list(flat(base()))


def test_a_checkpoint_holds_the_factors_alone():
    params = adapted(MINOR)
    assert set(flat(saved(params))) == {name for name in flat(params) if is_factor(name)}


# -------------------------------------------------------------------------------------------------------- gradient


def _loss(trainable, frozen):
    return jnp.sum(jnp.sin(MODULE.apply({"params": merge(frozen, trainable)}, *inputs())))


def test_no_gradient_has_the_size_of_a_kernel():
    """Nothing that the backward pass makes has the shape of a product of two factors; in training whole, it has."""
    params = adapted()

    def made(trained):
        parts = split(params, frozenset(trained))
        products = [e for e in traced(jax.grad(_loss), *parts) if e.primitive.name == "dot_general"]
        return {tuple(v.aval.shape) for e in products for v in e.outvars}

    kernels = {leaf.shape[-2:] for name, leaf in flat(params).items() if name.endswith("/kernel")}
    assert not made(factors(params)) & kernels
    assert made(name for name in flat(params) if name.endswith("/kernel")) & kernels


# --------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_of_what_the_factors_see():
    """y = x W + bias + (kept x / (1 - rate)) a b, with elements kept at the rate, each picture by its own key."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (3, 50, 40)).astype(np.float32)
    zeros, one = np.zeros((40, 40), np.float32), np.eye(40, dtype=np.float32)
    params = {"kernel": zeros, "bias": zeros[0], "lora_a": one, "lora_b": one, "lora_scale": np.float32(1)}
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, static_argnums=0)
    def run(rate, keys, x):
        with dropout(rate, keys):
            return Dense(40).apply({"params": params}, x, rngs=streams(rate))

    seen = np.asarray(run(0.25, keys, x))
    kept = seen != 0
    np.testing.assert_allclose(seen[kept], (x / 0.75)[kept], rtol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    assert (kept[0] != kept[1]).mean() > 0.2
    np.testing.assert_array_equal(run(0.25, keys[1:], x[1:]), seen[1:])
    np.testing.assert_allclose(run(0.0, keys, x), x, rtol=1e-5)


def test_two_layers_of_one_shape_drop_different_elements():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(40, name="q")(x), Dense(40, name="k")(x)

    zeros, one = np.zeros((40, 40), np.float32), np.eye(40, dtype=np.float32)
    layer = {"kernel": zeros, "bias": zeros[0], "lora_a": one, "lora_b": one, "lora_scale": np.float32(1)}

    @jax.jit
    def run(x):
        with dropout(0.5, jax.random.split(jax.random.key(0), 2)):
            return Two().apply({"params": {"q": layer, "k": layer}}, x, rngs=streams(0.5))

    q, k = run(np.ones((2, 30, 40), np.float32))
    assert np.mean((q != 0) == (k != 0)) == pytest.approx(0.5, abs=0.05)


def test_dropout_reaches_every_layer_of_a_stack_differently():
    params = trained(adapted())

    def run(rate, seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        with dropout(rate, keys):
            return MODULE.clone(remat="full").apply({"params": params}, *inputs(), rngs=streams(rate))

    run = jax.jit(run, static_argnums=0)
    np.testing.assert_allclose(run(0.0, 1), output(params), rtol=1e-4, atol=1e-5)
    assert apart(run(0.5, 1), output(params)) > 1e-3 and apart(run(0.5, 1), run(0.5, 2)) > 1e-3
    numbers = [e for e in traced(functools.partial(run, 0.5), 1) if e.primitive.name == "random_bits"]
    assert len(numbers) > 10


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "fields,said",
    [
        (
            {"targets": ("to_q",)},
            "'to_q'.*names no layer.*down, final_modulation.*k, modulation, out.*q, text_proj, up, v",
        ),
        ({"targets": ("q", "ictur/k")}, "'ictur/k'"),
        ({"targets": ("(q",)}, "'.q'.*not a regular expression"),
        ({"rank": 17}, "adapter.rank is 17.*'joint_blocks/picture/k' .16 x 16.*between 1 and 16"),
        ({"rank": 0}, "adapter.rank is 0"),
    ],
)
def test_mistakes_are_named(fields, said):
    with pytest.raises(UserError, match=said):
        attach(base(), jax.random.key(0), Adapter(**{"kind": "lora", "rank": 3} | fields))
