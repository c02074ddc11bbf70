"""`lwd doctor`: each check says ok where things are in order, fails where they are not, and the exit status tells."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import TEXT, autoencoder, backbone, write_workdir

from lwd_jax.autoencoders import save_autoencoder
from lwd_jax.backbones import save_backbone
from lwd_jax.cli import doctor, main
from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import load_config
from lwd_jax.data.dataset import find_pictures, open_dataset, write_dataset
from lwd_jax.data.latents import Encoder, Plan, encode_dataset
from lwd_jax.data.records import float_array, write_records
from lwd_jax.data.store import KEYS
from lwd_jax.data.text import hashed_words
from lwd_jax.weights.folder import fingerprint

CONFIGS = Path(__file__).parents[2] / "configs"


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
        text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
        file.write_text(text)
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


ALONE = (1, 1, 1, 1)


def test_the_state_is_that_of_the_published_models():
    """Bytes but for a few counters."""
    config = load_config({"stage": 2, "models": {"backbone_variant": "sd3-medium"}})
    table = 192 * 1536 * 4  # of sines, one axis: it does not train
    trained, each, whole = doctor.state_size(config, ALONE)
    assert trained == 2_028_328_000 and 0 <= whole - (16 * 2_028_328_000 + table) < 100 and each == whole
    config = load_config({"stage": 1, "training": {"ema": 0.0}, "reconstruction": {"lpips": 0.0}})
    trained, _, whole = doctor.state_size(config, ALONE)
    assert trained == 83_819_683 - 3_715
    assert 0 <= whole - (12 * (83_819_683 - 3_715) + 4 * 3_715) < 100


@pytest.mark.parametrize("axes", [(1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2)])
def test_the_state_lies_over_fsdp_context_and_tensor(axes):
    config = load_config({"stage": 2, "models": {"backbone_variant": "sd3-medium"}})
    _, each, whole = doctor.state_size(config, axes)
    assert whole / 8 < each < 1.05 * whole / 8


def test_of_adapters_nothing_else_trains():
    """SD3-medium's base in bfloat16, and beside it what LoRA of 9,388,032 parameters and Prodigy keep."""
    config = read_config(str(CONFIGS / "stage2_sd3_lora_1024.py"), [])
    trained, _, whole = doctor.state_size(config, ALONE)
    assert trained == 9_388_032
    assert 2 * 2_028_328_000 + 12 * trained < whole < 2 * 2_028_328_000 + 32 * trained


@pytest.mark.parametrize("resolution, told", [(1024, False), (2048, True)])
def test_a_dynamic_shift_is_of_tokens(caplog, resolution, told):
    """4,096 of them at 1024 px are what it is made for."""
    models, matching = {"backbone_variant": "flux-dev"}, {"shift_rule": "dynamic"}
    config = load_config({"stage": 2, "resolution": resolution, "models": models, "matching": matching})
    list(doctor._training(config))
    assert ("dynamic shift" in caplog.text) == told


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
        ("training", {"optimizer": {"name": "adamm"}}),
        ("training", {"optimizer": {"freeze": ("nothing_here",)}}),
        ("training", {"reconstruction": {"scales": (3,)}}),
    ],
)
def test_what_does_not_fit_fails_by_name(config_file, dataset, what, sections):
    sections = {"models": {"autoencoder_variant": "tiny"}, **sections}
    sections["data"] = {"dataset": str(dataset), "held_out": 1, **sections.get("data", {})}
    failed = [f for f in doctor.examine(args(config=config_file(**sections))) if f.verdict == "fail"]
    assert {finding.what for finding in failed} >= {what}
    assert all(finding.todo for finding in failed)


@pytest.mark.parametrize(
    "sections",
    [
        {"matching": {"wavelet": "foo"}},
        {"matching": {"levels": 9}},
        {"matching": {"mask": "foo"}},
        {"matching": {"time_sampler": "foo"}},
        {"adapter": {"kind": "lora", "targets": ("nonsense",)}},
    ],
    ids=str,
)
def test_what_training_would_refuse_fails(cache, sections):
    assert verdicts(list(doctor.check_config(stage2(cache, **sections))), "training") == ["fail"]
    assert verdicts(list(doctor.check_config(stage2(cache))), "training") == ["ok"]


def test_a_file_is_no_workdir_and_a_field_without_a_config_is_a_mistake(config_file, tmp_path, capsys):
    findings = doctor.examine(args(config=config_file(), workdir=config_file()))
    assert verdicts(findings, "workdir") == ["fail"]
    assert main(["doctor", "--config.seed=3"]) == 2
    assert "name it with --config" in capsys.readouterr().err


