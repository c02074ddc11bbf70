"""Laws of FLUX's folders: what is exported loads in diffusers' FluxPipeline and draws the same, and back."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from test_export import add_text_encoders
from tiny_models import FLUX, random_params, write_pipeline, write_workdir

from lwd_jax.backbones import flux
from lwd_jax.config import Sampling
from lwd_jax.errors import UserError
from lwd_jax.report.export import export, import_models
from lwd_jax.report.pipeline import DYNAMIC_SHIFT, open_models, text_encoder
from lwd_jax.report.pipeline import FLUX as FAMILY
from lwd_jax.report.samples import Request, encode_prompts, sample_pictures
from lwd_jax.weights.folder import fingerprint

SCHNELL = dataclasses.replace(FLUX, guidance_embeds=False)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0} | DYNAMIC_SHIFT
RUNS = {  # sizes, how it samples, what FluxPipeline is told
    "dev, dynamic shift": (
        FLUX,
        {"steps": 3, "guidance": 1.0, "shift_rule": "dynamic", "embedded_guidance": 2.5},
        {"guidance_scale": 2.5},
    ),
    "schnell, true guidance": (SCHNELL, {"steps": 3, "guidance": 3.0, "shift": 2.0}, {"true_cfg_scale": 3.0}),
}


def run_of(place, name):
    sizes, sampling, told = RUNS[name]
    base = write_pipeline(place / "base", sizes=sizes)
    models = {"autoencoder": str(base), "backbone": str(base)}
    return write_workdir(place / "run", 2, seed=20, sizes=sizes, models=models, text=True, sampling=sampling), told


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy) if name.startswith("schnell") else name for name in RUNS]
)
def test_diffusers_draws_the_same_and_the_folder_comes_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    run, told = run_of(tmp_path, name)
    folder = export(run, tmp_path / "model")
    model, report = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    pipe = diffusers.FluxPipeline.from_pretrained(folder, **dict.fromkeys(FAMILY.parts))
    pipe.set_progress_bar_config(disable=True)

    noise = np.random.default_rng(0).standard_normal((1, 6, 10, 4)).astype(np.float32)
    request = Request(("a red boat",), 80, 48, open_models(run).sampling(), noise=noise)
    cond, null = encode_prompts(text_encoder(open_models(run)), request)
    with torch.no_grad():
        packed = pipe._pack_latents(torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), 1, 4, 6, 10)
        theirs = pipe(
            prompt_embeds=torch.from_numpy(cond.tokens), pooled_prompt_embeds=torch.from_numpy(cond.pooled),
            negative_prompt_embeds=torch.from_numpy(null.tokens),
            negative_pooled_prompt_embeds=torch.from_numpy(null.pooled),
            latents=packed, height=48, width=80, num_inference_steps=3, output_type="np", **told,
        ).images[0]  # fmt: skip
    for source in (run, folder):
        models = open_models(source)
        (ours,) = sample_pictures(models, Request(("a red boat",), 80, 48, models.sampling(), noise=noise), cond, null)
        assert np.abs(ours / 255.0 - theirs).max() <= 1 / 255
    assert theirs.std() > 0.05

    import_models(folder, tmp_path / "workdir")
    # FLUX's own config knows no size: it is the run's.
    assert [open_models(tmp_path / place).resolution() for place in ("run", "model", "workdir")] == [64, 64, 64]
    module, params = open_models(tmp_path / "workdir").backbone()
    assert module.config == RUNS[name][0]
    assert fingerprint(params) == fingerprint(random_params(flux.BACKBONE, RUNS[name][0], 120))


def test_the_code_on_the_card_runs(tmp_path):
    pytest.importorskip("diffusers")
    run, _ = run_of(tmp_path, "schnell, true guidance")
    folder = export(run, tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "true_cfg_scale=3.0" in code
    names = {"folder": str(folder)}
    exec(code, names)
    assert names["picture"].size == (64, 64)


def test_positions_come_along_to_sampling_and_to_the_folder(tmp_path):
    """NTK and proportional attention are the run's own: its workdir, its export and what is imported have them."""
    stretched = dataclasses.replace(FLUX, ntk=(10.0, 10.0), proportional_attention=True)
    base = write_pipeline(tmp_path / "base", sizes=FLUX)
    models = {"autoencoder": str(base), "backbone": str(base), "ntk": (10.0, 10.0), "proportional_attention": True}
    run = write_workdir(tmp_path / "run", 2, sizes=stretched, models=models, text=True)
    folder = export(run, tmp_path / "model")
    import_models(folder, tmp_path / "workdir")
    for place in (run, folder, tmp_path / "workdir"):
        assert open_models(place).backbone()[0].config == stretched
    assert "NTK factors 10, 10" in (folder / "README.md").read_text()
    assert "NTK" not in (export(write_workdir(tmp_path / "plain", 2, sizes=FLUX, models={"autoencoder": str(base)}),
                                tmp_path / "plain_model") / "README.md").read_text()  # fmt: skip


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_card_says_where_the_pipeline_runs_with_another_solver(tmp_path, solver):
    base = write_pipeline(tmp_path / "base", sizes=FLUX)
    models = {"autoencoder": str(base), "backbone": str(base)}
    run = write_workdir(tmp_path / "run", 2, sizes=FLUX, models=models, sampling={"solver": solver})
    folder = export(run, tmp_path / "model")
    assert open_models(run).sampling().solver == solver and open_models(folder).sampling().solver == "euler"
    assert ("sampled with heun" in (folder / "README.md").read_text()) is (solver == "heun")


