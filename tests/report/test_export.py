"""Laws: what is exported loads in diffusers with no key missing or left over and gives the same output; export ->
import -> export is bitwise the identity; nothing is half-written."""

import hashlib
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from tiny_models import KL, SD3, random_params, write_pipeline, write_workdir

from lwd_jax.autoencoders import kl
from lwd_jax.backbones import sd3
from lwd_jax.cli.models_flag import open_given
from lwd_jax.config import Sampling
from lwd_jax.errors import UserError
from lwd_jax.files import locked
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.report.export import export, import_models
from lwd_jax.report.pipeline import TEXT_PARTS, open_models, text_encoder
from lwd_jax.report.samples import Request, encode_prompts, sample_pictures
from lwd_jax.train.checkpoint import saved_steps
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(stage 1, stage 2) that started from a folder whose card has a licence."""
    place = tmp_path_factory.mktemp("runs")
    folder = write_pipeline(place / "sd3")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: community\ntags: [x]\n---\n# Base\n")
    first = write_workdir(place / "stage1", 1, seed=10, models={"autoencoder": str(folder)})
    second = write_workdir(
        place / "stage2",
        2,
        seed=20,
        models={"autoencoder": str(first), "backbone": str(folder)},
        text=True,
        sampling={"steps": 3, "guidance": 3.0, "shift": 2.0},
    )
    return first, second


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    return export(runs[1], tmp_path_factory.mktemp("out") / "model")


def test_every_part_is_told_when_it_begins_and_ends(runs, exported, tmp_path):
    told = []
    export(runs[1], tmp_path / "model", on_progress=lambda *what: told.append(what))
    import_models(exported, tmp_path / "workdir", on_progress=lambda *what: told.append(what))
    parts = ("autoencoder", "reading the backbone", "writing the backbone", "text encoders")
    parts += ("reading the backbone", "writing the checkpoint")
    assert told == [(part, done, 1) for part in parts for done in (0, 1)]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_text():
    return dict.fromkeys(TEXT_PARTS)


def loads_exactly(cls, folder, subfolder):
    model, report = cls.from_pretrained(folder, subfolder=subfolder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def test_diffusers_loads_it_exactly_and_draws_the_same(runs, exported):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    loads_exactly(diffusers.SD3Transformer2DModel, exported, "transformer")
    loads_exactly(diffusers.AutoencoderKL, exported, "vae")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(exported, **without_text())
    assert pipe.scheduler.config.shift == 2.0
    pipe.set_progress_bar_config(disable=True)

    noise = np.random.default_rng(0).standard_normal((1, 6, 10, 4)).astype(np.float32)
    request = Request(("a red boat",), 80, 48, open_models(runs[1]).sampling(), noise=noise)
    cond, null = encode_prompts(text_encoder(open_models(runs[1])), request)
    with torch.no_grad():
        theirs = pipe(
            prompt_embeds=torch.from_numpy(cond.tokens),
            pooled_prompt_embeds=torch.from_numpy(cond.pooled),
            negative_prompt_embeds=torch.from_numpy(null.tokens),
            negative_pooled_prompt_embeds=torch.from_numpy(null.pooled),
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
            height=48,
            width=80,
            num_inference_steps=3,
            guidance_scale=3.0,
            output_type="np",
        ).images[0]
    for source in (runs[1], exported):
        models = open_models(source)
        (ours,) = sample_pictures(models, Request(("a red boat",), 80, 48, models.sampling(), noise=noise), cond, null)
        assert np.abs(ours / 255.0 - theirs).max() <= 1 / 255
    assert theirs.std() > 0.05


@pytest.mark.parametrize("ema,seed", [(True, 120), (False, 20)])
def test_averaged_and_plain_weights_are_told_apart(runs, exported, tmp_path, ema, seed):
    folder = exported if ema else export(runs[1], tmp_path / "plain", ema=False)
    params = open_models(folder).backbone()[1]
    expected = random_params(sd3.BACKBONE, SD3, seed)
    assert all(np.array_equal(leaf, flat(expected)[path]) for path, leaf in flat(params).items())
    manifest = json.loads((folder / "lwd.json").read_text())
    assert manifest["weights"] == ("ema" if ema else "plain") and manifest["step"] == 7
    # The autoencoder is the averaged one of stage 1 in both: the latents were made with it.
    assert manifest["fingerprints"] == {
        "autoencoder": fingerprint(random_params(kl.AUTOENCODER, KL, 110)),
        "backbone": fingerprint(expected),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_files(runs, exported, tmp_path, dtype):
    folder = export(runs[1], tmp_path / "half", dtype=dtype)
    for part in ("transformer", "vae"):
        exact, rounded = (load_file(place / part / WEIGHTS) for place in (exported, folder))
        assert all(str(tensor.dtype) == dtype for tensor in rounded.values())
        for name, tensor in exact.items():
            np.testing.assert_allclose(rounded[name].astype(np.float32), tensor, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("stage,part", [(1, "vae"), (2, "transformer")])
def test_export_import_export_is_the_identity(runs, exported, tmp_path, stage, part):
    import_models(exported, tmp_path / "workdir", stage=stage)
    again = export(tmp_path / "workdir", tmp_path / "again")
    for file in (WEIGHTS, "config.json"):
        assert digest(again / part / file) == digest(exported / part / file)
    if stage == 2:  # and the rest of the pipeline, which the workdir finds where it was imported from
        for file in (f"vae/{WEIGHTS}", "scheduler/scheduler_config.json"):
            assert digest(again / file) == digest(exported / file)
        kept = [json.loads((place / "lwd.json").read_text()) for place in (exported, again)]
        assert kept[0]["text"] == kept[1]["text"] and kept[0]["sampling"] == kept[1]["sampling"]
        assert json.loads((again / "lwd.json").read_text())["step"] == 0
    assert "and not trained" in (again / "README.md").read_text()


@pytest.mark.parametrize("class_name, words", [("SD3Transformer2DModle", "SD3Transformer2DModle"), (None, "config")])
def test_a_backbone_that_cannot_be_read_is_no_reason_to_import_the_autoencoder(tmp_path, class_name, words):
    folder = write_pipeline(tmp_path / "base")
    file = folder / "transformer" / "config.json"
    if class_name:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": class_name}))
    else:
        file.unlink()
    with pytest.raises(UserError, match=words):
        import_models(folder, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()
    assert import_models(folder, tmp_path / "asked", stage=1).stage == 1


def test_the_scheduler_is_that_of_the_runs_solver(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    base = write_pipeline(tmp_path / "base")
    models = {"autoencoder": str(base), "backbone": str(base)}
    run = write_workdir(tmp_path / "run", 2, models=models, sampling={"solver": "heun", "shift": 2.0})
    folder = export(run, tmp_path / "model")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **without_text())
    assert isinstance(pipe.scheduler, diffusers.FlowMatchHeunDiscreteScheduler) and pipe.scheduler.config.shift == 2.0
    assert open_models(folder).sampling() == open_models(run).sampling()
    assert import_models(folder, tmp_path / "workdir").sampling.solver == "heun"


def test_past_the_position_tables_end_the_table_comes_extended(tmp_path):
    """The run's 256 px are 16 tokens a side, its table has 12: diffusers could not crop that."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    base = write_pipeline(tmp_path / "base")
    models = {"autoencoder": str(base), "backbone": str(base)}
    run = write_workdir(tmp_path / "run", 2, seed=5, models=models, resolution=256)
    folder = export(run, tmp_path / "model")
    import_models(folder, tmp_path / "workdir")
    rng = np.random.default_rng(3)
    z, tokens, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((1, 32, 32, 4), (1, 9, 24), (1, 16)))
    t = np.array([0.3], np.float32)
    cond = Conditioning(tokens, pooled=pooled)
    outputs, sizes = [], []
    for place in (run, folder):
        module, params = open_models(place).backbone()
        output = jax.jit(module.apply)
        outputs.append(np.asarray(output({"params": params}, z, t, cond)))
        sizes.append(module.config.pos_embed_max_size)
    assert sizes == [12, 16]
    again = open_models(tmp_path / "workdir").backbone()
    assert again[0] == module and fingerprint(again[1]) == fingerprint(params)
    theirs = loads_exactly(diffusers.SD3Transformer2DModel, folder, "transformer")
    with torch.no_grad():
        arguments = (torch.from_numpy(x) for x in (z.transpose(0, 3, 1, 2).copy(), tokens, pooled, 1000 * t))
        wanted = theirs(*arguments).sample.permute(0, 2, 3, 1).numpy()
    for ours in outputs:
        assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
    manifest = json.loads((folder / "lwd.json").read_text())
    assert manifest["fingerprints"]["backbone"] == fingerprint(params)


