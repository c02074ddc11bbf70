"""`lwd train`: killed at any moment it resumes to the uninterrupted run; mistakes are one sentence and exit code 2."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from compiling import QUICKLY
from safetensors.numpy import load_file, save_file
from tiny_models import SD3, SMALL_KL, autoencoder, backbone, write_inputs

from lwd_jax.autoencoders import save_autoencoder
from lwd_jax.backbones import save_backbone
from lwd_jax.cli import main
from lwd_jax.config import load_config
from lwd_jax.errors import UserError
from lwd_jax.train import metrics, setup
from lwd_jax.train.checkpoint import Checkpoints, read_params
from lwd_jax.train.loop import Outcome
from lwd_jax.train.models import read_description


def config_of(root, stage):
    """A run of either stage; few parameters train, because their updates take longest to compile."""
    config = {
        "name": "small",
        "stage": stage,
        "resolution": 32,
        "dtype": "float32",
        "remat": "none",
        "models": {"autoencoder": f"{root}/vae", "autoencoder_variant": ""},
        "data": {"batch_size": 2, "workers": 0, "held_out": 2, "buckets": False},
        "optimizer": {"learning_rate": 1e-3, "warmup": 1, "train_only": ["conv_in|final_proj"]},
        "mesh": {"fsdp": -1},
        "training": {"steps": 8, "ema": 0.9, "log_every": 1, "save_every": 2, "keep": 10, "preview_every": 0},
    }
    if stage == 1:
        config["data"]["dataset"] = f"{root}/dataset"
        config["reconstruction"] = {"lpips": 0.0, "alpha": 0.0}
    else:
        config["data"]["latents"] = f"{root}/latents"
        config["models"] |= {"backbone": f"{root}/transformer", "backbone_variant": ""}
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, a small autoencoder and backbone, latents, and a config for each stage."""
    root = tmp_path_factory.mktemp("train")
    write_inputs(root)
    save_autoencoder(root / "other", *autoencoder(1))
    save_autoencoder(root / "small", *autoencoder(0, SMALL_KL))
    save_backbone(root / "wide", *backbone(0, dataclasses.replace(SD3, pooled_projection_dim=20)))
    shutil.copytree(root / "vae", root / "torn")
    file = next((root / "torn").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file)
    for stage in (1, 2):
        (root / f"stage{stage}.json").write_text(json.dumps(config_of(root, stage)))
    return root


def environment(root):
    """One device pair, and one compilation for all processes."""
    return os.environ | {
        "XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def command(root, workdir, *overrides, stage=1):
    arguments = [f"--config={root}/stage{stage}.json", f"--workdir={workdir}", *overrides]
    return [sys.executable, "-m", "lwd_jax.cli", "train", *arguments]


def start(root, workdir, *overrides):
    words = command(root, workdir, f"--config.models.autoencoder={root}/small", *overrides)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment(root), **pipes)


def train(root, workdir, *overrides):
    process = start(root, workdir, *overrides)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return printed


