"""Laws: AutoencoderKL gives diffusers' numbers and gradients on the same weights; sizes, frozen parts, remat."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxprs import rounded, shapes, traced
from kl_twin import assert_gradients_equal, nchw, nhwc, random_params, relative, torch_twin

from lwd_jax.autoencoders import kl
from lwd_jax.autoencoders.bands import Affine
from lwd_jax.errors import UserError
from lwd_jax.nn.platform import for_platform
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import cover, flat

MANIFESTS = Path(__file__).parents[1] / "manifests"
FOUR = kl.Config(4, (8, 16, 16), 1, 4, use_quant_conv=True, use_post_quant_conv=True)
SIXTEEN = kl.Config(16, (8, 16), 2, 8)
SMALL = {"4 channels, quant convs": FOUR, "16 channels": SIXTEEN}


def size_of(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def run(config: kl.Config, params, x, method: str, **kinds):
    """A jitted method of the module."""

    def method_of(p, x):
        return kl.AutoencoderKL(config, **kinds).apply({"params": p}, x, method=method)

    return jax.jit(method_of)(params, x)


@pytest.mark.parametrize("config, latent", [(FOUR, (1, 3)), (FOUR, (5, 4)), (SIXTEEN, (7, 5))])
def test_forward_equals_diffusers(config, latent):
    torch, twin, params = torch_twin(config)
    rng = np.random.default_rng(1)
    side = [config.factor * n for n in latent]
    x = rng.uniform(-1, 1, (2, *side, 3)).astype(np.float32)
    z = rng.standard_normal((2, *latent, config.latent_channels)).astype(np.float32)
    posterior = run(config, params, x, "encode")
    picture = run(config, params, z, "decode")
    with torch.no_grad():
        theirs = twin.encode(nchw(torch, x)).latent_dist
        their_picture = twin.decode(nchw(torch, z)).sample
    assert posterior.mean.shape == z.shape and picture.shape == x.shape
    assert relative(posterior.mean, nhwc(theirs.mean)) < 1e-5
    assert relative(posterior.logvar, nhwc(theirs.logvar)) < 1e-5
    assert relative(picture, nhwc(their_picture)) < 1e-5


def test_log_variances_are_bounded_as_in_diffusers():
    torch, twin, params = torch_twin(SIXTEEN)
    bias = np.zeros(32, np.float32)
    bias[16:24], bias[24:] = 100, -100
    x = np.random.default_rng(4).uniform(-1, 1, (1, 14, 10, 3)).astype(np.float32)
    encoder = params["encoder"]
    head = encoder["conv_out"] | {"bias": bias}
    with torch.no_grad():
        twin.encoder.conv_out.bias.copy_(torch.tensor(bias))
        theirs = nhwc(twin.encode(nchw(torch, x)).latent_dist.logvar)
    logvar = run(SIXTEEN, params | {"encoder": encoder | {"conv_out": head}}, x, "encode").logvar
    assert (theirs.min(), theirs.max()) == (-30, 20)
    np.testing.assert_array_equal(logvar, theirs)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_gradients_equal_diffusers(config):
    """Of a loss that reaches every parameter, with respect to parameters and picture."""
    torch, twin, params = torch_twin(config)
    rng = np.random.default_rng(2)
    x = rng.uniform(-1, 1, (1, 3 * config.factor, 5 * config.factor, 3)).astype(np.float32)
    module = kl.AutoencoderKL(config)

    def loss(params, x):
        posterior = module.apply({"params": params}, x, method="encode")
        picture = module.apply({"params": params}, posterior.mean, method="decode")
        return jnp.mean((picture - x) ** 2) + 0.1 * jnp.mean(jnp.exp(posterior.logvar) + posterior.mean**2)

    value, (of_params, of_x) = jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))
    their_x = nchw(torch, x).requires_grad_()
    dist = twin.encode(their_x).latent_dist
    theirs = ((twin.decode(dist.mean).sample - their_x) ** 2).mean()
    theirs = theirs + 0.1 * (dist.logvar.exp() + dist.mean**2).mean()
    theirs.backward()
    assert abs(value - theirs.item()) < 1e-5 * theirs.item()
    assert relative(of_x, nhwc(their_x.grad)) < 1e-4
    assert_gradients_equal(config, of_params, twin)


def test_parameter_counts():
    counts = {name: size_of(abstract_params(kl.AUTOENCODER, config)) for name, config in kl.VARIANTS.items()}
    assert counts["sd3"] == counts["flux"] == 83_819_683
    assert counts["sdxl"] == 83_653_863
    assert 5e5 < counts["tiny"] < 1e6


@pytest.mark.parametrize("variant", ["sd3", "flux", "sdxl"])
def test_full_size_table_covers_the_manifest(variant):
    manifest = json.loads((MANIFESTS / f"kl_{variant}.json").read_text())
    config = kl.VARIANTS[variant]
    assert kl.from_foreign(manifest["config"]) == config
    cover(kl.rows(config), manifest["tensors"], abstract_params(kl.AUTOENCODER, config))


@pytest.mark.parametrize("variant", ["sd3", "flux", "sdxl"])
def test_manifest_is_diffusers_own(variant):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    manifest = json.loads((MANIFESTS / f"kl_{variant}.json").read_text())
    with torch.device("meta"):
        twin = diffusers.AutoencoderKL(**manifest["config"])
    assert {name: list(tensor.shape) for name, tensor in twin.state_dict().items()} == manifest["tensors"]


def test_stage_1_freezes_3715_parameters():
    params = flat(abstract_params(kl.AUTOENCODER, kl.VARIANTS["sd3"]))
    frozen = {path: leaf for path, leaf in params.items() if re.search("decoder/(norm_out|conv_out)", path)}
    assert len(frozen) == 4 and size_of(frozen) == 3_715


def test_unknown_remat_policy():
    with pytest.raises(UserError, match="'fll'"):
        jax.eval_shape(kl.AutoencoderKL(FOUR, remat="fll").init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_size_that_does_not_divide():
    params = random_params(FOUR)
    with pytest.raises(UserError, match="30 x 20 px .* factor 4"):
        kl.AutoencoderKL(FOUR).apply({"params": params}, np.zeros((1, 20, 30, 3), np.float32), method="encode")


def test_bfloat16_keeps_its_islands():
    """bfloat16 compute stays near float32; posterior and picture are float32, and not bfloat16 numbers in float32."""
    params = random_params(SIXTEEN)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 40, 24, 3)).astype(np.float32)
    exact = run(SIXTEEN, params, x, "encode")
    near = run(SIXTEEN, params, x, "encode", dtype=jnp.bfloat16)
    picture = run(SIXTEEN, params, near.mean, "decode", dtype=jnp.bfloat16)
    for result in jax.device_get((*near, picture)):
        assert result.dtype == np.float32
        assert np.mean(result == result.astype(jnp.bfloat16)) < 0.05
    assert 1e-4 < relative(near.mean, exact.mean) < 5e-2


def test_quant_conv_does_not_round_the_posterior():
    module = kl.AutoencoderKL(FOUR, dtype=jnp.bfloat16)
    params, x = abstract_params(kl.AUTOENCODER, FOUR), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    found = traced(lambda p, x: module.apply({"params": p}, x, method="encode"), params, x)
    *_, before, last = [e for e in found if e.primitive.name == "conv_general_dilated"]
    assert {v.aval.dtype for v in before.outvars + last.invars + last.outvars} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_products_are_in_full_precision(dtype):
    """By the traced program, forward and backward: on a GPU or a TPU the default would round float32 operands."""
    module = kl.AutoencoderKL(FOUR, dtype=dtype)

    def loss(params, x):
        posterior = module.apply({"params": params}, x, method="encode")
        picture = module.apply({"params": params}, posterior.mean, method="decode")
        return jnp.sum(picture**2) + jnp.sum(posterior.logvar)

    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert not rounded(traced(jax.grad(loss), abstract_params(kl.AUTOENCODER, FOUR), x))


def test_no_position_by_position_matrix():
    """Neither direction ever has an array with two axes of all N positions, gradients included: 256 GiB at 4096 px."""
    n = 64 * 96  # positions; three blocks
    params, x = abstract_params(kl.AUTOENCODER, FOUR), jax.ShapeDtypeStruct((1, 4 * 64, 4 * 96, 3), jnp.float32)
    module = kl.AutoencoderKL(FOUR)

    def squares(found):
        return [shape for shape in shapes(found) if sum(size >= n for size in shape) > 1]

    found = traced(jax.grad(lambda p, x: jnp.sum(module.apply({"params": p}, x))), params, x)
    assert (1, n, 16) in shapes(found)  # the attention is there, at this size
    assert not squares(found)
    q = jax.ShapeDtypeStruct((1, n, 16), jnp.float32)
    dense = traced(lambda q: jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, q)), q)
    assert squares(dense)


@pytest.mark.parametrize("platform, kernel", [("tpu", "splash"), ("gpu", ""), ("cpu", "")])
def test_a_tpu_has_a_kernel_for_its_attention(platform, kernel):
    """Elsewhere the blocks are a loop of products: cuDNN's kernels take narrower heads than those of full size."""
    module = kl.AutoencoderKL(kl.VARIANTS["tiny"], dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with for_platform(platform):
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        shown = str(jax.make_jaxpr(lambda params, x: module.apply(params, x, method="encode").mean)(params, x))
    assert ("splash" in shown) is bool(kernel) and "dot_product_attention" not in shown


def test_group_norm_in_closed_form():
    """Against float64 on activations far from zero for their spread, where E[x^2] - E[x]^2 fails; 0 on a constant."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 33, 47, 12)) + 3000).astype(np.float32)
    norm = kl.GroupNorm(4)
    params = jax.jit(norm.init)(jax.random.key(0), x)

    @jax.jit
    def normed(x):
        return norm.apply(params, x)(x)

    groups = x.astype(np.float64).reshape(2, 33 * 47, 4, 3)
    wanted = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    assert relative(normed(x), wanted.reshape(x.shape)) < 1e-3  # x factor + offset rounds at 3000 spreads
    assert np.abs(np.asarray(normed(np.full((1, 8, 8, 12), 7.3, np.float32)))).max() < 1e-2


@pytest.mark.parametrize(
    "dtype, offset, limit", [(jnp.float32, 0, 1e-5), (jnp.float32, 300, 1e-4), (jnp.bfloat16, 0, 1e-2)]
)
def test_gradients_of_group_affine_are_those_of_the_formula(dtype, offset, limit):
    """Against torch in float64, also of values far from zero for their spread."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 9, 14, 12)) + offset).astype(dtype)
    gain, bias = (1 + rng.standard_normal((2, 4, 3))).astype(np.float32)
    gradients = Affine(*rng.standard_normal((2, 2, 1, 1, 12)).astype(np.float32))

    @jax.jit
    def with_gradients(x, gain, bias, gradients):
        result, back = jax.vjp(kl.group_affine, x, gain, bias)
        return result, back(gradients)

    ours, found = with_gradients(x, gain, bias, gradients)
    given = [torch.tensor(np.asarray(part, np.float64), requires_grad=True) for part in (x, gain, bias)]
    groups = given[0].reshape(2, 9 * 14, 4, 3)
    mean, variance = groups.mean((1, 3)), groups.var((1, 3), correction=0)
    factor = given[1] / torch.sqrt(variance + 1e-6)[:, :, None]
    wanted = (factor, given[2] - mean[:, :, None] * factor)
    for made, part in zip(ours, wanted, strict=True):
        assert relative(made, part.detach().numpy().reshape(made.shape)) < limit
    torch.autograd.backward(wanted, [torch.tensor(np.asarray(g, np.float64)).reshape(2, 4, 3) for g in gradients])
    for got, part in zip(found, given, strict=True):
        assert relative(got, part.grad.numpy()) < limit
    assert found[0].dtype == dtype


def test_scale_and_back():
    z = np.random.default_rng(0).standard_normal((1, 3, 3, 16)).astype(np.float32)
    for config in kl.VARIANTS.values():
        np.testing.assert_allclose(kl.unscale(config, kl.scale(config, z)), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl.scale(kl.VARIANTS["sd3"], jnp.float32(1.0)), (1 - 0.0609) * 1.5305, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"latent_chanels": 4}, "latent_chanels"),
    ],
)
def test_foreign_config_that_is_not_supported(change, message):
    with pytest.raises(UserError, match=message):
        kl.from_foreign(kl.to_foreign(kl.VARIANTS["sd3"]) | change)


def test_foreign_config_there_and_back():
    for config in (*kl.VARIANTS.values(), FOUR):
        foreign = kl.to_foreign(config)
        assert kl.from_foreign(foreign | {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30"}) == config
        assert kl.from_foreign(json.loads(json.dumps(foreign))) == config


def test_a_sample_size_of_two_sides():
    """diffusers takes a pair too; a config is a key of caches, which a list cannot be."""
    foreign = kl.to_foreign(kl.VARIANTS["tiny"]) | {"sample_size": [64, 96]}
    config = kl.from_foreign(foreign)
    assert kl.to_foreign(config) == foreign and abstract_params(kl.AUTOENCODER, config)
