"""Weights that are not those of the model: named, with exit code 2, and nothing written."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_models import write_pipeline

from lwd_jax.cli import main

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for i in range(9):
        values = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / "images" / f"{i}.png")
    words = ["--images", str(root / "images"), "--out", str(root / "set"), "--resolution", "64", "--no-captions"]
    assert main(["prepare", *words]) == 0
    return root / "set"


def pickled(file, leak):
    file.unlink()
    file.with_name("diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil(leak)))


def changed(change):
    def damage(file, leak):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def misshaped(tensors):
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"][:-1].copy()


def extra(tensors):
    tensors["decoder.left_over"] = np.zeros(3, np.float32)


def missing(tensors):
    del tensors["decoder.conv_in.bias"]


MISTAKES = {
    "pickle": (pickled, "holds a pickle (diffusion_pytorch_model.bin)"),
    "extra": (changed(extra), "decoder.left_over"),
    "misshaped": (changed(misshaped), "decoder.conv_in.bias"),
    "missing": (changed(missing), "decoder.conv_in.bias"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(sound, dataset, tmp_path, capsys, mistake):
    damage, words = MISTAKES[mistake]
    folder, config = tmp_path / "models", tmp_path / "run.json"
    shutil.copytree(sound, folder)
    damage(folder / "vae" / WEIGHTS, tmp_path / "leak")
    values = {
        "stage": 1, "resolution": 64, "mesh": {"fsdp": 1, "data": -1}, "reconstruction": {"lpips": 0.0},
        "models": {"autoencoder": str(folder), "autoencoder_variant": ""},
        "data": {"dataset": str(dataset), "batch_size": 8, "held_out": 1, "workers": 0, "buckets": False},
        "training": {"preview_every": 0},
    }  # fmt: skip
    config.write_text(json.dumps(values))
    text = ["--text", "hashed_words", "--resolution", "64"]
    out = str(tmp_path / "out")
    for command in (
        ["import", "--models", str(folder), "--stage", "1", "--workdir", out],
        ["train", "--config", str(config), "--workdir", out],
        ["encode", "--models", str(folder), "--dataset", str(dataset), *text, "--out", out],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("lwd: ") and error.count("\n") == 1 and words in error, error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "run.json"]
