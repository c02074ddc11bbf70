"""`lwd export` and `lwd import`: what they write, what they say, and one sentence with exit code 2 for mistakes."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import load_file
from tiny_models import write_pipeline, write_workdir

from lwd_jax.cli import main

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("models") / "sd3")


def test_there_and_back(folder, tmp_path, capsys):
    assert main(["import", "--models", str(folder), "--workdir", str(tmp_path / "run")]) == 0
    assert "--config.models.backbone=" in capsys.readouterr().out.splitlines()[-1]
    arguments = ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--plain"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert "lwd sample --models" in capsys.readouterr().out.splitlines()[-1]
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "transformer" / WEIGHTS).values()} == {"bfloat16"}
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    for part in ("transformer", "vae"):
        assert (tmp_path / "out" / part / WEIGHTS).read_bytes() == (folder / part / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "out" / "lwd.json").read_text())["sampling"]["shift"] == 2.5


def test_stage_1(folder, tmp_path, capsys):
    assert main(["import", "--models", str(folder), "--workdir", str(tmp_path / "run"), "--stage", "1"]) == 0
    assert "--config.models.autoencoder=" in capsys.readouterr().out
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "lwd encode" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "out" / "vae" / WEIGHTS).read_bytes() == (folder / "vae" / WEIGHTS).read_bytes()


def test_an_accelerator_is_left_alone(folder, tmp_path):
    """Another program may have it, as if it were not here; and a model may be more than it holds."""
    script = f"""
from lwd_jax.cli import main
assert main(["import", "--models", {str(folder)!r}, "--workdir", "run", "--stage", "1"]) == 0
assert main(["export", "--workdir", "run", "--out", "out"]) == 0
"""
    environment = {**os.environ, "JAX_PLATFORMS": "tpu,cuda"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "vae" / WEIGHTS).read_bytes() == (folder / "vae" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["export", "--workdir", "nowhere"], "There is no folder 'nowhere'."),
        (["import", "--models", "nowhere"], "There is no folder 'nowhere'."),
        (["export", "--workdir", "FOLDER"], "is a diffusers folder already"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, arguments, sentence):
    arguments = [str(folder) if word == "FOLDER" else word for word in arguments]
    target = "--out" if arguments[0] == "export" else "--workdir"
    assert main([*arguments, target, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_named(tmp_path, capsys):
    run = write_workdir(tmp_path / "run", 1)
    for step in (run / "checkpoints").iterdir():
        for file in step.rglob("*"):
            if file.is_file() and "params" in file.parts:
                file.write_bytes(b"")
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "no sound checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
