"""`lwd doctor`: each check says ok where things are in order, fails where they are not, and the exit status tells."""

import math
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_workdir

from lwd_jax.cli import doctor, main
from lwd_jax.config import load_config
from lwd_jax.data.dataset import find_pictures, write_dataset


def args(**given):
    return SimpleNamespace(**{"config": "", "dataset": "", "latents": "", "workdir": "", "overrides": [], **given})


def verdicts(findings, what):
    return [finding.verdict for finding in findings if finding.what == what]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (72, 96, 3), np.uint8)).save(folder / f"{number}.png")
    paths = find_pictures(folder)
    write_dataset(folder / "set", folder, paths, [("a caption",)] * len(paths), lambda done, total: None)
    return folder / "set"


@pytest.fixture
def config_file(tmp_path):
    def write(**sections):
        file = tmp_path / "run.py"
        values = {"stage": 1, "name": "run", "resolution": 64, **sections}
        file.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n")
        return str(file)

    return write


def test_this_machine_is_in_order(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "jax" in said and "extra [text]" in said and said.splitlines()[-1].startswith("Nothing failed")


def test_an_old_and_a_missing_package_fail(monkeypatch):
    monkeypatch.setattr(doctor, "required", lambda: {"jax": "99.1", "no-such-package": "1.0"})
    found = {finding.what: finding for finding in doctor.check_versions()}
    assert (found["jax"].verdict, found["no-such-package"].verdict, found["flax"].verdict) == ("fail", "fail", "ok")
    assert found["jax"].todo == "pip install 'jax>=99.1'"


def test_state_bytes_are_those_of_the_published_models():
    config = load_config({"stage": 2, "models": {"backbone_variant": "sd3-medium"}})
    table = 192 * 1536 * 4  # of sines, one axis: it does not train
    assert doctor.state_bytes(config) == (2_028_328_000, 16 * 2_028_328_000 + table)
    config = load_config({"stage": 1, "training": {"ema": 0.0}})
    assert doctor.state_bytes(config) == (83_819_683 - 3_715, 12 * (83_819_683 - 3_715) + 4 * 3_715)


def test_config_and_dataset_that_fit(config_file, dataset, tmp_path, capsys):
    tiny = {"models": {"autoencoder_variant": "tiny"}, "data": {"dataset": str(dataset), "held_out": 1}}
    findings = list(doctor.examine(args(config=config_file(**tiny), workdir=str(tmp_path / "new"))))
    assert Counter(finding.verdict for finding in findings)["fail"] == 0
    for what in ("mesh", "batch", "state", "dataset", "buckets", "workdir"):
        assert verdicts(findings, what) == ["ok"], what


@pytest.mark.parametrize(
    ("what", "sections"),
    [
        ("mesh", {"mesh": {"fsdp": 7}}),
        ("batch", {"data": {"batch_size": 12}}),
        ("config", {"resolution": 80}),
        ("models", {"models": {"autoencoder": "/nowhere"}}),
        ("dataset", {"data": {"held_out": 4}}),
        ("dataset", {"data": {"dataset": "/nowhere"}}),
    ],
)
def test_what_does_not_fit_fails_by_name(config_file, dataset, what, sections):
    sections = {"models": {"autoencoder_variant": "tiny"}, **sections}
    sections["data"] = {"dataset": str(dataset), "held_out": 1, **sections.get("data", {})}
    failed = [f for f in doctor.examine(args(config=config_file(**sections))) if f.verdict == "fail"]
    assert {finding.what for finding in failed} >= {what}
    assert all(finding.todo for finding in failed)


def test_device_memory_is_compared_with_the_state(monkeypatch):
    config = load_config({"stage": 2})
    each = doctor.state_bytes(config)[1] / jax.device_count()
    for memory, verdict in ((each * 4, "ok"), (each * 1.4, "warn"), (each, "fail")):
        monkeypatch.setattr(doctor, "device_bytes", lambda: math.ceil(memory))
        assert verdicts(list(doctor.check_config(config)), "state") == [verdict]


def test_damaged_checkpoints_are_told(tmp_path):
    workdir = write_workdir(tmp_path / "run", 1)
    (finding,) = doctor.check_workdir(str(workdir), None)
    assert finding.verdict == "ok" and "step 7" in finding.found
    config = load_config({"stage": 1, "name": "run 0", "resolution": 128})
    assert [f.verdict for f in doctor.check_workdir(str(workdir), config)] == ["fail", "ok"]  # another run's config
    victim = max((workdir / "checkpoints" / "7").rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"x" + victim.read_bytes()[1:] + b"x")
    assert [f.verdict for f in doctor.check_workdir(str(workdir), None)] == ["warn", "fail"]


@pytest.mark.parametrize("flag", ["--config", "--dataset", "--latents"])
def test_what_is_named_but_not_there_is_the_users_mistake(flag, capsys):
    assert main(["doctor", flag, "/nowhere/at/all"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_failures_give_exit_status_1(config_file, capsys):
    assert main(["doctor", "--config", config_file(mesh={"fsdp": 7})]) == 1
    assert "does not divide the 8 devices" in " ".join(capsys.readouterr().out.replace("│", " ").replace("|", " ").split())