def test_stage_1_gives_an_autoencoder(runs, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = export(runs[0], tmp_path / "autoencoder")
    vae = loads_exactly(diffusers.AutoencoderKL, folder, "vae")
    assert vae.config.scaling_factor == KL.scaling and vae.config.shift_factor == KL.shift
    assert not (folder / "transformer").exists()
    models = open_models(folder)
    assert fingerprint(models.autoencoder()[1]) == fingerprint(random_params(kl.AUTOENCODER, KL, 110))
    assert "psnr" not in (folder / "README.md").read_text() and not models.has_backbone()
    assert not (folder / "model_index.json").exists()  # or a pipeline of diffusers would begin to load it


# ----------------------------------------------------------------------------------------------------------- card


def test_the_code_on_the_card_runs(exported):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    text = (exported / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"folder": str(exported)}
    exec(code, names)
    assert names["picture"].size == (64, 64)


def test_the_card_says_what_was_trained(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "other" and card.data.license_name == "community"
    assert card.data.library_name == "diffusers"
    assert "x" not in card.data.tags
    said = ("run 20", "wavelet mask `time`", "7 steps", "averaged (EMA)", "`sd3`", "detailed quarter", '"floor": 0.3')
    for wanted in said:
        assert wanted in card.text, wanted
    loss = float(re.search(r"\| loss \| (\S+) \|", card.text)[1])
    assert loss == pytest.approx(np.mean([1 / n for n in range(1, 8)]), rel=1e-3)


# --------------------------------------------------------------------------------------------------- text encoders


def add_text_encoders(folder):
    """Random small CLIPs and a T5 with tokenizers of a few words, as diffusers saves them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    for number, suffix in enumerate(("", "_2")):
        config = transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        transformers.CLIPTextModelWithProjection(config).eval().save_pretrained(folder / f"text_encoder{suffix}")
        place = folder / f"tokenizer{suffix}"
        place.mkdir()
        (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (place / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(place, model_max_length=77)
        tokenizer.save_pretrained(place)
    from tokenizers import Tokenizer, models

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in f"▁{letters}")]
    tokenizer = transformers.T5TokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=2)), extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    t5 = transformers.T5Config(vocab_size=64, d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(t5).eval().save_pretrained(folder / "text_encoder_3")
    index = {"_class_name": "StableDiffusion3Pipeline"}
    index |= {f"text_encoder{suffix}": ["transformers", "CLIPTextModelWithProjection"] for suffix in ("", "_2")}
    index |= {f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"] for suffix in ("", "_2")}
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_text_encoders_come_along_and_the_pipeline_loads_whole(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    base = write_pipeline(tmp_path / "base")
    add_text_encoders(base)
    run = write_workdir(tmp_path / "run", 2, seed=5, models={"autoencoder": str(base), "backbone": str(base)})
    folder = export(run, tmp_path / "model")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert os.path.samefile(*(each / "text_encoder" / "model.safetensors" for each in (folder, base)))
    noise = np.random.default_rng(1).standard_normal((1, 6, 10, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = pipe(
            "a boat", negative_prompt="fog", latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
            height=48, width=80, num_inference_steps=3, guidance_scale=2.0, output_type="np",
        ).images[0]  # fmt: skip
    models = open_models(folder)
    request = Request(("a boat",), 80, 48, Sampling("euler", 3, 2.0, models.sampling().shift), "fog", noise=noise)
    (ours,) = sample_pictures(models, request, *encode_prompts(text_encoder(models), request))
    assert np.abs(ours / 255.0 - theirs).max() <= 1 / 255


# ------------------------------------------------------------------------------------------------------- mistakes


def test_a_taken_folder_is_refused_and_only_an_export_is_replaced(runs, tmp_path):
    out = tmp_path / "out"
    export(runs[0], out)
    before = digest(out / "vae" / WEIGHTS)
    with pytest.raises(UserError, match="--overwrite"):
        export(runs[0], out)
    export(runs[0], out, ema=False, overwrite=True)
    assert digest(out / "vae" / WEIGHTS) != before
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not overwritten"):
        export(runs[0], home, overwrite=True)
    assert (home / "letter.txt").read_text() == "dear"


def test_an_import_replaces_nothing_but_an_import(runs, tmp_path):
    """Neither a run that has trained, nor the weights that it reads."""
    out, imported = tmp_path / "out", tmp_path / "imported"
    export(runs[0], out)
    before = digest(out / "vae" / WEIGHTS), saved_steps(runs[0])
    for _ in range(2):
        import_models(out, imported, stage=1, overwrite=True)
    for taken in (runs[0], out, out / "vae"):
        with pytest.raises(UserError, match="is not overwritten: it has no checkpoints/0/"):
            import_models(out, taken, stage=1, overwrite=True)
    assert (digest(out / "vae" / WEIGHTS), saved_steps(runs[0])) == before
    # Nor an import that a run is about to go on from.
    with locked(imported, "It"), pytest.raises(UserError, match="imported' is being written to by another process"):
        import_models(out, imported, stage=1, overwrite=True)


def test_an_export_or_import_does_not_replace_what_it_reads(runs, tmp_path):
    out = tmp_path / "out"
    export(runs[0], out)
    shutil.copytree(runs[0], out / "run")
    with pytest.raises(UserError, match="out/run', which this command reads"):
        export(out / "run", out, overwrite=True)
    with pytest.raises(UserError, match="trained its own autoencoder"):
        export(runs[0], tmp_path / "new", autoencoder=str(runs[0]))
    imported = import_models(out, tmp_path / "imported", stage=1)
    assert (imported.models.autoencoder_variant, imported.models.backbone_variant) == ("", "")
    shutil.copytree(out, tmp_path / "imported" / "out")
    with pytest.raises(UserError, match="imported/out', which this command reads"):
        import_models(tmp_path / "imported" / "out", tmp_path / "imported", stage=1, overwrite=True)


def test_schedule_free_has_no_plain_weights(tmp_path):
    run = write_workdir(tmp_path / "run", 1, optimizer={"name": "schedule_free_adamw"})
    export(run, tmp_path / "out")
    for use in (lambda: export(run, tmp_path / "plain", ema=False), lambda: open_given(str(run), plain=True)):
        with pytest.raises(UserError, match="schedule_free_adamw.* keeps one set of weights to use"):
            use()


def test_a_failed_export_leaves_nothing(tmp_path):
    run = write_workdir(tmp_path / "run", 2, models={"autoencoder": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_is_not_a_run_is_named(exported, tmp_path):
    with pytest.raises(UserError, match="diffusers folder already"):
        export(exported, tmp_path / "out")
    with pytest.raises(UserError, match="float64"):
        export(write_workdir(tmp_path / "run", 1), tmp_path / "out", dtype="float64")


def test_import_refuses_what_does_not_cover_the_model(exported, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    tensors = load_file(broken / "transformer" / WEIGHTS)
    tensors.pop("proj_out.bias")
    save_file(tensors, broken / "transformer" / WEIGHTS)
    with pytest.raises(UserError, match="proj_out.bias"):
        import_models(broken, tmp_path / "workdir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    with pytest.raises(UserError, match="workdir already"):
        import_models(write_workdir(tmp_path / "run", 1), tmp_path / "other")
