"""Laws of the SD3 backbone: it equals diffusers' SD3Transformer2DModel, at its sizes, through its folders."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import rounded, shapes, traced
from sd3_twin import PLAIN, assert_gradients_equal, foreign_call, foreign_model, foreign_output, params_of
from twins import apart, tensors_of

from lwd_jax.backbones import load_backbone, save_backbone, sd3
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.weights.model import abstract_params, init_params
from lwd_jax.weights.table import cover, flat, write

MANIFESTS = Path(__file__).parents[1] / "manifests"
FULL_SIZE = {  # variant -> manifest, parameters (without the position table, which diffusers keeps as a buffer)
    "sd3-medium": ("sd3_medium", 2_028_328_000),
    "sd3.5-medium": ("sd35_medium", 2_243_171_520),
    "sd3.5-large": ("sd35_large", 8_056_627_520),
}
DUAL = "dual attention, landscape"
CASES = {
    "plain": (PLAIN, (12, 12)),
    "qk norm, portrait": (dataclasses.replace(PLAIN, qk_norm=True), (20, 6)),
    DUAL: (dataclasses.replace(PLAIN, qk_norm=True, dual_layers=2), (6, 14)),
}


def random_inputs(case, seed=1, batch=2, length=7):
    config, (height, width) = CASES[case]
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    z_t, t = normal(batch, height, width, config.in_channels), rng.uniform(size=batch).astype(np.float32)
    tokens, pooled = normal(batch, length, config.joint_attention_dim), normal(batch, config.pooled_projection_dim)
    # SD3 attends to padding, in diffusers and here: a mask of nothing changes nothing.
    return z_t, t, Conditioning(tokens, mask=np.zeros((batch, length), np.float32), pooled=pooled)


@functools.cache
def compiled(case):
    """(params, z_t, t, cond, weight) -> ((sum(output weight), output), its gradients by params and z_t)."""
    module = sd3.SD3(CASES[case][0])

    def loss(params, z_t, t, cond, weight):
        out = module.apply({"params": params}, z_t, t, cond)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def output(case, params, z_t, t, cond) -> np.ndarray:
    (_, out), _ = compiled(case)(params, z_t, t, cond, np.zeros_like(z_t))
    return np.asarray(out)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_diffusers(case):
    config = CASES[case][0]
    model = foreign_model(config)
    z_t, t, cond = random_inputs(case)
    weight = np.random.default_rng(2).standard_normal(z_t.shape).astype(np.float32)
    z, expected = foreign_call(model, z_t, t, cond)
    (expected * expected.new_tensor(weight)).sum().backward()

    (_, out), (of_params, of_z) = compiled(case)(params_of(config, model), z_t, t, cond, weight)
    assert out.dtype == jnp.float32 and out.shape == z_t.shape
    assert apart(np.asarray(out), expected.detach().numpy()) <= 1e-5
    assert apart(np.asarray(of_z), z.grad.permute(0, 2, 3, 1).numpy()) <= 1e-4
    assert_gradients_equal(config, of_params, model)


def test_bfloat16_is_near_float32():
    config = CASES[DUAL][0]
    params = params_of(config, foreign_model(config))
    exact = output(DUAL, params, *random_inputs(DUAL))
    module = sd3.SD3(config, dtype=jnp.bfloat16)
    rounded = jax.jit(module.apply)({"params": params}, *random_inputs(DUAL))
    assert rounded.dtype == jnp.float32
    assert 0 < apart(np.asarray(rounded), exact) < 0.03


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_products_are_in_full_precision(dtype):
    """By the traced program, forward and backward; in bfloat16 the embedders of time and pooled text are such."""
    config, (params, arguments) = CASES[DUAL][0], (abstract_params(sd3.BACKBONE, CASES[DUAL][0]), random_inputs(DUAL))
    module = sd3.SD3(config, dtype=dtype)
    found = traced(jax.grad(lambda p: module.apply({"params": p}, *arguments).sum()), params)
    assert not rounded(found)


def test_the_last_blocks_text_asks_nothing():
    """It has no way out, so only picture tokens attend there: the one place of fewer queries than keys."""
    config = dataclasses.replace(PLAIN, num_layers=1)
    z_t, t, cond = random_inputs("plain")
    params = abstract_params(sd3.BACKBONE, config)
    found = traced(lambda p: sd3.SD3(config).apply({"params": p}, z_t, t, cond), params)
    picture, both = 36, 36 + cond.tokens.shape[1]
    logits = {shape[-2:] for shape in shapes(found) if shape[-1:] == (both,)}
    assert (picture, both) in logits and (both, both) not in logits


def test_batch_members_do_not_see_each_other():
    params = params_of(PLAIN, foreign_model(PLAIN))
    ours, other = random_inputs("plain"), random_inputs("plain", seed=5)
    mixed = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), ours, other)
    made = output("plain", params, *mixed)
    np.testing.assert_allclose(made[0], output("plain", params, *ours)[0], atol=1e-5)
    np.testing.assert_allclose(made[1], output("plain", params, *other)[1], atol=1e-5)


def test_new_model_predicts_zero_and_learns():
    """adaLN-Zero: the first prediction is 0, and its gradient reaches the last projection."""
    params = init_params(sd3.BACKBONE, PLAIN, jax.random.key(0))
    z_t, t, cond = random_inputs("plain")
    (_, out), (gradient, _) = compiled("plain")(params, z_t, t, cond, z_t)
    assert not np.any(out) and np.any(gradient["final_proj"]["kernel"])
    blocks = params["joint_blocks"]["picture"]
    assert blocks["q"]["kernel"].shape == (3, PLAIN.width, PLAIN.width)
    assert not np.array_equal(*blocks["q"]["kernel"][:2]), "blocks are drawn each from its own key"
    bound = math.sqrt(6 / (2 * PLAIN.width))  # Glorot and Bengio 2010, eq. 16
    np.testing.assert_allclose(np.std(blocks["q"]["kernel"]), bound / math.sqrt(3), rtol=0.05)
    assert not np.any(blocks["modulation"]["kernel"])


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_full_size(variant):
    """By shape evaluation alone: the parameter count of the release, and a table that covers its checkpoint."""
    manifest, count = FULL_SIZE[variant]
    config = sd3.VARIANTS[variant]
    abstract = abstract_params(sd3.BACKBONE, config)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat(abstract).items()}
    assert sum(sizes.values()) - sizes["position/table"] == count
    cover(sd3.weights(config), json.loads((MANIFESTS / f"{manifest}.json").read_text()), abstract)
    assert sd3.from_foreign(sd3.to_foreign(config)) == config


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_manifests_are_diffusers(variant):
    torch = pytest.importorskip("torch")
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**sd3.to_foreign(sd3.VARIANTS[variant]))
    made = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert json.loads((MANIFESTS / f"{FULL_SIZE[variant][0]}.json").read_text()) == made
    assert sum(parameter.numel() for parameter in model.parameters()) == FULL_SIZE[variant][1]


def test_4096_px_evaluates_by_shape():
    config = sd3.VARIANTS["sd3-medium"]
    arguments = sd3.inputs(config, 4096, 1)
    module = sd3.SD3(config, dtype=jnp.bfloat16)
    out = jax.eval_shape(module.apply, {"params": abstract_params(sd3.BACKBONE, config)}, *arguments)
    assert out.shape == (1, 512, 512, 16) and out.dtype == jnp.float32


def test_table_there_and_back_is_the_identity():
    config = CASES[DUAL][0]
    model = foreign_model(config)
    back = dict(write(sd3.weights(config), params_of(config, model)))
    tensors = tensors_of(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_a_checkpoints_own_position_table_is_used_and_kept():
    """Another table of one part per column and row, in half precision as releases are: used and written as it was."""
    torch = pytest.importorskip("torch")
    model = foreign_model(PLAIN)
    size, half = PLAIN.pos_embed_max_size, PLAIN.width // 2
    rng = np.random.default_rng(3)
    columns, rows = rng.standard_normal((2, size, half)).astype(np.float16).astype(np.float32)
    places = (size, size, half)
    own = np.concatenate([np.broadcast_to(columns[None], places), np.broadcast_to(rows[:, None], places)], axis=-1)
    own = own.reshape(1, size * size, 2 * half)
    model.pos_embed.pos_embed.copy_(torch.from_numpy(own))
    params = params_of(PLAIN, model)
    arguments = random_inputs("plain")
    assert apart(output("plain", params, *arguments), foreign_output(model, *arguments)) <= 1e-5
    np.testing.assert_array_equal(dict(write(sd3.weights(PLAIN), params))["pos_embed.pos_embed"], own)


def test_a_position_table_of_another_kind_is_refused():
    rng = np.random.default_rng(4)
    with pytest.raises(UserError, match="pos_embed.pos_embed"):
        sd3.POSITIONS.to_ours(rng.standard_normal((1, 36, 8)))


def test_folder_loads_in_diffusers(tmp_path):
    pytest.importorskip("torch")
    from diffusers import SD3Transformer2DModel

    config = CASES[DUAL][0]
    module, params = sd3.SD3(config), params_of(config, foreign_model(config))
    save_backbone(tmp_path / "transformer", module, params)
    model, report = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report.values()), report
    arguments = random_inputs(DUAL)
    assert apart(output(DUAL, params, *arguments), foreign_output(model, *arguments)) <= 1e-5

    again, back = load_backbone(tmp_path / "transformer")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_folders_in_shards(tmp_path):
    params = params_of(PLAIN, foreign_model(PLAIN))
    save_backbone(tmp_path / "transformer", sd3.SD3(PLAIN), params, max_shard_bytes=100_000)
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, params, load_backbone(tmp_path / "transformer")[1])


def test_diffusers_folder_loads_here(tmp_path):
    """A sharded bfloat16 pipeline folder, as PyTorch writes it, comes back bit for bit."""
    torch = pytest.importorskip("torch")
    model = foreign_model(PLAIN).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    (tmp_path / "model_index.json").write_text("{}")
    module, params = load_backbone(tmp_path, dtype=jnp.bfloat16, remat="full")
    assert (module.config, module.dtype, module.remat) == (PLAIN, jnp.bfloat16, "full")
    for name, tensor in write(sd3.weights(PLAIN), params):
        np.testing.assert_array_equal(tensor, model.state_dict()[name].float().numpy(), err_msg=name)


def test_fields_a_config_does_not_say_are_diffusers_defaults():
    pytest.importorskip("torch")
    import inspect

    from diffusers import SD3Transformer2DModel

    theirs = inspect.signature(SD3Transformer2DModel.__init__).parameters
    defaults = {name: theirs[name].default for name in sd3.to_foreign(PLAIN)}
    assert sd3.from_foreign({"_class_name": "SD3Transformer2DModel"}) == sd3.from_foreign(defaults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layer": 4}, "Did you mean 'num_layers'"),
        ({"dual_attention_layers": [1, 2]}, "dual_attention_layers"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"caption_projection_dim": 64}, "caption_projection_dim"),
    ],
)
def test_unsupported_configs_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        sd3.from_foreign(sd3.to_foreign(PLAIN) | change)


def test_sizes_that_do_not_divide_are_refused():
    z_t, t, cond = random_inputs("plain")
    abstract = {"params": abstract_params(sd3.BACKBONE, PLAIN)}
    with pytest.raises(ValueError, match="7 x 12"):
        jax.eval_shape(sd3.SD3(PLAIN).apply, abstract, z_t[:, :7], t, cond)
    with pytest.raises(ValueError, match="pooled"):
        jax.eval_shape(sd3.SD3(PLAIN).apply, abstract, z_t, t, cond._replace(pooled=None))
