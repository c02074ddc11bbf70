"""The whole job in a few steps of each part: every part runs, the report shows them, and a second run does nothing
again.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from compiling import QUICKLY
from etils.epath import Path
from PIL import Image
from tiny_models import FLUX, write_pipeline, write_workdir

from lwd_jax.adapters import attach
from lwd_jax.adapters.peft import FILE, write_file
from lwd_jax.backbones import flux
from lwd_jax.cli import main, parser_of, quickstart
from lwd_jax.cli.config_flag import read_config
from lwd_jax.cli.quickstart import WORDS, Clock, Part, _check_source
from lwd_jax.config import Adapter, Models
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import batch_parts, make_mesh
from lwd_jax.report import quickstart as report
from lwd_jax.report.export import export, import_models
from lwd_jax.report.page import Code, Picture, Table
from lwd_jax.report.photographs import Photograph, own, shipped
from lwd_jax.report.pipeline import open_models
from lwd_jax.report.quickstart import Run
from lwd_jax.train.models import open_autoencoder, open_trained
from lwd_jax.train.program import build_program
from lwd_jax.train.setup import stage_of

QUICK = {"XLA_FLAGS": QUICKLY}
PICTURES = {
    "photographs", "saliency_and_masks", "supervised_fraction", "reconstructions", "pooled", "spectrum", "stage1_loss",
    "stage2_loss", "loss_by_time", "samples",
}  # fmt: skip


def lwd(*words):
    command = [sys.executable, "-m", "lwd_jax.cli", "quickstart", "--fast", *map(str, words)]
    return subprocess.run(command, env=os.environ | QUICK, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_quickstart_from_photographs_to_report(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    ran = lwd("--workdir", workdir)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert "report.html" in ran.stdout.splitlines()[-2]

    page = (workdir / "report.html").read_text()
    assert {path.stem for path in (workdir / "pictures").iterdir()} == PICTURES
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "What it cannot show" in page and "run with --fast" in page and "hashed_words" in ran.stdout
    assert set(re.findall(r"lwd (\w+)", ran.stdout)) >= {"prepare", "train", "encode", "sample", "export"}

    # Both arms start from the same weights and see the same batches: their first unmasked losses are equal.
    first = [
        json.loads((workdir / arm / "metrics.jsonl").read_text().splitlines()[1])
        for arm in ("backbone_plain", "backbone_lwd")
    ]
    for name in ("loss_detail", "loss_smooth"):
        np.testing.assert_allclose(first[0][name], first[1][name], rtol=1e-5)
    assert first[0]["supervised_fraction"] == 1 > first[1]["supervised_fraction"]

    exported = open_models(workdir / "export")
    assert exported.has_backbone() and exported.has_autoencoder() and exported.text()["kind"] == "hashed_words"
    samples = json.loads((workdir / "samples_lwd/samples.json").read_text())["samples"]
    assert Image.open(workdir / "samples_lwd" / samples[0]["file"]).size == (128, 128)

    reported = []
    monkeypatch.setattr(quickstart, "write_report", lambda *what: reported.append(what))
    assert main(["quickstart", "--fast", "--workdir", str(workdir)]) == 0
    assert capsys.readouterr().out.count("(done before)") == 11 and len(reported) == 1  # all but the report


@pytest.mark.parametrize("backbone", quickstart.BACKBONES)
@pytest.mark.parametrize("count, pictures_over", [(1, 1), (3, 1), (8, 4)])
def test_its_batches_divide_over_any_number_of_devices(tmp_path, monkeypatch, count, pictures_over, backbone):
    """The words of every lwd train in it give a mesh of all devices, and programs whose sizes divide."""
    monkeypatch.setattr(jax, "device_count", lambda: count)
    parts = quickstart._parts(Run(tmp_path), shipped()[:2], fast=True, backbone=backbone)
    commands = [part.work for part in parts if not callable(part.work) and part.work[0] == "train"]
    assert len(commands) == (6 if backbone in quickstart.ADAPTED else 5)
    for words in commands:
        given = {word.partition("=")[0]: word.partition("=")[2] for word in words[1:]}
        config = read_config(given["--config"], [word for word in words if word.startswith("--config.")])
        mesh = make_mesh(config.mesh, jax.devices()[:count])
        assert mesh.size == count and batch_parts(mesh) == pictures_over
        models = dataclasses.replace(config.models, autoencoder="", backbone="")  # random weights of the same sizes
        config = dataclasses.replace(config, models=models)
        sizes = open_autoencoder(config).module.config
        program = build_program(config, mesh, stage_of(config, open_trained(config), sizes, WORDS + 1, None))
        assert all(leaf.sharding.mesh.size == count for leaf in jax.tree.leaves(program.batch))


def test_a_lora_goes_round_beside_flux_alone(tmp_path):
    """Its parts follow those that every backbone has, and are words that the commands know."""
    plain, adapted = (quickstart._parts(Run(tmp_path), shipped()[:2], True, name) for name in ("sd3", "flux"))
    assert [part.title for part in adapted[: len(plain)]] == [part.title for part in plain] and len(plain) == 11
    commands = [part.work for part in adapted[len(plain) :]]
    assert [words[0] for words in commands] == ["train", "export", "export", "import", "sample", "sample", "sample"]
    for words in commands:
        _, left = parser_of(words[0]).parse_known_args(words[1:])
        assert all(word.startswith("--config.") for word in left)
    (given, *_) = commands
    config = read_config(given[1].removeprefix("--config="), [word for word in given if word.startswith("--config.")])
    assert config.adapter.kind == "lora" and config.models.backbone == str(tmp_path / "backbone_base")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """What the section on the LoRA reads of a quickstart: a tiny FLUX as a folder, adapters over it, and samples that
    differ by what the test says."""
    run = Run(Path(tmp_path_factory.mktemp("adapted")))
    write_pipeline(run.workdir / "start", sizes=FLUX)
    models = {"autoencoder": str(run.workdir / "start"), "backbone": str(run.workdir / "start")}
    export(write_workdir(run.base, 2, sizes=FLUX, text=True, models=models, sampling={"steps": 2}), run.base_export)
    params = attach(open_models(run.base_export).backbone()[1], jax.random.key(0), Adapter("lora", 3, ("picture/q",)))
    run.lora_export.mkdir()
    write_file(run.lora_export / FILE, flux.weights(FLUX), params)
    import_models(run.base_export, run.lora, adapter=str(run.lora_export / FILE))
    for (name, folder), value in zip(run.adapted_samples().items(), (250, 2, 5)):
        folder.mkdir()
        pictures = np.full((2, 16, 16, 3), 9, np.uint8)
        pictures[1, 3, 4, 2] = value
        samples = [{"file": f"{i}.png", "prompt": f"the prompt {i}"} for i in range(2)]
        for sample, picture in zip(samples, pictures):
            Image.fromarray(picture).save(folder / sample["file"])
        (folder / "samples.json").write_text(json.dumps({"samples": samples}))
    return run


def test_the_report_measures_the_round_trip(adapted):
    section = report._adapters(adapted)
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    said = dict(table.rows)
    # Two double blocks, whose kernel is 32 x 32: 2 x 3 x (32 + 32).
    whole = sum(leaf.size for leaf in jax.tree.leaves(open_models(adapted.base).backbone()[1]))
    assert said["parameters that trained"] == f"384 beside {whole:,}"
    assert said["largest difference of a pixel, LoRA and read back"] == "3 of 255"
    assert said["largest difference of a pixel, LoRA and base"] == "248 of 255"
    (picture,) = (block for block in section.blocks if isinstance(block, Picture))
    assert picture.name == "adapters" and picture.png.startswith(b"\x89PNG")


def test_the_code_of_the_round_trip_runs(adapted):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    (code,) = (block.text for block in report._adapters(adapted).blocks if isinstance(block, Code))
    names = {}
    exec(code, names)
    assert names["picture"].size == (64, 64) and names["pipe"].get_active_adapters()


def test_the_seconds_of_a_part_are_kept_whatever_ends_it(tmp_path):
    def stop():
        time.sleep(0.01)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Clock(tmp_path, 1).run(Part("work", stop, None))
    kept = json.loads((tmp_path / "times.json").read_text())
    assert kept["work"] >= 0.02 and Clock(tmp_path, 1).seconds == kept


def test_the_report_says_what_was_cut(tmp_path, monkeypatch):
    text = {"metadata": {"text": {"length": 4}}}
    monkeypatch.setattr(report, "open_latents", lambda folder: SimpleNamespace(**text))
    photographs = [Photograph("a", "one two three", None), Photograph("b", "one two three four", None)]

    def said(fast):
        config = SimpleNamespace(resolution=128, models=Models(backbone_variant="tiny"))
        section = report._what(photographs, Run(tmp_path), config, fast)
        return " ".join(block.text for block in section.blocks)

    assert "the first 3 words of a caption (1 of the 2 captions" in said(False) and "--fast" not in said(False)
    assert "This is a run with --fast" in said(True)


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_memory_is_counted_in_the_units_of_the_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(report.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert report.peak_memory() == 3.0


def test_commands_to_type_next_are_quoted(tmp_path):
    run = Run(tmp_path / "my run")
    code = report._next(run, [Photograph("a", 'the "red" boat\'s $HOME', None)]).blocks[1].text
    (line,) = (line for line in code.splitlines() if line.startswith("lwd sample"))
    words = shlex.split(line)
    assert words[words.index("--prompt") + 1] == 'the "red" boat\'s $HOME'
    assert words[words.index("--models") + 1] == str(run.export)


def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, capsys):
    assert main(["quickstart", "--workdir", str(tmp_path / "run"), "--images", str(tmp_path / "missing")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_changed_is_told_and_the_workdir_in_it_is_no_part_of_it(tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    workdir = tmp_path / "run"
    (workdir / "squares").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(workdir / "squares" / "x.png")
    for _ in range(2):
        found = own(tmp_path, workdir)
        assert [photograph.name for photograph in found] == ["0", "1", "2"]
        _check_source(workdir, str(tmp_path), found, True, "sd3")
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match="other photographs"):
        _check_source(workdir, str(tmp_path), own(tmp_path, workdir), True, "sd3")


def test_a_workdir_keeps_to_its_photographs(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/source.json").write_text(json.dumps({"images": "/elsewhere", "fast": False}))
    assert main(["quickstart", "--workdir", str(tmp_path / "run")]) == 2
    assert "name a new --workdir" in capsys.readouterr().err
