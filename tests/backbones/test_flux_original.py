"""Laws of FLUX's original single file: it is read as diffusers' own converter reads it, and covers the model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flux_twin import twin
from safetensors.numpy import save_file

from lwd_jax.backbones import load_backbone
from lwd_jax.backbones.flux_original import as_diffusers
from lwd_jax.errors import UserError
from lwd_jax.report.export import import_models
from lwd_jax.report.pipeline import open_models
from lwd_jax.weights.table import write

TWIN = twin(
    attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(16, 56, 56), num_layers=2, num_single_layers=3
)
SMALL = TWIN.config
WIDTH = 3072  # what diffusers' converter cuts single blocks by
EMBEDDERS = ("time_in", "vector_in", "guidance_in")


def layers(double: int, single: int) -> dict[str, int]:
    """Original layer -> rows over the width."""
    found = {"img_in": 1, "txt_in": 1, "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2}
    found |= {f"{embedder}.{layer}": 1 for embedder in EMBEDDERS for layer in ("in_layer", "out_layer")}
    for i in range(double):
        for kind in ("img", "txt"):
            block = f"double_blocks.{i}.{kind}_"
            found |= {f"{block}mod.lin": 6, f"{block}attn.qkv": 3, f"{block}attn.proj": 1}
            found |= {f"{block}mlp.0": 4, f"{block}mlp.2": 1}
    for i in range(single):
        found |= {
            f"single_blocks.{i}.{layer}": n for layer, n in (("modulation.lin", 3), ("linear1", 7), ("linear2", 1))
        }
    return found


def norms(double: int, single: int) -> list[str]:
    blocks = [f"double_blocks.{i}.{kind}_attn" for i in range(double) for kind in ("img", "txt")]
    blocks += [f"single_blocks.{i}" for i in range(single)]
    return [f"{block}.norm.{name}_norm.scale" for block in blocks for name in ("query", "key")]


def test_names_and_numbers_are_those_of_diffusers_converter():
    """On tensors of the true number of rows and of two columns."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    rng = np.random.default_rng(0)
    tensors = {}
    for name, rows in layers(2, 2).items():
        tensors[f"{name}.weight"] = rng.standard_normal((rows * WIDTH, 2)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.standard_normal(rows * WIDTH).astype(np.float32)
    tensors |= {name: rng.standard_normal(128).astype(np.float32) for name in norms(2, 2)}
    expected = convert_flux_transformer_checkpoint_to_diffusers({k: torch.from_numpy(v) for k, v in tensors.items()})
    found = as_diffusers(tensors)
    assert found.keys() == expected.keys()
    for name, piece in found.items():
        assert piece.shape == tuple(expected[name].shape) and piece.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(piece), expected[name].numpy(), err_msg=name)


def test_it_covers_the_manifest_of_diffusers():
    """Full size, by shape: what is made of the original's names is what diffusers' folder has."""
    manifest = json.loads((Path(__file__).parents[1] / "manifests" / "flux_dev.json").read_text())
    names = [f"{name}.{kind}" for name in layers(19, 38) for kind in ("weight", "bias")] + norms(19, 38)
    assert as_diffusers(dict.fromkeys(names, np.zeros(14, np.int8))).keys() == manifest.keys()
    assert len(names) == 780  # of flux1-dev.safetensors


def original_of(tensors: dict, config) -> dict:
    """Tensors under diffusers' names, joined as the original has them."""
    made = {}

    def join(name, *parts):
        for kind in ("weight", "bias"):
            made[f"{name}.{kind}"] = np.concatenate([tensors[f"{part}.{kind}"] for part in parts])

    for ours, theirs in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
        join(ours, theirs)
    for ours, theirs in zip(EMBEDDERS, ("timestep_embedder", "text_embedder", "guidance_embedder")):
        join(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        join(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")
    for kind in ("weight", "bias"):
        scale, shift = np.split(tensors[f"norm_out.linear.{kind}"], 2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = np.concatenate([shift, scale])
    streams = {
        "img": ("norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm", "ff"),
        "txt": ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "ff_context"),
    }
    for i in range(config.num_layers):
        for kind, (modulation, qkv, out, norm, mlp) in streams.items():
            ours, theirs = f"double_blocks.{i}.{kind}_", f"transformer_blocks.{i}."
            join(f"{ours}mod.lin", f"{theirs}{modulation}.linear")
            join(f"{ours}attn.qkv", *(f"{theirs}attn.{part}" for part in qkv))
            join(f"{ours}attn.proj", f"{theirs}attn.{out}")
            join(f"{ours}mlp.0", f"{theirs}{mlp}.net.0.proj")
            join(f"{ours}mlp.2", f"{theirs}{mlp}.net.2")
            for name, letter in (("query", "q"), ("key", "k")):
                made[f"{ours}attn.norm.{name}_norm.scale"] = tensors[f"{theirs}attn.{norm}_{letter}.weight"]
    for i in range(config.num_single_layers):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        join(f"{ours}modulation.lin", f"{theirs}norm.linear")
        join(f"{ours}linear1", *(f"{theirs}{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        join(f"{ours}linear2", f"{theirs}proj_out")
        for name, letter in (("query", "q"), ("key", "k")):
            made[f"{ours}norm.{name}_norm.scale"] = tensors[f"{theirs}attn.norm_{letter}.weight"]
    return made


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), TWIN.abstract())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_is_read_exactly(params, prefix, tmp_path):
    tensors = original_of(dict(write(TWIN.rows, params)), SMALL)
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "flux1.safetensors")
    module, found = load_backbone(tmp_path / "flux1.safetensors")
    assert module.config == SMALL
    jax.tree.map(np.testing.assert_array_equal, found, params)
    if not prefix:  # and through the door of lwd import
        import_models(tmp_path / "flux1.safetensors", tmp_path / "workdir")
        module, found = open_models(tmp_path / "workdir").backbone()
        assert module.config == SMALL
        jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"single_blocks.0.linear3.weight": np.ones(3, np.float32)},
            "1 tensor unknown .*single_blocks.0.linear3.weight",
        ),
        ({"double_blocks.1.img_attn.proj.bias": None}, "lacks 1 tensor .*transformer_blocks.1.attn.to_out.0.bias"),
        ({"single_blocks.0.linear1.bias": np.ones(8, np.float32)}, "of another shape"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": np.ones(64, np.float32)}, "128 channels, not 64"),
        ({"img_in.weight": None}, "no SD3Transformer2DModel or FluxTransformer2DModel in a layout"),
    ],
    ids=["unknown", "missing", "misshaped", "other heads", "no FLUX"],
)
def test_a_file_that_does_not_fit_is_refused(params, change, said, tmp_path):
    tensors = original_of(dict(write(TWIN.rows, params)), SMALL) | change
    file = tmp_path / "flux1.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=said):
        load_backbone(file)
