"""The benchmarks run, and refuse to time what does not agree."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import SD3

from lwd_jax.backbones import sd3

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import saliency  # noqa: E402
import step  # noqa: E402

ARGUMENTS = ["step.py", "--variant=small", "--resolution=64", "--batch=2", "--text=5", "--repeats=1"]


@pytest.fixture
def small(monkeypatch):
    """On one of the simulated devices: the batch does not divide over eight."""
    monkeypatch.setitem(sd3.VARIANTS, "small", SD3)
    monkeypatch.setattr(jax, "devices", lambda *_, devices=tuple(jax.devices()[:1]): list(devices))
    monkeypatch.setattr(sys, "argv", ARGUMENTS)


@pytest.mark.heavy
def test_step_against_pytorch(small, capsys):
    step.main()
    printed = capsys.readouterr().out
    assert "Masked against plain" in printed and "velocities" in printed and "gradients" in printed


@pytest.mark.heavy
def test_step_refuses_another_model(small, monkeypatch):
    """The control: times that the model is given wrongly."""
    right = step.TorchStep.velocity
    monkeypatch.setattr(step.TorchStep, "velocity", lambda self, z_t, t: right(self, z_t, 0.9 * t))
    with pytest.raises(SystemExit, match="velocities.*Nothing was timed"):
        step.main()


def test_contenders_of_the_saliency_agree():
    random = np.random.default_rng(0)
    z, t = random.standard_normal((2, 16, 24, 4)).astype(np.float32), np.array([0.4, 0.8], np.float32)
    found = {name: [convert(part) for part in run()] for name, (run, convert) in saliency.contenders(z, t).items()}
    for name, parts in found.items():
        for ours, theirs in zip(found["lwd_jax"], parts):
            np.testing.assert_allclose(ours, theirs, atol=2e-6, err_msg=name)