def test_device_memory_is_compared_with_the_state(monkeypatch):
    config = load_config({"stage": 2})
    each = doctor.state_size(config, (1, jax.device_count(), 1, 1)).each
    for memory, verdict in ((each * 4, "ok"), (each * 1.4, "warn"), (each, "fail")):
        monkeypatch.setattr(doctor, "device_bytes", lambda: math.ceil(memory))
        assert verdicts(list(doctor.check_config(config)), "state") == [verdict]


def encoded(pictures):
    """Values in place of an autoencoder's: what is looked at here is whose they are."""
    values = np.random.default_rng(0).standard_normal((len(pictures), 8, 8, 4)).astype(np.float32)
    return values, np.ones_like(values)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, dataset):
    """Latents and hashed words as `lwd encode` keeps them, and the models they belong to."""
    root = tmp_path_factory.mktemp("cache")
    for name, seed in (("vae", 0), ("other", 1)):
        save_autoencoder(root / name, *autoencoder(seed))
    save_backbone(root / "transformer", *backbone(0))
    plan = Plan(resolution=64, keep_aspect=False, smallest_bucket=1, storage="float32")
    encoder = Encoder(fingerprint(autoencoder(0)[1]), {}, encoded)
    text = hashed_words(None, **TEXT)
    encode_dataset(open_dataset(dataset), root / "latents", encoder, text, plan, lambda *_: None)
    return root


def stage2(cache, resolution=64, **changes):
    """The config of a run on the cache; changes are sections, of which {cache} is filled in."""
    values = {
        "models": {
            "autoencoder": "{cache}/vae",
            "autoencoder_variant": "",
            "backbone": "{cache}/transformer",
            "backbone_variant": "",
        },
        "data": {"latents": "{cache}/latents", "held_out": 1, "buckets": False},
    }
    sections = {
        name: {
            field: value.format(cache=cache) if isinstance(value, str) else value
            for field, value in (section | changes.get(name, {})).items()
        }
        for name, section in values.items()
    }
    return load_config({"stage": 2, "resolution": resolution, **changes, **sections})


def test_latents_that_fit_their_run(cache):
    findings = list(doctor.check_latents(str(cache / "latents"), stage2(cache)))
    assert [(finding.what, finding.verdict) for finding in findings] == [("latents", "ok"), ("fingerprint", "ok")]
    assert "4 records at 64 px" in findings[0].found and "hashed_words" in findings[0].found


@pytest.mark.parametrize(
    "changes, what, words",
    [
        ({"resolution": 128}, "latents", "lwd encode again with --resolution 128 --no-buckets"),
        ({"data": {"buckets": True}}, "latents", "lwd encode again with --resolution 64 --buckets"),
        ({"data": {"held_out": 4}}, "latents", "keep some records for training"),
        ({"models": {"backbone": "", "backbone_variant": "tiny"}}, "text states", "but the backbone reads 128 and 128"),
        ({"models": {"autoencoder": "{cache}/other"}}, "fingerprint", "made by the autoencoder"),
    ],
)
def test_latents_of_another_run_fail_by_name(cache, changes, what, words):
    findings = list(doctor.check_latents(str(cache / "latents"), stage2(cache, **changes)))
    (failed,) = (finding for finding in findings if finding.verdict == "fail")
    assert failed.what == what and words in failed.found + failed.todo


def test_latents_that_are_not_finite_or_not_whole_fail(cache, tmp_path, capsys):
    copy = tmp_path / "latents"
    shutil.copytree(cache / "latents", copy)
    for part in (copy / "pictures").glob("part-*"):
        keys = json.loads((part / KEYS).read_text())
        shutil.rmtree(part)
        part.mkdir()
        row = dict.fromkeys(("mean", "std"), np.full((8, 8, 4), np.nan, np.float32))
        write_records(part, "latents", dict.fromkeys(row, float_array(3, "float32")), [row] * len(keys))
        (part / KEYS).write_text(json.dumps(keys))
    (finding,) = doctor.check_latents(str(copy), None)
    assert finding.verdict == "fail" and "encode them again" in finding.todo
    index = copy / json.loads((copy / "metadata.json").read_text())["index"]
    for damage in (lambda: index.write_bytes(index.read_bytes()[:100]), index.unlink, (copy / "metadata.json").unlink):
        damage()
        assert main(["doctor", "--latents", str(copy)]) == 1
        assert "fail" in next(line for line in capsys.readouterr().out.splitlines() if "latents" in line)


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
    printed = capsys.readouterr().out.replace("│", " ").replace("|", " ")
    assert "does not divide over 8 device(s)" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("mode", "tunables", "expected"),
    [
        ("always", "", ["ok"]),
        ("madvise", "glibc.malloc.check=0:glibc.malloc.hugetlb=1", ["ok"]),
        ("madvise", "", ["warn"]),
        ("never", "glibc.malloc.hugetlb=1", ["warn"]),
        ("", "", []),
    ],
)
def test_huge_pages(mode, tunables, expected):
    assert verdicts(doctor.check_huge_pages(mode, tunables), "huge pages") == expected
