"""Laws of every backbone: it equals diffusers' model of the same weights, at its sizes, through its folders."""

import inspect
import json
import math
import re
from pathlib import Path

import flux_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd3_twin
from jaxprs import rounded, traced
from twins import apart, foreign_class, tensors_of

from lwd_jax.backbones import flux, load_backbone, save_backbone, sd3
from lwd_jax.errors import UserError
from lwd_jax.train.operands import of_masters, operands
from lwd_jax.train.state import merge
from lwd_jax.weights.model import abstract_params, init_params
from lwd_jax.weights.table import cover, flat, write

MANIFESTS = Path(__file__).parents[1] / "manifests"
FULL_SIZE = {  # variant -> family, manifest, parameters (without SD3's position table, a buffer of diffusers')
    "sd3-medium": (sd3.BACKBONE, "sd3_medium", 2_028_328_000),
    "sd3.5-medium": (sd3.BACKBONE, "sd35_medium", 2_243_171_520),
    "sd3.5-large": (sd3.BACKBONE, "sd35_large", 8_056_627_520),
    "flux-dev": (flux.BACKBONE, "flux_dev", 11_901_408_320),
    "flux-schnell": (flux.BACKBONE, "flux_schnell", 11_891_178_560),
}
TWINS = {
    "SD3": sd3_twin.PLAIN,
    "SD3, qk norm, portrait": sd3_twin.PORTRAIT,
    "SD3, dual attention, landscape": sd3_twin.DUAL,
    "FLUX dev, portrait": flux_twin.DEV,
    "FLUX schnell, landscape": flux_twin.SCHNELL,
}
RICHEST = {"SD3": sd3_twin.DUAL, "FLUX": flux_twin.DEV}
PLAINEST = {"SD3": sd3_twin.PLAIN, "FLUX": flux_twin.SCHNELL}


def over(twins):
    return pytest.mark.parametrize("twin", twins.values(), ids=twins)


@over(TWINS)
def test_forward_and_gradients_equal_diffusers(twin):
    model = twin.foreign()
    z_t, t, cond = twin.inputs()
    weight = np.random.default_rng(2).standard_normal(z_t.shape).astype(np.float32)
    z, expected = twin.foreign_call(model, z_t, t, cond)
    (expected * expected.new_tensor(weight)).sum().backward()

    (_, out), (of_params, of_z) = twin.compiled()(twin.params(model), z_t, t, cond, weight)
    assert out.dtype == jnp.float32 and out.shape == z_t.shape
    assert apart(np.asarray(out), expected.detach().numpy()) <= 1e-5
    assert apart(np.asarray(of_z), z.grad.permute(0, 2, 3, 1).numpy()) <= 1e-4
    twin.assert_gradients_equal(of_params, model)


@over(RICHEST)
def test_bfloat16_is_near_float32(twin):
    params, given = twin.params(twin.foreign()), twin.inputs()
    near = jax.jit(twin.module(dtype=jnp.bfloat16).apply)({"params": params}, *given)
    assert near.dtype == jnp.float32
    assert 0 < apart(np.asarray(near), twin.output(params, *given)) < 0.03


