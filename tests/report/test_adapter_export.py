"""Laws of the way back of adapters: the pipeline in PyTorch draws what is drawn here, with the file or with the merged
weights; what is imported is exported again byte by byte; another base is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import SD3, TEXT, backbone, write_pipeline, write_workdir

from lwd_jax.adapters import attach
from lwd_jax.adapters.factors import merged, trainable
from lwd_jax.adapters.peft import FILE, KOHYA_FILE, write_file
from lwd_jax.backbones import save_backbone, sd3
from lwd_jax.cli import main
from lwd_jax.config import Adapter, Sampling
from lwd_jax.data.text import hashed_words
from lwd_jax.report.pipeline import TEXT_PARTS, open_models
from lwd_jax.report.samples import Request, encode_prompts, sample_pictures
from lwd_jax.train.state import merge
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat, nested


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`sd3`, a pipeline; `lora.safetensors`, random adapters; `run`, the workdir that they are imported to."""
    place = tmp_path_factory.mktemp("adapters")
    write_pipeline(place / "sd3")
    params = attach(backbone(1)[1], jax.random.key(0), Adapter("lora", 3, ("q", "text/v", "out", "up"), alpha=3.0))
    rng = np.random.default_rng(0)
    leaves = flat(params)
    moved = {
        name: jnp.asarray(0.2 * rng.standard_normal(leaves[name].shape), jnp.float32) for name in trainable(leaves)
    }
    write_file(place / "lora.safetensors", sd3.weights(SD3), merge(params, nested(moved)))
    assert lwd("import", models=place / "sd3", adapter=place / "lora.safetensors", workdir=place / "run") == 0
    return place


def lwd(command, *flags, **options):
    return main([command, *flags, *(f"--{name}={value}" for name, value in options.items())])


def without_text():
    return dict.fromkeys(TEXT_PARTS)


def test_imported_is_exported_byte_by_byte(place, tmp_path, capsys):
    assert lwd("export", workdir=place / "run", out=tmp_path / "out", form="adapter") == 0
    assert "Exported the adapters" in capsys.readouterr().out
    assert (tmp_path / "out" / FILE).read_bytes() == (place / "lora.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, "lwd.json", "README.md"}
    prints = json.loads((tmp_path / "out" / "lwd.json").read_text())["fingerprints"]
    assert prints["their base"] == fingerprint(backbone(1)[1])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "load_lora_weights(folder)" in card and "LoRA of rank 3" in card
    assert lwd("export", workdir=place / "run", out=tmp_path / "half", form="adapter", dtype="bfloat16") == 0
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "half" / FILE).values()} == {"bfloat16"}


def test_kohya(place, tmp_path):
    assert lwd("export", workdir=place / "run", out=tmp_path / "out", form="kohya") == 0
    tensors = load_file(tmp_path / "out" / KOHYA_FILE)
    count = len(load_file(place / "lora.safetensors"))
    assert len(tensors) == count * 3 // 2 and all(name.startswith("lora_transformer_") for name in tensors)


def test_merged_is_the_base_and_the_adapters(place, tmp_path):
    assert lwd("export", workdir=place / "run", out=tmp_path / "out") == 0
    expected = merged(open_models(place / "run").backbone()[1])
    found = flat(open_models(tmp_path / "out").backbone()[1])
    for name, leaf in flat(expected).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6, err_msg=name)
    assert not np.allclose(found["joint_blocks/text/v/kernel"], flat(backbone(1)[1])["joint_blocks/text/v/kernel"])


def test_the_pipeline_in_pytorch_draws_the_same(place, tmp_path):
    """StableDiffusion3Pipeline.load_lora_weights over the base, and the merged export, against the workdir here."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    noise = np.random.default_rng(0).standard_normal((1, 6, 10, 4)).astype(np.float32)
    models = open_models(place / "run")
    request = Request(("a red boat",), 80, 48, Sampling("euler", 3, 3.0, 2.5), noise=noise)
    cond, null = encode_prompts(hashed_words(None, **TEXT), request)
    (ours,) = sample_pictures(models, request, cond, null)
    assert lwd("export", workdir=place / "run", out=tmp_path / "merged") == 0

    def draw(folder, lora):
        model = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            tmp_path / "merged", transformer=model, **without_text()
        )
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(place, weight_name="lora.safetensors")
            assert pipe.get_list_adapters()["transformer"]
        with torch.no_grad():
            return pipe(
                prompt_embeds=torch.from_numpy(cond.tokens),
                pooled_prompt_embeds=torch.from_numpy(cond.pooled),
                negative_prompt_embeds=torch.from_numpy(null.tokens),
                negative_pooled_prompt_embeds=torch.from_numpy(null.pooled),
                latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
                height=48, width=80, num_inference_steps=3, guidance_scale=3.0, output_type="np",
            ).images[0]  # fmt: skip

    assert np.abs(ours / 255.0 - draw(place / "sd3", lora=True)).max() <= 1 / 255
    assert np.abs(ours / 255.0 - draw(tmp_path / "merged", lora=False)).max() <= 1 / 255
    assert np.abs(ours / 255.0 - draw(place / "sd3", lora=False)).max() > 3 / 255


# -------------------------------------------------------------------------------------------------------- mistakes


def test_a_base_that_moved_is_named_and_another_refused(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    config = json.loads((place / "run" / "config.json").read_text())
    config["models"]["backbone"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    save_backbone(tmp_path / "other", *backbone(7))

    def export(**options):
        return lwd("export", workdir=tmp_path / "run", out=tmp_path / "out", form="adapter", **options)

    assert export() == 2 and "is not there; name it with --base" in capsys.readouterr().err
    assert export(base=tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert all(fingerprint(backbone(seed)[1])[:16] in said for seed in (1, 7)) and "another base" in said
    assert export(base=place / "sd3") == 0
    assert (tmp_path / "out" / FILE).read_bytes() == (place / "lora.safetensors").read_bytes()


def test_mistakes_are_one_sentence(place, tmp_path, capsys):
    plain = write_workdir(tmp_path / "plain", 2)
    said = {
        lwd("export", workdir=plain, out=tmp_path / "out", form="kohya"): "trained no adapters",
        lwd("export", workdir=plain, out=tmp_path / "out", base=place / "sd3"): "needs no base",
    }
    errors = capsys.readouterr().err
    assert said.keys() == {2} and all(sentence in errors for sentence in said.values())
    wrong = {"models": place / "sd3", "workdir": tmp_path / "new"}
    assert lwd("import", stage=1, adapter=place / "lora.safetensors", **wrong) == 2
    assert "Adapters are of a backbone" in capsys.readouterr().err
    file = place / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert lwd("import", adapter=file, **wrong) == 2
    assert "tensors unknown to this model" in capsys.readouterr().err
    assert lwd("import", adapter=tmp_path / "gone.safetensors", **wrong) == 2
    assert "gone.safetensors is not a sound safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()
