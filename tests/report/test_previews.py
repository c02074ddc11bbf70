"""Previews of a run that has not begun: from fixed noise, alike each time, measured alike whatever the mask."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_inputs

from lwd_jax.config import Mesh, load_config
from lwd_jax.data.batches import held_out
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import over
from lwd_jax.parallel.rules import replicated
from lwd_jax.report import previews
from lwd_jax.report.previews import make_held_out_loss, make_previews
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


def test_a_mesh_previews_the_same(config, setup, params, tmp_path):
    """One picture over eight devices, as the loop calls it: its rows over `context`, its heads over `tensor`."""
    expected = make_previews(config, setup, tmp_path / "one")(0, params)
    shared = dataclasses.replace(config, mesh=Mesh(1, 2, 2, 2), data=dataclasses.replace(config.data, batch_size=2))
    meshed = make_setup(shared, jax.devices()[:8])
    found = over(meshed.mesh, make_previews(shared, meshed, tmp_path / "eight"))(0, meshed.params())
    assert found == pytest.approx(expected, rel=1e-4)
    for name in ("saliency_and_mask.png", "step_000000_samples.png"):
        one, eight = (np.asarray(Image.open(tmp_path / each / "previews" / name), int) for each in ("one", "eight"))
        assert abs(one - eight).max() <= 2, name  # of 255: rounding


def test_held_out_loss_is_of_all_held_out_pictures_and_does_not_depend_on_the_mask(config, setup, params, tmp_path):
    batch, everywhere = held_out(config), replicated(setup.mesh)
    assert len(batch["mean"]) == HELD_OUT > previews.SHOWN

    def loss(batch, **matching):
        changed = dataclasses.replace(config, matching=dataclasses.replace(config.matching, **matching))
        return make_held_out_loss(changed, setup.opened.module, setup.autoencoder[0].config, everywhere)(params, batch)

    whole = loss(batch)
    for matching in ({"mask": "everywhere"}, {"mask": "soft"}, {"weighting": "sigma_sqrt"}):
        assert loss(batch, **matching) == whole
    assert loss({name: part[: previews.SHOWN] for name, part in batch.items()})["loss"] != whole["loss"]
    assert make_previews(config, setup, tmp_path)(0, params)["loss"] == whole["loss"]


def test_arms_share_their_compiled_programs(config, setup):
    everywhere, module = replicated(setup.mesh), setup.opened.module
    before = previews._example_loss.cache_info()
    for mask in ("time", "everywhere"):
        arm = dataclasses.replace(config, matching=dataclasses.replace(config.matching, mask=mask))
        make_held_out_loss(arm, module, setup.autoencoder[0].config, everywhere)
    after = previews._example_loss.cache_info()
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
