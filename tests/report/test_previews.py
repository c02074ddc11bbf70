"""Previews of a run that has not begun: from fixed noise, alike each time, measured alike whatever the mask; what they
are told, and their figures, by hand.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import FLUX, KL, SD3, TEXT, Formula, quiet, write_inputs

from lwd_jax.autoencoders.kl import Posterior
from lwd_jax.config import Mesh, load_config
from lwd_jax.data.batches import held_out
from lwd_jax.data.text import hashed_words
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.objective.reconstruction import pool
from lwd_jax.parallel.mesh import over
from lwd_jax.report import previews
from lwd_jax.report.previews import make_held_out_loss, make_previews
from lwd_jax.report.samples import Request, _latents, encode_prompts
from lwd_jax.train.setup import make_setup

HELD_OUT = 6  # more than SHOWN: the loss is of all of them


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Stage 2 on small latents and hashed words, with prompts of its own."""
    root = tmp_path_factory.mktemp("previews")
    write_inputs(root)
    models = {"autoencoder": "vae", "autoencoder_variant": "", "backbone": "transformer", "backbone_variant": ""}
    return load_config(
        {
            "stage": 2,
            "resolution": 32,
            "dtype": "float32",
            "remat": "none",
            "models": models | {name: str(root / models[name]) for name in ("autoencoder", "backbone")},
            "data": {
                "latents": str(root / "latents"), "batch_size": 1, "workers": 0, "held_out": HELD_OUT, "buckets": False,
            },
            "training": {"preview_prompts": ("a red boat", "two cats"), "preview_every": 1},
            "sampling": {"steps": 2, "guidance": 2.0},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def setup(config):
    return make_setup(config, jax.devices()[:1])


@pytest.fixture(scope="module")
def params(setup):
    return setup.params()


def test_prompts_of_a_new_run_are_drawn_alike_each_time(config, setup, params, tmp_path):
    found = [make_previews(config, setup, tmp_path / name)(0, params) for name in ("one", "two")]
    assert found[0] == found[1] and found[0].keys() >= {"loss", "loss_detail", "sample_high_frequency_share"}
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "previews").iterdir()} for name in ("one", "two")
    )
    assert first == second and set(first) == {"saliency_and_mask.png", "step_000000_samples.png"}
    # Another prompt or another seed is another picture.
    for change in (
        {"training": dataclasses.replace(config.training, preview_prompts=("a dog", "two cats"))},
        {"seed": 1},
    ):
        make_previews(dataclasses.replace(config, **change), setup, tmp_path / "other")(0, params)
        assert (tmp_path / "other/previews/step_000000_samples.png").read_bytes() != first["step_000000_samples.png"]


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 4, 1, 1)])
def test_a_mesh_previews_the_same(config, setup, params, tmp_path, sizes):
    """Over eight devices, as the loop calls it: a picture's rows over `context`, its heads over `tensor`; or more
    places for pictures than pictures.
    """
    expected = make_previews(config, setup, tmp_path / "one")(0, params)
    mesh, batch = Mesh(*sizes), sizes[0] * sizes[1]
    shared = dataclasses.replace(config, mesh=mesh, data=dataclasses.replace(config.data, batch_size=batch))
    meshed = make_setup(shared, jax.devices()[:8])
    found = over(meshed.mesh, make_previews(shared, meshed, tmp_path / "eight"))(0, meshed.params())
    assert found == pytest.approx(expected, rel=1e-4)
    for name in ("saliency_and_mask.png", "step_000000_samples.png"):
        one, eight = (np.asarray(Image.open(tmp_path / each / "previews" / name), int) for each in ("one", "eight"))
        assert abs(one - eight).max() <= 2, name  # of 255: rounding


def test_held_out_loss_is_of_all_held_out_pictures_and_does_not_depend_on_the_mask(config, setup, params, tmp_path):
    batch = held_out(config)
    assert len(batch["mean"]) == HELD_OUT > previews.SHOWN

    def loss(batch, **matching):
        changed = dataclasses.replace(config, matching=dataclasses.replace(config.matching, **matching))
        return make_held_out_loss(changed, setup.opened.module, setup.autoencoder[0].config, setup.mesh)(params, batch)

    whole = loss(batch)
    for matching in ({"mask": "everywhere"}, {"mask": "soft"}, {"weighting": "sigma_sqrt"}):
        assert loss(batch, **matching) == whole
    assert loss({name: part[: previews.SHOWN] for name, part in batch.items()})["loss"] != whole["loss"]
    assert make_previews(config, setup, tmp_path)(0, params)["loss"] == whole["loss"]