def wait_for_line(process, workdir, step):
    """Until metrics.jsonl has the line of a step; the process must live."""
    while not any(line["step"] >= step for line in metrics.read(workdir)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def newest(workdir):
    """Every array file of the newest checkpoint, as (params, average), and its data position."""
    plain, _, step = read_params(workdir, ema=False)
    checkpoints = Checkpoints(workdir, keep=10)
    run = json.loads((workdir / "checkpoints" / str(step) / "run" / "metadata").read_text())
    checkpoints.close()
    return step, jax.device_get((plain, read_params(workdir)[0])), run["data"]


def timeless(workdir):
    timed = ("pictures_per_second", "data_wait_share")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics.read(workdir)]


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_bit_for_bit(root, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "lwd encode" in train(root, whole).splitlines()[-1]
    process = start(root, killed)
    wait_for_line(process, killed, 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(root, killed)
    (step, arrays, position), (other_step, others, other_position) = newest(whole), newest(killed)
    assert step == other_step == 8
    jax.tree.map(np.testing.assert_array_equal, arrays, others)
    assert position == other_position and position["global_next_index"] == 16
    assert timeless(whole) == timeless(killed) and [line["step"] for line in timeless(whole)] == list(range(1, 9))


@pytest.mark.slow
def test_sigterm_saves_and_says_so(root, tmp_path):
    process = start(root, tmp_path / "run", "--config.training.steps=100000", "--config.training.save_every=100000")
    wait_for_line(process, tmp_path / "run", 1)
    process.terminate()
    printed = process.communicate()[0]
    assert process.returncode == 143
    step = newest(tmp_path / "run")[0]
    assert f"Stopped by SIGTERM at step {step} of 100000" in printed.splitlines()[-1]


def test_stage_2_trains_from_latents_and_knows_its_autoencoder(root, tmp_path, capsys):
    overrides = ("--config.training.steps=2", "--config.data.batch_size=8", "--config.data.held_out=1")
    assert main(command(root, tmp_path / "run", *overrides, stage=2)[3:]) == 0, capsys.readouterr().err
    assert "lwd sample" in capsys.readouterr().out.splitlines()[-1]
    described = read_description(tmp_path / "run")
    assert described["kind"] == "backbone" and len(described["autoencoder_fingerprint"]) == 64
    lines = metrics.read(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and len(lines[0]["loss_by_time"]) == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["models"]["autoencoder"] == f"{root}/vae"
    # Gone on with, it is the run that was never stopped: caption dropout, order and averages included.
    overrides = ("--config.training.steps=4", *overrides[1:])
    for name in ("run", "whole"):
        assert main(command(root, tmp_path / name, *overrides, stage=2)[3:]) == 0, capsys.readouterr().err
    gone_on, whole = (read_params(tmp_path / name)[0] for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, gone_on, whole)
    assert [line["loss"] for line in metrics.read(tmp_path / "run")] == [
        line["loss"] for line in metrics.read(tmp_path / "whole")
    ]


@pytest.mark.parametrize("named", [True, False])
def test_a_start_from_random_weights_is_told(root, tmp_path, capsys, monkeypatch, named):
    monkeypatch.setattr("lwd_jax.cli.train.loop", lambda *_, **__: Outcome(8, 0))
    nothing = ("--config.models.autoencoder=''", "--config.models.autoencoder_variant=tiny")
    sizes = ("--config.data.batch_size=8", "--config.data.held_out=1")
    assert main(command(root, tmp_path / "run", *sizes, *(() if named else nothing))[3:]) == 0
    assert ("The autoencoder starts from random weights" in capsys.readouterr().out) != named


def test_settings_that_nothing_reads_are_told_of(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lwd_jax.cli.train.loop", lambda *_, **__: Outcome(8, 0))
    overrides = ("--config.matching.softness=0.2", "--config.data.batch_size=8", "--config.data.held_out=1")
    assert main(command(root, tmp_path / "run", *overrides, stage=2)[3:]) == 0
    sentence = "Config 'matching.softness' has no effect with matching.mask 'time'."
    assert capsys.readouterr().out.count(sentence) == 1
    # A run that has begun is what it is.
    monkeypatch.setattr("lwd_jax.cli.train.saved_steps", lambda workdir: [2])
    assert main(command(root, tmp_path / "run", *overrides, stage=2)[3:]) == 0
    assert sentence not in capsys.readouterr().out


def test_too_little_shared_memory_for_the_workers_is_told(root, tmp_path, monkeypatch, capsys):
    """A container has 64 MB if nothing else is said; full, it ends a worker without a word."""
    monkeypatch.setattr(setup, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=64e6)))
    sizes = ("--config.data.batch_size=8", "--config.data.held_out=1", "--config.data.workers=1000")
    assert main(command(root, tmp_path / "run", *sizes)[3:]) == 2
    told = capsys.readouterr().err
    assert "has 64 MB free" in told and "--shm-size" in told and told.count("\n") == 1
    batch = {"picture": jax.ShapeDtypeStruct((8, 1000, 1000, 3), np.uint8)}
    for workers, enough in ((0, True), (2, False)):
        config = load_config({"stage": 1, "data": {"workers": workers}})
        with contextlib.nullcontext() if enough else pytest.raises(UserError, match="need up to 192 MB"):
            setup.check_shared_memory(config, batch)


@pytest.mark.parametrize("folder, words", [("dataset", "holds a dataset"), ("latents", "holds latents")])
def test_a_run_is_not_mixed_with_what_another_command_wrote(root, capsys, folder, words):
    before = sorted((root / folder).rglob("*"))
    assert main(command(root, root / folder)[3:]) == 2
    assert words in capsys.readouterr().err and sorted((root / folder).rglob("*")) == before


@pytest.mark.parametrize(
    "stage, overrides, words",
    [
        (2, ("--config.models.autoencoder={root}/other",), "made by the autoencoder .*decodes with"),
        (2, ("--config.models.autoencoder=''",), "set models.autoencoder"),
        (2, ("--config.data.latents={root}/nowhere",), "no folder of latents"),
        (2, ("--config.models.backbone={root}/vae",), "AutoencoderKL, but SD3Transformer2DModel"),
        (2, ("--config.models.backbone={root}/wide",), "24 and pooled 16 wide, but the backbone reads 24 and 20"),
        (2, ("--config.models.autoencoder_variant=sdxl",), "not of models.autoencoder_variant 'sdxl': its \\w+ is"),
        (1, ("--config.data.batch_size=3",), "batch_size 3 .*does not divide"),
        (1, ("--config.optimizer.freeze=('nothing_here',)",), "nothing_here"),
        (1, ("--config.mesh.context=3",), "mesh"),
        (1, ("--config.optimizer.learning_rat=1",), "Did you mean 'learning_rate'"),
        (1, ("--config.models.autoencoder={root}/transformer",), "SD3Transformer2DModel, but AutoencoderKL"),
        (1, ("--config.data.dataset=''",), "lwd prepare"),
        (1, ("--config.reconstruction.scales=(2,3)", "--config.reconstruction.alpha=0.1"), "not divide by scale 3"),
        (2, ("--config.matching.mask=tiem",), "no mask rule 'tiem'. Did you mean 'time'"),
        (2, ("--config.matching.wavelet=haaar",), "wavelet"),
        (2, ("--config.matching.time_sampler=mode", "--config.matching.mode_scale=3.0"), "mode_scale"),
        (2, ("--config.matching.weighting=cosmop",), "Did you mean 'cosmap'"),
        (1, ("--config.models.autoencoder={root}/torn",), "decoder.conv_in.bias"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(root, tmp_path, capsys, stage, overrides, words):
    given = (f"{o}".format(root=root) for o in ("--config.data.batch_size=8", "--config.data.held_out=1", *overrides))
    assert main(command(root, tmp_path / "run", *given, stage=stage)[3:]) == 2
    printed = capsys.readouterr().err.strip()
    assert re.search(words, printed) and len(printed.splitlines()) == 1
    assert not (tmp_path / "run").exists()
