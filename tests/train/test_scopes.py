"""Law: a profiler's trace can be read: every operation of a step carries the name of the part that it belongs to."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lwd_jax import config as configs
from lwd_jax.autoencoders.kl import AUTOENCODER
from lwd_jax.autoencoders.kl import Config as KL
from lwd_jax.config import load_config
from lwd_jax.nn.attention import attention
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.program import autoencoder_stage, backbone_stage, build_program

SMALL = {"resolution": 32, "dtype": "float32", "remat": "none", "data": {"batch_size": 2}, "mesh": {"fsdp": 1}}


class Backbone(nn.Module):
    """One product."""

    config = SimpleNamespace(patch_size=2, joint_attention_dim=3, pooled_projection_dim=2, guidance_embeds=False)

    @nn.compact
    def __call__(self, z_t, t, cond):
        return nn.Dense(4, name="out")(z_t) + t[:, None, None, None] + cond.tokens.mean()


def components(names) -> set[str]:
    """Parts of names like "jit(step)/gradient/transpose(jvp(loss))/mul"."""
    return {part for name in names for part in re.findall(r"[\w.]+", name)}


def program_of(config, stage):
    return build_program(config, make_mesh(config.mesh, jax.devices()[:1]), stage)


def test_a_compiled_step_says_what_each_operation_is_of():
    config = load_config(SMALL | {"stage": 2, "optimizer": {"accumulate": 2}, "training": {"ema": 0.9}})
    module, latent = Backbone(), jnp.zeros((1, 4, 4, 4))
    cond = SimpleNamespace(tokens=jnp.zeros((1, 2, 3)))
    stage = backbone_stage(
        config, module, lambda key: module.init(key, latent, jnp.zeros(1), cond)["params"], lambda z: z, (4, 4, 4), 2
    )
    program = program_of(config, stage)
    text = program.step.lower(program.state, program.batch, jax.random.key(0)).compile().as_text()
    found = components(re.findall(r'op_name="([^"]*)"', text))
    objective = {"draw", "path", "mask", "prediction", "loss", "metrics"}
    step = {"gradient", "accumulate", "clip", "optimizer", "ema", "norm"}
    assert objective | step <= found
    assert {"Backbone", "out"} <= found  # flax names the modules by itself
    assert "encode" not in found


def test_the_parts_of_the_autoencoders_step():
    config = load_config(SMALL | {"stage": 1, "reconstruction": {"scales": (2,)}})
    sizes = KL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4)
    module = AUTOENCODER.build(sizes)

    def init(key):
        halves = ("encode", (1, 32, 32, 3)), ("decode", (1, 32, 32, 4))
        found = [module.init(key, jnp.zeros(shape), method=method)["params"] for method, shape in halves]
        return found[0] | found[1]

    perceptual = jax.tree_util.Partial(lambda x, y: jnp.abs(x - y).mean((1, 2, 3)))
    program = program_of(config, autoencoder_stage(config, module, init, perceptual))
    text = program.step.lower(program.state, program.batch, jax.random.key(0)).as_text(debug_info=True)
    found = components(re.findall(r'loc\("([^"]*)"', text))
    assert {"encode", "posterior", "decode", "scale_consistency", "lpips", "loss", "metrics"} <= found
    assert {"encoder", "decoder", "mid_attention"} <= found  # flax's


@pytest.mark.parametrize("heads", [4, 3])  # which context 4 divides, and does not
def test_attention_and_its_exchange(heads):
    mesh = make_mesh(configs.Mesh(fsdp=2, context=4))
    x = jax.ShapeDtypeStruct((2, 8, heads, 8), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(attention).lower(x, x, x).as_text(debug_info=True)
    names = re.findall(r'loc\("([^"]*)"', text)
    moved = [name for name in names if re.search(r"all_to_all|all_gather", name)]
    assert moved and all("exchange" in name for name in moved)
    assert any(name.startswith("jit(attention)/attention/") for name in names)