def test_held_out_loss_by_hand(config, setup):
    """The plain error of the velocity: of latents in use, each with noise of its own, told the guidance of training."""
    batch, module = {name: part[:2] for name, part in held_out(config).items()}, Formula(FLUX)
    told = dataclasses.replace(config, seed=3, matching=dataclasses.replace(config.matching, guidance=2.5))
    errors = []
    for number, mean in enumerate(batch["mean"]):
        z0 = (mean[None] - KL.shift) * KL.scaling
        states = (batch[name][number : number + 1] for name in ("tokens", "token_mask", "pooled"))
        cond = Conditioning(*states, np.full(1, 2.5, np.float32))
        for index, t in enumerate(previews.HELD_OUT_TIMES):
            key = jax.random.fold_in(jax.random.key(3), len(previews.HELD_OUT_TIMES) * number + index)
            noise = np.asarray(jax.random.normal(key, z0.shape))
            velocity = module.apply({}, (1 - t) * z0 + t * noise, np.full(1, t), cond)
            errors.append(np.mean((velocity - (noise - z0)) ** 2))
    found = make_held_out_loss(told, module, KL, setup.mesh)({}, batch)
    assert found["loss"] == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("sizes", [SD3, FLUX], ids=["sd3", "flux"])
def test_samples_are_those_of_lwd_sample(config, setup, sizes):
    """Of the same noise: guided away from the empty caption, and told the same guidance."""
    module, noise = Formula(sizes), np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    cond, null, prompts = previews._conditioning(config, setup, held_out(config))
    drawn = previews.make_sample(config, module, setup.mesh)({}, noise, cond, null)
    request = Request(prompts, 32, 32, config.sampling, noise=noise)
    models = SimpleNamespace(backbone=lambda **kinds: (module, {}))
    states = encode_prompts(hashed_words(None, **TEXT), request)
    np.testing.assert_allclose(drawn, _latents(models, request, *states, setup.mesh, quiet), rtol=1e-5, atol=1e-6)


def test_arms_share_their_compiled_programs(config, setup):
    module = setup.opened.module
    before = previews._example_losses.cache_info()
    for mask in ("time", "everywhere"):
        arm = dataclasses.replace(config, matching=dataclasses.replace(config.matching, mask=mask))
        make_held_out_loss(arm, module, setup.autoencoder[0].config, setup.mesh)
    after = previews._example_losses.cache_info()
    assert after.hits >= before.hits + 1 and after.currsize <= before.currsize + 1


def test_prompts_need_the_text_encoder_of_the_latents(config, setup, tmp_path):
    described = json.loads(setup.description)

    def begin(**text):
        changed = setup._replace(description=json.dumps(described | {"text": described["text"] | text}))
        return make_previews(config, changed, tmp_path / "run")

    with pytest.raises(UserError, match="comes with none; leave it empty"):
        begin(kind="sd3")
    with pytest.raises(UserError, match="0000.* but that of"):
        begin(fingerprint="0" * 64)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- stage 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """In place of an autoencoder: a latent is the mean colour of a block, and a block is decoded as its latent."""

    config = KL

    def apply(self, variables, x, method):
        side = self.config.factor
        return Posterior(pool(x, side), None) if method == "encode" else x.repeat(side, axis=1).repeat(side, axis=2)


def test_latents_are_in_use_and_pictures_are_decoded_from_unscaled_ones():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mean = pictures.reshape(2, 4, 8, 4, 8, 3).mean(axis=(2, 4))
    made = previews.make_reconstruct(Blocks(), (2,))({}, pictures)
    in_use = (mean / 127.5 - 1 - KL.shift) * KL.scaling
    for z in (made["mean"], previews.make_encode(Blocks())({}, pictures)):
        np.testing.assert_allclose(z, in_use, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made["picture"], mean.repeat(8, axis=1).repeat(8, axis=2), atol=0.51)
    pooled = mean.reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(made["pooled"][2], pooled.repeat(8, axis=1).repeat(8, axis=2), atol=0.51)


def test_the_error_of_a_scale_is_of_pictures_between_minus_1_and_1():
    random = np.random.default_rng(0)
    pictures, decoded = (random.integers(0, 256, (2, side, side, 3), np.uint8) for side in (16, 8))
    x, y = (part / 127.5 - 1 for part in (pictures, decoded))
    expected = np.mean((x.reshape(2, 8, 2, 8, 2, 3).mean(axis=(2, 4)) - y) ** 2)
    assert previews.scale_error(pictures, {2: decoded}) == {2: pytest.approx(expected, rel=1e-5)}
