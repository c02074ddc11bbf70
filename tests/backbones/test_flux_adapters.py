"""Laws of adapters over FLUX: diffusers with PEFT, and its reader of kohya's layout, compute what is computed here.
That FLUX needs no code of its own for them is the point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flux_twin import DEV
from twins import apart

from lwd_jax.adapters import attach
from lwd_jax.adapters.factors import frozen, merged, trainable
from lwd_jax.adapters.peft import FILE, as_kohya, products, write_file
from lwd_jax.config import Adapter
from lwd_jax.train.state import merge
from lwd_jax.weights.table import flat, nested

LORA = Adapter("lora", rank=3, alpha=5.0)
MINOR = Adapter("minor_components", rank=2)


def moved(params):
    """Factors that are no longer what they were at the start."""
    rng, leaves = np.random.default_rng(4), flat(params)
    noise = {name: 0.05 * rng.standard_normal(leaves[name].shape) for name in trainable(leaves)}
    return merge(params, nested({name: leaves[name] + jnp.asarray(part, jnp.float32) for name, part in noise.items()}))


@functools.cache
def models():
    """(diffusers' model, parameters with minor components over a LoRA over it): URAE's 4K over its 2K."""
    model = DEV.foreign()
    lora = moved(attach(DEV.params(model), jax.random.key(0), LORA))
    return model, moved(attach(frozen(lora), jax.random.key(1), MINOR))


def ours(params, inputs):
    return np.asarray(jax.jit(DEV.module().apply)({"params": params}, *inputs))


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_diffusers_loads_it_and_gives_the_same_output(tmp_path, layout):
    """Through FluxPipeline.load_lora_weights, which knows either layout by itself."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    model, params = models()
    inputs = DEV.inputs(latent=(6, 10))
    write_file(tmp_path / FILE, DEV.rows, params, **({"layout": as_kohya} if layout == "kohya" else {}))
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)
    plain = DEV.foreign_output(model, *inputs)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    try:
        expected = DEV.foreign_output(model, *inputs)
    finally:
        pipe.unload_lora_weights()
    assert apart(expected, plain) > 1e-2
    assert apart(ours(params, inputs), expected) < 1e-4
    assert apart(ours(merged(params), inputs), expected) < 1e-4


def test_the_same_layers_as_the_released_recipe_and_the_text_stream():
    names = {name.split(".", 2)[2] for name in products(DEV.rows, models()[1])}
    assert names == {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    }