@over(RICHEST)
def test_gradients_by_the_operands_are_those_by_the_masters(twin):
    """Bit for bit, in half the memory: a bfloat16 model rounds its kernels, and their gradients, anyway."""
    module, given = twin.module(dtype=jnp.bfloat16), twin.inputs()
    params = twin.params(twin.foreign())

    def gradient(params, by):
        def loss(by):
            return jnp.square(module.apply({"params": merge(params, by)}, *given)).mean()

        return jax.value_and_grad(loss)(by)

    def bits(by):  # by default XLA may skip a rounding
        return jax.jit(gradient).lower(params, by).compile({"xla_allow_excess_precision": False})(params, by)

    copy = jax.device_get(jax.jit(lambda params: operands(params, module.dtype))(params))
    # Nobody reads the copy's values: it costs no memory.
    unread = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan) if leaf.dtype == jnp.bfloat16 else leaf, copy)
    (expected, by_masters), (found, by_operands) = jax.device_get((bits(params), bits(unread)))
    assert found == expected
    halved = {path for path, leaf in flat(copy).items() if leaf.dtype == jnp.bfloat16}
    kernels = {path for path in flat(params) if path.endswith("/kernel")}
    embedders = {path for path in kernels if re.match("(time|guidance|pooled)/(up|down)/", path)}
    assert halved == {f"{path}_operand" for path in kernels - embedders}
    for path, leaf in flat(by_operands).items():
        assert leaf.dtype == flat(copy)[path].dtype
    named = of_masters(by_operands)
    assert jax.tree.structure(named) == jax.tree.structure(params)
    for path, leaf in flat(named).items():
        np.testing.assert_array_equal(leaf.astype(jnp.float32), flat(by_masters)[path], err_msg=path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@over(RICHEST)
def test_float32_products_are_in_full_precision(twin, dtype):
    """By the traced program, forward and backward; in bfloat16 the embedders of time and pooled text are such."""
    module, given = twin.module(dtype=dtype), twin.inputs()
    found = traced(jax.grad(lambda p: module.apply({"params": p}, *given).sum()), twin.abstract())
    assert not rounded(found)


@over(RICHEST)
def test_batch_members_do_not_see_each_other(twin):
    params = twin.params(twin.foreign())
    one, other = twin.inputs(), twin.inputs(seed=5)
    mixed = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), one, other)
    made = twin.output(params, *mixed)
    np.testing.assert_allclose(made[0], twin.output(params, *one)[0], atol=1e-5)
    np.testing.assert_allclose(made[1], twin.output(params, *other)[1], atol=1e-5)


@over({"SD3": sd3_twin.PLAIN, "FLUX": flux_twin.DEV})
def test_text_states_are_read_in_the_dtype_of_the_products(twin):
    """So batches of them may be rounded to it before they go to a device: the same bits come out."""
    z_t, t, cond = twin.inputs()
    rounded = cond._replace(tokens=cond.tokens.astype(jnp.bfloat16))
    module, params = twin.module(dtype=jnp.bfloat16), twin.params(twin.foreign())
    of_both, of_rounded = (jax.jit(module.apply)({"params": params}, z_t, t, text) for text in (cond, rounded))
    assert np.any(cond.tokens != rounded.tokens) and np.any(of_both)
    np.testing.assert_array_equal(of_both, of_rounded)


@over({"SD3": sd3_twin.PLAIN, "FLUX": flux_twin.DEV})
def test_new_model_predicts_zero_and_learns(twin):
    """adaLN-Zero: the first prediction is 0, and its gradient reaches the last projection. Blocks of a stack are drawn
    each from its own key."""
    params = init_params(twin.backbone, twin.config, jax.random.key(0))
    z_t, t, cond = twin.inputs()
    (_, out), (gradient, _) = twin.compiled()(params, z_t, t, cond, z_t)
    assert not np.any(out) and np.any(gradient["final_proj"]["kernel"])
    stacks = {path: leaf for path, leaf in flat(params).items() if "_blocks/" in path and path.endswith("/kernel")}
    drawn = {path: leaf for path, leaf in stacks.items() if "modulation" not in path and len(leaf) > 1}
    assert len(drawn) >= 10
    for path, leaf in drawn.items():
        assert not np.array_equal(leaf[0], leaf[1]), path


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_full_size(variant):
    """By shape evaluation alone: the parameter count of the release, and a table that covers its checkpoint."""
    family, manifest, count = FULL_SIZE[variant]
    config = family.variants[variant]
    abstract = abstract_params(family, config)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat(abstract).items()}
    assert sum(sizes.values()) - sizes.get("position/table", 0) == count
    cover(family.rows(config), json.loads((MANIFESTS / f"{manifest}.json").read_text()), abstract)
    assert family.from_foreign(json.loads(json.dumps(family.to_foreign(config)))) == config


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_manifests_are_diffusers(variant):
    torch = pytest.importorskip("torch")
    family, manifest, count = FULL_SIZE[variant]
    with torch.device("meta"):
        model = foreign_class(family)(**family.to_foreign(family.variants[variant]))
    made = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert json.loads((MANIFESTS / f"{manifest}.json").read_text()) == made
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("variant", ["sd3-medium", "flux-dev"])
def test_4096_px_evaluates_by_shape(variant):
    family = FULL_SIZE[variant][0]
    config = family.variants[variant]
    module = family.build(config, dtype=jnp.bfloat16)
    out = jax.eval_shape(module.apply, {"params": abstract_params(family, config)}, *family.inputs(config, 4096, 1))
    assert out.shape == (1, 512, 512, 16) and out.dtype == jnp.float32


