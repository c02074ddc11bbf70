"""Laws of what a run tells FLUX besides the text: NTK and proportional attention, said in one place, and guidance."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import FLUX, KL, SD3, backbone, write_pipeline

from lwd_jax.adapters import attach
from lwd_jax.adapters.peft import FILE, write_file
from lwd_jax.backbones import BACKBONES, flux
from lwd_jax.config import Adapter, load_config
from lwd_jax.errors import UserError
from lwd_jax.report.export import import_models
from lwd_jax.report.pipeline import open_models
from lwd_jax.train.models import BACKBONE, MODEL_FILE, describe, open_trained
from lwd_jax.train.setup import stage_of

ASKED = {"ntk": (10.0, 4.0), "proportional_attention": True}


def opened(**models):
    return open_trained(load_config({"stage": 2, "models": models}))


def test_a_run_trains_with_its_own_and_its_workdir_says_so(tmp_path, caplog):
    folder = write_pipeline(tmp_path / "base", sizes=FLUX)
    run = opened(backbone=str(folder), backbone_variant="", **ASKED)
    assert (run.module.config.ntk, run.module.config.proportional_attention) == ((10.0, 4.0), True)
    assert "models.ntk (10.0, 4.0), but what it starts from has (1.0, 1.0)" in caplog.text
    described = json.loads(describe(BACKBONE, run, {}))["model"]
    assert BACKBONES[described["_class_name"]].from_foreign(described) == run.module.config


def test_adapters_are_opened_with_the_positions_of_their_run(tmp_path):
    """Not with those of their base."""
    folder = write_pipeline(tmp_path / "base", sizes=FLUX)
    params = attach(backbone(1, FLUX)[1], jax.random.key(0), Adapter("lora", 2))
    write_file(tmp_path / FILE, flux.weights(FLUX), params)
    import_models(folder, tmp_path / "run", adapter=str(tmp_path / FILE))
    run = opened(backbone=str(folder), backbone_variant="", **ASKED)
    file = tmp_path / "run" / MODEL_FILE
    file.write_text(describe(BACKBONE, run, {"base": json.loads(file.read_text())["base"]}))
    assert open_models(tmp_path / "run").backbone()[0].config == run.module.config != FLUX


def test_what_is_as_it_was_is_not_told(tmp_path, caplog):
    opened(backbone=str(write_pipeline(tmp_path / "base", sizes=FLUX)), backbone_variant="")
    opened(backbone_variant="flux-tiny", **ASKED)  # random weights have no such start
    assert not caplog.text


def test_another_backbone_has_none():
    with pytest.raises(UserError, match="models.ntk is .10.0, 4.0., but a SD3Transformer2DModel has no such setting"):
        opened(backbone_variant="tiny", ntk=(10.0, 4.0))


@pytest.mark.parametrize("ntk", [(10.0,), (1.0, 0.0), (1.0, -2.0)])
def test_factors_that_mean_nothing_are_refused(ntk):
    with pytest.raises(UserError, match="models.ntk must be two positive factors"):
        opened(backbone_variant="flux-tiny", ntk=ntk)


def test_whole_numbers_are_factors_too():
    assert opened(backbone_variant="flux-tiny", ntk=[10, 10]).module.config.ntk == (10.0, 10.0)


def stage(sizes, guidance):
    """(stage 2 of a module that does nothing, the conditionings that it was given)."""
    given = []

    def apply(variables, z_t, t, cond, rngs):
        given.append(cond)
        return z_t

    run = load_config({"stage": 2, "resolution": 64, "data": {"batch_size": 3}, "matching": {"guidance": guidance}})
    model = SimpleNamespace(class_name="SD3Transformer2DModel")
    opened = SimpleNamespace(module=SimpleNamespace(config=sizes, apply=apply), init=None, model=model)
    return stage_of(run, opened, KL, 9, None), given


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_training_tells_its_guidance(guidance):
    made, given = stage(FLUX, guidance)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in made.batch.items()}
    made.loss({}, batch, jax.random.split(jax.random.key(0), 3))
    assert [cond.guidance.tolist() for cond in given] == [[guidance] * 3]


def test_a_backbone_that_is_told_none_refuses_one():
    made, given = stage(SD3, 1.0)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in made.batch.items()}
    made.loss({}, batch, jax.random.split(jax.random.key(0), 3))
    assert given[0].guidance is None
    with pytest.raises(UserError, match="matching.guidance is 3.5, but this SD3Transformer2DModel"):
        stage(SD3, 3.5)
