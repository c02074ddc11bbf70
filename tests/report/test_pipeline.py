"""Laws: a folder and a workdir open to the models they stand for, lazily; pictures equal the PyTorch pipeline's."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import KL, SD3, TEXT, autoencoder, backbone, random_params, write_pipeline, write_workdir

from lwd_jax.autoencoders import kl
from lwd_jax.backbones import sd3
from lwd_jax.cli import main
from lwd_jax.config import Sampling
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.report.pipeline import TEXT_PARTS, open_models, text_encoder
from lwd_jax.report.samples import Request, encode_prompts, sample_pictures
from lwd_jax.train.checkpoint import read_config
from lwd_jax.train.models import open_autoencoder
from lwd_jax.weights.table import flat


def same(first, second) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """Stage 1 from the folder, stage 2 on its latents: (stage 1, stage 2)."""
    place = tmp_path_factory.mktemp("runs")
    first = write_workdir(place / "stage1", 1, seed=10, models={"autoencoder": str(folder)})
    models = {"autoencoder": str(first), "backbone": str(folder)}
    return first, write_workdir(place / "stage2", 2, seed=20, text=True, models=models)


def test_a_folder_gives_its_models_and_its_shift(folder):
    models = open_models(folder)
    module, params = models.autoencoder()
    assert module.config == KL and same(params, autoencoder(0)[1])
    module, params = models.backbone()
    assert module.config == SD3 and same(params, backbone(1)[1])
    assert models.sampling() == Sampling(shift=2.5) and models.resolution() == 64
    assert models.has_autoencoder() and models.has_backbone() and models.text() == {} and models.text_folder() is None


def test_a_run_of_stage_1_says_that_it_has_nothing_to_sample_with(runs, tmp_path, capsys):
    words = ["sample", "--models", str(runs[0]), "--prompt", "a", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is of stage 1: it has an autoencoder, but no backbone." in capsys.readouterr().err


def test_reading_the_autoencoder_does_not_read_the_backbone(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "transformer")
    models = open_models(tmp_path / "half")
    assert same(models.autoencoder()[1], autoencoder(0)[1])
    with pytest.raises(UserError, match="transformer"):
        models.backbone()


@pytest.mark.parametrize("ema", [True, False])
def test_a_workdir_gives_what_it_trained_and_the_autoencoder_of_stage_1(runs, ema):
    first, second = runs
    module, params = open_models(first, ema=ema).autoencoder()
    assert module.config == KL and same(params, random_params(kl.AUTOENCODER, KL, 110 if ema else 10))
    models = open_models(second, ema=ema)
    module, params = models.backbone()
    assert module.config == SD3 and same(params, random_params(sd3.BACKBONE, SD3, 120 if ema else 20))
    # The autoencoder's weights are those that the latents were made with, whatever is asked of this run.
    assert same(models.autoencoder()[1], random_params(kl.AUTOENCODER, KL, 110))
    assert models.text()["kind"] == "hashed_words" and models.resolution() == 64
    with pytest.raises(UserError, match="no backbone"):
        open_models(first).backbone()


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_on_plain_latents_decodes_with_the_plain_autoencoder(tmp_path, runs, ema):
    """So does one that names this run as where its autoencoder is, whatever weights it would take of a stage-1 run."""

    def run(name, autoencoder, ema=False):
        place = shutil.copytree(runs[1], tmp_path / name)
        config = dataclasses.asdict(read_config(place))
        config["models"] |= {"autoencoder": str(autoencoder), "autoencoder_variant": "", "ema": ema}
        (place / "config.json").write_text(json.dumps(config))
        return place

    first = run("first", runs[0])
    second = run("second", first, ema)
    models = open_models(second), open_models(second, autoencoder=str(first))
    found = [*(each.autoencoder()[1] for each in models), open_autoencoder(read_config(second)).params()]
    expected = random_params(kl.AUTOENCODER, KL, 10)
    assert all(same(params, expected) for params in found)


def test_a_run_from_random_weights_needs_no_folder_but_for_its_autoencoder(tmp_path, runs):
    run = write_workdir(tmp_path / "run", 2, seed=3, models={"autoencoder": ""})
    models = open_models(run)
    assert same(models.backbone()[1], random_params(sd3.BACKBONE, SD3, 103))
    assert models.text() == {} and models.text_folder() is None and models.origin() is None
    with pytest.raises(UserError, match="--autoencoder"):
        models.autoencoder()
    other = open_models(run, autoencoder=str(runs[0]))
    assert same(other.autoencoder()[1], random_params(kl.AUTOENCODER, KL, 110))


def test_an_autoencoder_that_is_gone_is_named(tmp_path):
    run = write_workdir(tmp_path / "run", 2, models={"autoencoder": "runs/gone"})
    with pytest.raises(UserError, match="'runs/gone', which is not there .as seen from"):
        open_models(run).autoencoder()


def test_what_holds_no_models_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        open_models(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a diffusers folder nor a workdir"):
        open_models(tmp_path)


REFUSED = [
    ({"shift_terminal": 0.1}, "shift_terminal"),
    ({"_class_name": "DDIM"}, "DDIM"),
    ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler"),
    ({"num_train_timesteps": 500}, "num_train_timesteps to 500"),
]


@pytest.mark.parametrize("setting,word", REFUSED)
def test_a_scheduler_that_is_not_reproduced_is_refused(folder, tmp_path, setting, word):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(UserError, match=word):
        open_models(tmp_path / "copy").sampling()


@pytest.mark.parametrize("said, shift", [({"shift": 1.5}, 1.5), ({}, 1.0)])
def test_the_scheduler_says_which_solver_and_shift(folder, tmp_path, said, shift):
    """Where it says none it is 1, as in diffusers, not our own default."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchHeunDiscreteScheduler"} | said))
    assert open_models(tmp_path / "copy").sampling() == Sampling(solver="heun", shift=shift)