@over(RICHEST)
def test_table_there_and_back_is_the_identity(twin):
    model = twin.foreign()
    back, tensors = dict(write(twin.rows, twin.params(model))), tensors_of(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@over(RICHEST)
def test_folder_loads_in_diffusers(twin, tmp_path):
    params, given = twin.params(twin.foreign()), twin.inputs()
    save_backbone(tmp_path / "transformer", twin.module(), params)
    theirs = foreign_class(twin.backbone)
    model, report = theirs.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report.values()), report
    assert apart(twin.output(params, *given), twin.foreign_output(model, *given)) <= 1e-5

    again, back = load_backbone(tmp_path / "transformer")
    assert again.config == twin.config
    jax.tree.map(np.testing.assert_array_equal, params, back)


@over(PLAINEST)
def test_folders_in_shards(twin, tmp_path):
    params = twin.params(twin.foreign())
    save_backbone(tmp_path / "transformer", twin.module(), params, max_shard_bytes=100_000)
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, params, load_backbone(tmp_path / "transformer")[1])


@over(PLAINEST)
def test_diffusers_folder_loads_here(twin, tmp_path):
    """A sharded bfloat16 pipeline folder, as PyTorch writes it, comes back bit for bit."""
    torch = pytest.importorskip("torch")
    model = twin.foreign().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    (tmp_path / "model_index.json").write_text("{}")
    module, params = load_backbone(tmp_path, dtype=jnp.bfloat16, remat="full")
    assert (module.config, module.dtype, module.remat) == (twin.config, jnp.bfloat16, "full")
    for name, tensor in write(twin.rows, params):
        np.testing.assert_array_equal(tensor, model.state_dict()[name].float().numpy(), err_msg=name)


@over(PLAINEST)
def test_fields_a_config_does_not_say_are_diffusers_defaults(twin):
    family = twin.backbone
    theirs = inspect.signature(foreign_class(family).__init__).parameters
    written = family.to_foreign(twin.config)
    assert set(theirs) - {"self"} == set(written)
    defaults = {name: theirs[name].default for name in written}
    assert family.from_foreign({"_class_name": family.class_name}) == family.from_foreign(defaults)


@over(PLAINEST)
def test_arguments_that_do_not_fit_are_refused(twin):
    z_t, t, cond = twin.inputs()
    apply, abstract = twin.module().apply, {"params": twin.abstract()}
    with pytest.raises(ValueError, match=f"{twin.latent[0] - 1} x {twin.latent[1]}"):
        jax.eval_shape(apply, abstract, z_t[:, 1:], t, cond)
    with pytest.raises(ValueError, match="pooled"):
        jax.eval_shape(apply, abstract, z_t, t, cond._replace(pooled=None))


@pytest.mark.parametrize(
    ("twin", "change", "said"),
    [
        (sd3_twin.PLAIN, {"num_layer": 4}, "Did you mean 'num_layers'"),
        (sd3_twin.PLAIN, {"dual_attention_layers": [1, 2]}, "dual_attention_layers"),
        (sd3_twin.PLAIN, {"qk_norm": "layer_norm"}, "qk_norm"),
        (sd3_twin.PLAIN, {"caption_projection_dim": 64}, "caption_projection_dim"),
        (flux_twin.DEV, {"num_layer": 4}, "Did you mean 'num_layers'"),
        (flux_twin.DEV, {"out_channels": 8}, "out_channels 8"),
        (flux_twin.DEV, {"in_channels": 18, "out_channels": 18}, "in_channels 18"),
        (flux_twin.DEV, {"patch_size": 2}, "patch_size is 2"),
        (flux_twin.DEV, {"axes_dims_rope": [4, 4, 4]}, "sum to 16"),
        (flux_twin.DEV, {"_lwd": {"nkt": 3}}, "Did you mean 'ntk'"),
    ],
)
def test_unsupported_configs_are_refused(twin, change, said):
    with pytest.raises(UserError, match=said):
        twin.backbone.from_foreign(twin.backbone.to_foreign(twin.config) | change)
