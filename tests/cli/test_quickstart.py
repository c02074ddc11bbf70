"""The whole job in a few steps of each part: every part runs, the report shows them, and a second run does nothing
again.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lwd_jax.cli import main
from lwd_jax.report.pipeline import open_models

# Compiling is most of a run of few steps: one device, and as little optimisation as there is.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
PICTURES = {
    "photographs", "saliency_and_masks", "supervised_fraction", "reconstructions", "pooled", "spectrum", "stage1_loss",
    "stage2_loss", "loss_by_time", "samples",
}  # fmt: skip


def lwd(*words):
    command = [sys.executable, "-m", "lwd_jax.cli", "quickstart", "--fast", *map(str, words)]
    return subprocess.run(command, env=os.environ | QUICK, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_quickstart_from_photographs_to_report(tmp_path):
    workdir = tmp_path / "run"
    ran = lwd("--workdir", workdir)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert "report.html" in ran.stdout.splitlines()[-2]

    page = (workdir / "report.html").read_text()
    assert {path.stem for path in (workdir / "pictures").iterdir()} == PICTURES
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "What it cannot show" in page and "hashed_words" in ran.stdout
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

    again = lwd("--workdir", workdir)
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout.count("(done before)") == 11  # all but the report


def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, capsys):
    assert main(["quickstart", "--workdir", str(tmp_path / "run"), "--images", str(tmp_path / "missing")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_workdir_keeps_to_its_photographs(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/source.json").write_text(json.dumps({"images": "/elsewhere", "fast": False}))
    assert main(["quickstart", "--workdir", str(tmp_path / "run")]) == 2
    assert "name a new --workdir" in capsys.readouterr().err
