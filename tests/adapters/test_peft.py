"""Laws of adapter files: diffusers with PEFT loads them and computes what is computed here, and so back; what does not
belong to the model is named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import SD3, backbone

from lwd_jax.adapters import attach
from lwd_jax.adapters.factors import frozen, merged, targeted, trainable
from lwd_jax.adapters.peft import FILE, as_kohya, products, read_file, write_file
from lwd_jax.backbones import save_backbone, sd3
from lwd_jax.config import Adapter
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.train.state import merge
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import flat, foreign_names, nested

LORA = Adapter(kind="lora", rank=3, alpha=5.0, targets=("q", "k", "v", "out", "text/up", "modulation", "text_proj"))
MINOR = Adapter(kind="minor_components", rank=2)
ROWS = sd3.weights(SD3)


@functools.cache
def params_of(kind):
    """Adapters over the tiny backbone whose factors have moved; "chain": minor components over a LoRA."""
    base, start = backbone(0)[1], jax.jit(attach, static_argnums=2)
    adapted = {
        "lora": lambda: attach(base, jax.random.key(1), LORA),
        "minor_components": lambda: start(base, jax.random.key(1), MINOR),
        "chain": lambda: start(frozen(params_of("lora")), jax.random.key(1), MINOR),
    }[kind]()
    rng = np.random.default_rng(4)
    leaves = flat(jax.device_get(adapted))
    moved = {name: 0.1 * rng.standard_normal(leaves[name].shape).astype(np.float32) for name in trainable(leaves)}
    return jax.device_put(nested(leaves | {name: leaves[name] + leaf for name, leaf in moved.items()}))


def inputs():
    rng = np.random.default_rng(2)
    z, tokens, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 10, 4), (2, 5, 24), (2, 16)))
    return z, np.array([0.2, 0.9], np.float32), Conditioning(tokens, pooled=pooled)


def ours(params):
    return np.asarray(jax.jit(backbone(0)[0].apply)({"params": params}, *inputs()))


def theirs(model):
    torch = pytest.importorskip("torch")
    z, t, cond = inputs()
    arguments = (torch.from_numpy(x) for x in (z.transpose(0, 3, 1, 2).copy(), cond.tokens, cond.pooled, 1000 * t))
    with torch.no_grad():
        return model(*arguments).sample.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "transformer"
    save_backbone(folder, *jax.device_get(backbone(0)))
    return folder


def foreign(folder):
    return pytest.importorskip("diffusers").SD3Transformer2DModel.from_pretrained(folder)


def apart(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind,rank", [("lora", {3}), ("minor_components", {4}), ("chain", {3, 7})])
def test_diffusers_loads_it_and_gives_the_same_output(folder, tmp_path, kind, rank):
    pytest.importorskip("peft")
    params = params_of(kind)
    write_file(tmp_path / FILE, ROWS, params)
    assert {len(down) for down, _ in products(ROWS, params).values()} == rank
    model = foreign(folder)
    plain = theirs(model)
    model.load_lora_adapter(tmp_path, prefix="transformer", weight_name=FILE)
    assert model.peft_config, "nothing was loaded"
    expected = theirs(model)
    assert apart(expected, plain) > 1e-2
    assert apart(ours(params), expected) < 1e-4
    model.fuse_lora()
    model.unload_lora()
    weights = model.state_dict()
    for row in ROWS:
        if row.ours == "joint_blocks/text/q/kernel":
            found = np.asarray(flat(jax.jit(merged)(params))[row.ours])
            for i in range(row.count):
                name = row.foreign.replace("{i}", str(i))
                np.testing.assert_allclose(found[i].T, weights[name].numpy(), atol=1e-6)


def test_gradients_equal_those_of_peft(folder, tmp_path):
    """Of sum(weight output): the factors of both, in PyTorch's names."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    layers = targeted(flat(backbone(0)[1]), LORA.targets)
    rows = [row for row in ROWS if row.ours.removesuffix("/kernel") in layers]
    names = [name.removesuffix(".weight") for row in rows for name in foreign_names(row)]
    model = foreign(folder)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=names))
    model.save_lora_adapter(tmp_path, weight_name=FILE)
    prefixed = {f"transformer.{name}": tensor for name, tensor in load_file(tmp_path / FILE).items()}
    save_file(prefixed, tmp_path / FILE)
    factors = read_file(tmp_path / FILE, ROWS, abstract_params(sd3.BACKBONE, SD3))
    z, t, cond = inputs()
    weight = np.random.default_rng(9).standard_normal(z.shape).astype(np.float32)

    arguments = (torch.from_numpy(x) for x in (z.transpose(0, 3, 1, 2).copy(), cond.tokens, cond.pooled, 1000 * t))
    (model(*arguments).sample.permute(0, 2, 3, 1) * torch.from_numpy(weight)).sum().backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}

    def value(factors):
        # PEFT's alpha / r, which its file does not say here.
        scaled = {name: leaf * 5 / 3 if name.endswith("scale") else leaf for name, leaf in flat(factors).items()}
        params = merge(backbone(0)[1], nested(scaled))
        return jnp.sum(backbone(0)[0].apply({"params": params}, z, t, cond) * weight)

    gradients = flat(jax.jit(jax.grad(value))(factors))
    compared = 0
    for row in ROWS:
        layer = row.ours.removesuffix("/kernel")
        for i, name in enumerate(foreign_names(row) if f"{layer}/lora_a" in gradients else ()):
            for ours, kind in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                found = np.asarray(gradients[f"{layer}/{ours}"])[i if row.count else ...].T
                expected = theirs[name.replace(".weight", f".{kind}.default.weight")].numpy()
                if "add_q_proj" in name and not row.count:
                    continue  # nobody reads what the text of the last block asks for
                assert apart(found, expected) < 1e-4, name
                compared += 1
    assert compared == 2 * (len(names) - 1)


