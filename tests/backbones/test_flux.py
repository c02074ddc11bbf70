"""Laws of the FLUX backbone: it equals diffusers' FluxTransformer2DModel, at its sizes, through its folders."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flux_twin import DEV, SCHNELL, foreign_call, foreign_model, foreign_output, params_of, random_inputs
from jaxprs import rounded, traced
from twins import apart, assert_gradients_equal, tensors_of

from lwd_jax.backbones import flux, load_backbone, save_backbone
from lwd_jax.errors import UserError
from lwd_jax.weights.model import abstract_params, init_params
from lwd_jax.weights.table import cover, flat, write

MANIFESTS = Path(__file__).parents[1] / "manifests"
FULL_SIZE = {  # variant -> manifest, parameters
    "flux-dev": ("flux_dev", 11_901_408_320),
    "flux-schnell": ("flux_schnell", 11_891_178_560),
}
CASES = {  # sizes, and the latent's: 5 x 3 and 3 x 7 tokens
    "dev, portrait": (DEV, (10, 6)),
    "schnell, landscape": (SCHNELL, (6, 14)),
}
PORTRAIT = "dev, portrait"


@functools.cache
def compiled(case, remat="none"):
    """(params, z_t, t, cond, weight) -> ((sum(output weight), output), its gradients by params and z_t)."""
    module = flux.FLUX(CASES[case][0], remat=remat)

    def loss(params, z_t, t, cond, weight):
        out = module.apply({"params": params}, z_t, t, cond)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def arguments(case, **options):
    config, size = CASES[case]
    return random_inputs(config, *size, **options)


def output(case, params, z_t, t, cond) -> np.ndarray:
    (_, out), _ = compiled(case)(params, z_t, t, cond, np.zeros_like(z_t))
    return np.asarray(out)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_diffusers(case):
    config = CASES[case][0]
    model = foreign_model(config)
    z_t, t, cond = arguments(case)
    weight = np.random.default_rng(2).standard_normal(z_t.shape).astype(np.float32)
    z, expected = foreign_call(model, z_t, t, cond)
    (expected * expected.new_tensor(weight)).sum().backward()

    (_, out), (of_params, of_z) = compiled(case)(params_of(config, model), z_t, t, cond, weight)
    assert out.dtype == jnp.float32 and out.shape == z_t.shape
    assert apart(np.asarray(out), expected.detach().numpy()) <= 1e-5
    assert apart(np.asarray(of_z), z.grad.permute(0, 2, 3, 1).numpy()) <= 1e-4
    assert_gradients_equal(flux.weights(config), of_params, model)


@pytest.mark.parametrize("remat", ["full", pytest.param("attention", marks=pytest.mark.heavy)])
def test_remat_changes_nothing(remat):
    """Gradients under jit at local batch 1; tests/backbones/test_sd3_remat.py says why there."""
    params = params_of(DEV, foreign_model(DEV))
    given = arguments(PORTRAIT, batch=1)
    plain, again = (compiled(PORTRAIT, name)(params, *given, given[0]) for name in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()), again, plain)


def test_guidance_is_heard():
    params = params_of(DEV, foreign_model(DEV))
    z_t, t, cond = arguments(PORTRAIT)
    louder = cond._replace(guidance=cond.guidance + 0.5)
    assert apart(output(PORTRAIT, params, z_t, t, louder), output(PORTRAIT, params, z_t, t, cond)) > 1e-3


def test_bfloat16_is_near_float32():
    params = params_of(DEV, foreign_model(DEV))
    exact = output(PORTRAIT, params, *arguments(PORTRAIT))
    module = flux.FLUX(DEV, dtype=jnp.bfloat16)
    near = jax.jit(module.apply)({"params": params}, *arguments(PORTRAIT))
    assert near.dtype == jnp.float32
    assert 0 < apart(np.asarray(near), exact) < 0.03


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_products_are_in_full_precision(dtype):
    """By the traced program, forward and backward; in bfloat16 the embedders are such."""
    params, given = abstract_params(flux.BACKBONE, DEV), arguments(PORTRAIT)
    module = flux.FLUX(DEV, dtype=dtype)
    assert not rounded(traced(jax.grad(lambda p: module.apply({"params": p}, *given).sum()), params))


def test_batch_members_do_not_see_each_other():
    params = params_of(DEV, foreign_model(DEV))
    ours, other = arguments(PORTRAIT), arguments(PORTRAIT, seed=5)
    mixed = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), ours, other)
    made = output(PORTRAIT, params, *mixed)
    np.testing.assert_allclose(made[0], output(PORTRAIT, params, *ours)[0], atol=1e-5)
    np.testing.assert_allclose(made[1], output(PORTRAIT, params, *other)[1], atol=1e-5)


def test_new_model_predicts_zero_and_learns():
    """adaLN-Zero: the first prediction is 0, and its gradient reaches the last projection."""
    params = init_params(flux.BACKBONE, DEV, jax.random.key(0))
    z_t, t, cond = arguments(PORTRAIT)
    (_, out), (gradient, _) = compiled(PORTRAIT)(params, z_t, t, cond, z_t)
    assert not np.any(out) and np.any(gradient["final_proj"]["kernel"])
    assert params["double_blocks"]["picture"]["q"]["kernel"].shape == (2, DEV.width, DEV.width)
    down = params["single_blocks"]["down"]["kernel"]
    assert down.shape == (3, 5 * DEV.width, DEV.width)
    assert not np.array_equal(*down[:2]), "blocks are drawn each from its own key"


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_full_size(variant):
    """By shape evaluation alone: the parameter count of the release, and a table that covers its checkpoint."""
    manifest, count = FULL_SIZE[variant]
    config = flux.VARIANTS[variant]
    abstract = abstract_params(flux.BACKBONE, config)
    assert sum(math.prod(leaf.shape) for leaf in flat(abstract).values()) == count
    cover(flux.weights(config), json.loads((MANIFESTS / f"{manifest}.json").read_text()), abstract)
    assert flux.from_foreign(json.loads(json.dumps(flux.to_foreign(config)))) == config


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_manifests_are_diffusers(variant):
    torch = pytest.importorskip("torch")
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**flux.to_foreign(flux.VARIANTS[variant]))
    made = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert json.loads((MANIFESTS / f"{FULL_SIZE[variant][0]}.json").read_text()) == made


def test_4096_px_evaluates_by_shape():
    config = flux.VARIANTS["flux-dev"]
    module = flux.FLUX(config, dtype=jnp.bfloat16)
    params = abstract_params(flux.BACKBONE, config)
    out = jax.eval_shape(module.apply, {"params": params}, *flux.inputs(config, 4096, 1))
    assert out.shape == (1, 512, 512, 16) and out.dtype == jnp.float32


def test_table_there_and_back_is_the_identity():
    model = foreign_model(DEV)
    back = dict(write(flux.weights(DEV), params_of(DEV, model)))
    tensors = tensors_of(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_folder_loads_in_diffusers(tmp_path):
    pytest.importorskip("torch")
    from diffusers import FluxTransformer2DModel

    module, params = flux.FLUX(DEV), params_of(DEV, foreign_model(DEV))
    save_backbone(tmp_path / "transformer", module, params)
    model, report = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report.values()), report
    assert apart(output(PORTRAIT, params, *arguments(PORTRAIT)), foreign_output(model, *arguments(PORTRAIT))) <= 1e-5

    again, back = load_backbone(tmp_path / "transformer")
    assert again.config == DEV
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_diffusers_folder_loads_here(tmp_path):
    """A sharded bfloat16 folder, as PyTorch writes it, comes back bit for bit."""
    torch = pytest.importorskip("torch")
    model = foreign_model(SCHNELL).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    (tmp_path / "model_index.json").write_text("{}")
    module, params = load_backbone(tmp_path, dtype=jnp.bfloat16, remat="full")
    assert (module.config, module.dtype, module.remat) == (SCHNELL, jnp.bfloat16, "full")
    for name, tensor in write(flux.weights(SCHNELL), params):
        np.testing.assert_array_equal(tensor, model.state_dict()[name].float().numpy(), err_msg=name)


def test_fields_a_config_does_not_say_are_diffusers_defaults():
    pytest.importorskip("torch")
    import inspect

    from diffusers import FluxTransformer2DModel

    theirs = inspect.signature(FluxTransformer2DModel.__init__).parameters
    defaults = {name: theirs[name].default for name in flux.to_foreign(DEV)}
    assert flux.from_foreign({"_class_name": "FluxTransformer2DModel"}) == flux.from_foreign(defaults)
    assert set(theirs) - {"self"} == set(flux.to_foreign(DEV))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layer": 4}, "Did you mean 'num_layers'"),
        ({"out_channels": 8}, "out_channels 8"),
        ({"in_channels": 18, "out_channels": 18}, "in_channels 18"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"axes_dims_rope": [4, 4, 4]}, "sum to 16"),
        ({"_lwd": {"nkt": 3}}, "Did you mean 'ntk'"),
    ],
)
def test_unsupported_configs_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        flux.from_foreign(flux.to_foreign(DEV) | change)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (DEV, {"pooled": None}, "pooled"),
        (DEV, {"guidance": None}, "is told a guidance scale, but cond.guidance is None"),
        (SCHNELL, {"guidance": np.ones(2, np.float32)}, "is not told a guidance scale"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(config, change, said):
    z_t, t, cond = random_inputs(config, 10, 6)
    abstract = {"params": abstract_params(flux.BACKBONE, config)}
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(flux.FLUX(config).apply, abstract, z_t, t, cond._replace(**change))


def test_sizes_that_do_not_divide_are_refused():
    z_t, t, cond = arguments(PORTRAIT)
    with pytest.raises(ValueError, match="9 x 6"):
        jax.eval_shape(flux.FLUX(DEV).apply, {"params": abstract_params(flux.BACKBONE, DEV)}, z_t[:, :9], t, cond)