@pytest.mark.parametrize(
    ("sizes", "scheduler", "expected"),
    [
        (FLUX, DYNAMIC, Sampling(guidance=1.0, shift_rule="dynamic")),
        (SCHNELL, {"shift": 1.0}, Sampling(guidance=1.0, steps=4, shift=1.0)),
    ],
    ids=["dev", "schnell"],
)
def test_a_released_folder_says_how_it_is_sampled(sizes, scheduler, expected, tmp_path):
    models = open_models(write_pipeline(tmp_path / "model", sizes=sizes, **scheduler))
    assert models.sampling() == expected and models.resolution() == 1024


def test_another_dynamic_shift_is_refused(tmp_path):
    folder = write_pipeline(tmp_path / "model", sizes=FLUX, **DYNAMIC | {"max_shift": 1.3})
    with pytest.raises(UserError, match="max_shift to 1.3"):
        open_models(folder).sampling()


def add_flux_text_encoders(folder):
    """A CLIP and a T5 where FluxPipeline has them."""
    transformers = pytest.importorskip("transformers")
    add_text_encoders(folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / f"{part}_2")
        (folder / f"{part}_3").rename(folder / f"{part}_2")
    clip = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "text_encoder")
    clip.save_pretrained(folder / "text_encoder")
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    index |= {"tokenizer_2": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_text_encoders_come_along_and_the_pipeline_loads_whole(tmp_path):
    """From a prompt: text states, shift, guidance and picture are FluxPipeline's own."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sizes = dataclasses.replace(FLUX, pooled_projection_dim=8)
    base = write_pipeline(tmp_path / "base", sizes=sizes)
    add_flux_text_encoders(base)
    models = {"autoencoder": str(base), "backbone": str(base)}
    sampling = {"steps": 2, "guidance": 1.0, "shift_rule": "dynamic", "embedded_guidance": 3.0}
    run = write_workdir(tmp_path / "run", 2, seed=5, sizes=sizes, models=models, sampling=sampling)
    folder = export(run, tmp_path / "model")
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 6, 10, 4)).astype(np.float32)
    with torch.no_grad():
        packed = pipe._pack_latents(torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), 1, 4, 6, 10)
        theirs = pipe(
            "a boat", latents=packed, height=48, width=80, num_inference_steps=2, guidance_scale=3.0, output_type="np"
        ).images[0]
    models = open_models(folder)
    assert models.text() == {"kind": "flux"}
    request = Request(("a boat",), 80, 48, models.sampling(), noise=noise)
    (ours,) = sample_pictures(models, request, *encode_prompts(text_encoder(models), request))
    assert np.abs(ours / 255.0 - theirs).max() <= 1 / 255