def test_what_diffusers_saves_is_read_back(folder, tmp_path):
    """An adapter of PEFT's own, alpha and rank unequal, saved by the pipeline with its settings."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    model = foreign(folder)
    names = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.2"]
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=names, use_rslora=True)
    )
    model.save_lora_adapter(tmp_path, weight_name=FILE)
    expected = theirs(model)
    tensors = load_file(tmp_path / FILE)
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    with_settings = diffusers.StableDiffusion3Pipeline.save_lora_weights
    with_settings(
        tmp_path / "pipeline",
        transformer_lora_layers={name: torch.from_numpy(tensor) for name, tensor in tensors.items()},
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    assert load_file(tmp_path / "pipeline" / FILE).keys() == prefixed.keys()
    factors = read_file(tmp_path / "pipeline" / FILE, ROWS, abstract_params(sd3.BACKBONE, SD3))
    assert np.allclose(flat(factors)["joint_blocks/text/k/lora_scale"], 5 / 3**0.5)
    assert apart(ours(merge(backbone(0)[1], factors)), expected) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "chain"])
def test_there_and_back_is_the_same_model(tmp_path, kind):
    write_file(tmp_path / FILE, ROWS, params_of(kind))
    factors = read_file(tmp_path / FILE, ROWS, abstract_params(sd3.BACKBONE, SD3))
    again = jax.device_put(merge(backbone(0)[1], factors))
    found = flat(jax.jit(merged)(again))
    for name, leaf in flat(jax.jit(merged)(params_of(kind))).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6)
    write_file(tmp_path / "again", ROWS, again)
    # One rank stands for all: a file of several is filled up with zeros.
    assert ((tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()) == (kind == "lora")


def test_the_combined_adapter_of_urae_has_the_three_parts():
    """[-A0; A4k; A2k]: over the base, the 2K adapter, and the 4K components with those at the start taken off."""
    lora, chain = (flat(jax.device_get(params_of(kind))) for kind in ("lora", "chain"))
    name = "last_block/picture/out"
    down, up = products(ROWS, params_of("chain"))["transformer_blocks.2.attn.to_out.0"]
    scale = lora[f"{name}/lora_scale"]
    kernel = np.asarray(flat(backbone(0)[1])[f"{name}/kernel"])
    two = scale * lora[f"{name}/lora_a"] @ lora[f"{name}/lora_b"]
    four = chain[f"{name}/lora_a"] @ chain[f"{name}/lora_b"]
    u, s, v = np.linalg.svd(np.float64(kernel + two))
    start = (u[:, -2:] * s[-2:]) @ v[-2:]
    assert down.shape == (2 + 2 + 3, 16)
    np.testing.assert_allclose((up @ down).T, two + four - start, atol=2e-6)


def test_kohya_layout_is_what_diffusers_converts_back(tmp_path):
    """Its FLUX conversion knows the names of blocks that SD3 has too."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch = pytest.importorskip("torch")
    adapter = dataclasses.replace(LORA, targets=("picture/q", "picture/out", "picture/v"))
    params = attach(backbone(0)[1], jax.random.key(1), adapter)
    write_file(tmp_path / "kohya", ROWS, params, layout=as_kohya)
    write_file(tmp_path / FILE, ROWS, params)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(tmp_path / "kohya").items()}
    assert tensors["lora_transformer_transformer_blocks_0_attn_to_q.alpha"] == 3
    found = conversion._convert_kohya_flux_lora_to_diffusers(tensors)
    expected = load_file(tmp_path / FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].numpy(), tensor, atol=1e-7)


# -------------------------------------------------------------------------------------------------------- mistakes


def spoiled(tensors, name, value=None):
    return {key: tensor for key, tensor in tensors.items() if key != name} | (
        {name: value} if value is not None else {}
    )


@pytest.mark.parametrize(
    "name,value,said",
    [
        ("transformer.blocks.0.attn.to_q.lora_A.weight", np.zeros((3, 16)), "1 tensor unknown.*'transformer.blocks.0"),
        ("text_encoder.q.lora_A.weight", np.zeros((3, 16)), "1 tensor unknown to this model: 'text_encoder.q"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.weight", None, "lacks 1 tensor.*0.attn.to_q.lora_B"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", np.zeros((3, 15)), "to_q' as .16, 3. x .3, 15."),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", np.zeros((3, 16), np.int32), "float32"),
    ],
)
def test_what_does_not_belong_is_named(tmp_path, name, value, said):
    write_file(tmp_path / FILE, ROWS, params_of("lora"))
    value = value.astype(np.float32) if value is not None and value.dtype == np.float64 else value
    save_file(spoiled(load_file(tmp_path / FILE), name, value), tmp_path / FILE)
    with pytest.raises(UserError, match=said):
        read_file(tmp_path / FILE, ROWS, abstract_params(sd3.BACKBONE, SD3))


def test_a_plain_model_and_a_patch_projection_have_no_file(tmp_path):
    with pytest.raises(UserError, match="no adapters"):
        products(ROWS, backbone(0)[1])
    params = attach(backbone(0)[1], jax.random.key(0), Adapter("lora", 3, ("patch_proj",)))
    with pytest.raises(UserError, match="'patch_proj' cannot be written"):
        products(ROWS, params)
