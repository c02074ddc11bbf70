"""A file of what was given that was cut off is named in one sentence, whoever reads it; exit code 2."""

import json
import shutil

import pytest
from test_train import config_of
from tiny_models import write_inputs, write_workdir

from lwd_jax.cli import main
from lwd_jax.train.checkpoint import MANIFEST


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cut")
    write_inputs(root)
    write_workdir(root / "run", 1)
    return root


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_description_of_records(root, tmp_path, stage, name, capsys):
    """Of a dataset, and of either store of latents."""
    config = config_of(root, stage)
    given, field = ("dataset", "dataset") if stage == 1 else ("latents", "latents")
    config["data"] |= {field: str(tmp_path / "data"), "batch_size": 8, "held_out": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = sorted((root / given).rglob(name))
    assert len(files) == stage
    for file in files:
        shutil.copytree(root / given, tmp_path / "data")
        broken = tmp_path / "data" / file.relative_to(root / given)
        cut(broken)
        assert main(["train", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"]) == 2
        said = capsys.readouterr().err
        assert str(broken) in said and said.count("\n") == 1
        assert not (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "data")
    if stage == 1:
        shutil.copytree(root / given, tmp_path / "data")
        cut(tmp_path / "data" / files[0].relative_to(root / given))
        words = ["encode", f"--dataset={tmp_path}/data", f"--models={root}/vae", f"--out={tmp_path}/latents"]
        assert main([*words, "--text=hashed_words"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("item", ["params/_sharding", "params/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_file_of_a_checkpoint_without_manifest(root, tmp_path, item, capsys):
    shutil.copytree(root / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "7"
    (step / MANIFEST).unlink()
    cut(step / item)
    assert main(["export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert f"step 7: {item} is not sound JSON" in said.splitlines()[-1]