def test_another_text_encoder_is_refused(runs):
    models = open_models(runs[1])
    assert text_encoder(models).settings == TEXT
    description = models.path / "model.json"
    before = description.read_text()
    description.write_text(before.replace(json.loads(before)["text"]["fingerprint"][:8], "00000000"))
    try:
        with pytest.raises(UserError, match="00000000"):
            text_encoder(models)
    finally:
        description.write_text(before)


def test_no_text_encoder_is_named(folder):
    with pytest.raises(UserError, match="--text-models"):
        text_encoder(open_models(folder))


# ------------------------------------------------------------------------------------- against the PyTorch pipeline


# Every test samples 80 x 48 px in three steps where it can: a program is compiled once for all that agree.


def torch_pipeline(folder, scheduler="FlowMatchEulerDiscreteScheduler"):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
    steps = getattr(diffusers, scheduler)(shift=2.5)
    pipe = diffusers.StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=steps, **dict.fromkeys(TEXT_PARTS)
    )
    pipe.set_progress_bar_config(disable=True)
    return torch, pipe


def foreign_pictures(torch, pipe, noise, cond, null, sampling):
    def tensor(x):
        return torch.from_numpy(np.array(x))

    with torch.no_grad():
        return pipe(
            prompt_embeds=tensor(cond.tokens),
            pooled_prompt_embeds=tensor(cond.pooled),
            negative_prompt_embeds=tensor(np.repeat(null.tokens, len(noise), axis=0)),
            negative_pooled_prompt_embeds=tensor(np.repeat(null.pooled, len(noise), axis=0)),
            latents=tensor(noise.transpose(0, 3, 1, 2)),
            height=noise.shape[1] * 8,
            width=noise.shape[2] * 8,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="np",
        ).images


@pytest.mark.parametrize(
    "sampling",
    [Sampling("euler", 3, 4.5, 2.5), Sampling("euler", 3, 1.0, 2.5), Sampling("heun", 3, 3.0, 2.5)],
    ids=["euler, guided", "euler, unguided", "heun, guided"],
)
def test_pictures_are_those_of_the_pytorch_pipeline(folder, sampling):
    scheduler = f"FlowMatch{sampling.solver.capitalize()}DiscreteScheduler"
    torch, pipe = torch_pipeline(folder, scheduler)
    rng = np.random.default_rng(5)

    def states(count):
        tokens, pooled = rng.standard_normal((count, 9, 24)), rng.standard_normal((count, 16))
        return Conditioning(tokens.astype(np.float32), np.ones((count, 9), np.float32), pooled.astype(np.float32))

    cond, null, noise = states(3), states(1), rng.standard_normal((3, 6, 10, 4)).astype(np.float32)
    theirs = foreign_pictures(torch, pipe, noise, cond, null, sampling)
    request = Request(("a", "b", "c"), 80, 48, sampling, batch=2, noise=noise)
    ours = np.stack(list(sample_pictures(open_models(folder), request, cond, null)))
    assert ours.shape == (3, 48, 80, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255.0 - theirs).max() <= 1 / 255
    assert theirs.std() > 0.05 and np.mean((theirs > 0) & (theirs < 1)) > 0.3  # else the bound would say little


def test_batches_do_not_change_the_pictures(runs):
    models = open_models(runs[1])
    encoder = text_encoder(models)

    def pictures(batch, prompts=("a red boat", "two cats", "")):
        request = Request(prompts, 80, 48, Sampling(steps=3, guidance=2.0), negative="blur", seed=4, batch=batch)
        return np.stack(list(sample_pictures(models, request, *encode_prompts(encoder, request))))

    one = pictures(1)
    assert np.abs(one.astype(int) - pictures(2)).max() <= 1  # the order of additions may differ with the batch
    assert np.abs(one[:1].astype(int) - pictures(1, ("a red boat",))).max() == 0
    assert len({picture.tobytes() for picture in one}) == 3


def test_in_half_precision_the_position_table_stays_float32(runs, folder):
    for source in (runs[1], folder):
        params = open_models(source).backbone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)[1]
        kinds = {path: leaf.dtype for path, leaf in flat(params).items()}
        assert kinds.pop("position/table") == jnp.float32 and set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
