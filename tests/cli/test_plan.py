"""`lwd plan`: the table and the JSON of real runs, and mistakes in one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest

from lwd_jax.cli import main, plan
from lwd_jax.plan import flags, search, topology
from lwd_jax.plan.compile import plan_program

CONFIGS = Path(__file__).parents[2] / "configs"
SD3 = f"--config={CONFIGS / 'stage2_sd3_1024.py'}"
TINY = f"--config={CONFIGS / 'quickstart_stage1.py'}"
TINY2 = f"--config={CONFIGS / 'quickstart_stage2.py'}"


def test_without_libtpu_the_state_is_evaluated_by_shape(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    file = tmp_path / "plan.json"
    assert main(["plan", SD3, "--topology", "v5e:4x4", "--program", "encode", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "16 chips on 4 hosts; mesh data 1, fsdp 16, context 1, tensor 1" in shown
    assert "Missing: Compiling for a TPU slice needs its compiler: pip install libtpu." in shown
    plan = json.loads(file.read_text())
    (encode,) = plan["programs"]
    # 83,819,683 parameters in float32 whole on every chip, and one picture.
    assert encode["resident"] == pytest.approx(83_819_683 * 4 + 1024 * 1024 * 3, rel=1e-6)
    assert encode["peak"] is None and encode["fits"] is None
    assert encode["roofline"]["binds"] == "compute"


def test_gpus_without_cudnn_are_evaluated_by_shape(monkeypatch, capsys):
    """jax refuses to trace cuDNN's attention where there is no cuDNN."""
    monkeypatch.setattr(topology.gpus, "has_compiler", lambda: False)
    words = ["--config.data.batch_size=1", "--config.mesh.fsdp=1", "--topology", "h100:1", "--program", "train"]
    assert main(["plan", SD3, *words]) == 0
    shown = capsys.readouterr().out
    assert "Missing: Compiling for h100:1 needs 1 such GPUs here, or their compiler" in shown
    assert "state and batch, by shape  30.2" in shown


def test_a_program_compiled_here(capsys, tmp_path):
    file = tmp_path / "plan.json"
    words = ["plan", TINY, "--topology", "cpu:2", "--program", "decode", "--json", str(file)]
    assert main([*words, "--config.resolution=64", "--config.data.batch_size=2", "--config.mesh.data=2"]) == 0
    shown = capsys.readouterr().out
    assert "compiled decode in" in shown and "temporaries" in shown
    (decode,) = json.loads(file.read_text())["programs"]
    assert 0 < decode["memory"]["arguments"] < decode["resident"]  # the encoder lies there too, and is not used
    assert decode["peak"] == pytest.approx(sum(decode["memory"].values()))
    assert decode["traffic"] == []  # every picture is its own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v9:4x4"], "no chip kind 'v9'"),
        (["--topology", "v5e:4"], "2 sides"),
        (["--topology", "v5e:2x2"], "mesh"),
        (["--topology", "v5e:4x4", "--json", "/nowhere/plan.json"], "no folder '/nowhere'"),
        (["--topology", "v5e:4x4", "--json", "/tmp"], "'/tmp' is a folder; name a file"),
        (["--topology", "v5e:4x4", "--config.mesh.fdsp=16"], "Did you mean 'fsdp'"),
    ],
)
def test_mistakes(words, said, monkeypatch, capsys):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    assert main(["plan", SD3, *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lwd: ") and message.count("\n") == 1
    assert said in message


def test_fast_is_of_the_tpu_compiler(monkeypatch, capsys):
    """It reaches what compiles, of a sweep and of a suggestion too; elsewhere it is a mistake."""
    assert main(["plan", TINY2, "--topology", "cpu:2", "--fast"]) == 2
    assert "--fast is of the TPU compiler; cpu:2" in capsys.readouterr().err
    asked = []

    def planned(config, topology, makers, name, fresh=False, fast=False):
        asked.append((name, fresh, fast))
        return dataclasses.replace(plan_program(config, topology, makers, name), peak=1e12)  # fits nowhere

    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    for module in (plan, search):
        monkeypatch.setattr(module, "plan_program", planned)
    words = [TINY2, "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=1", "--topology", "v5e:2x2"]
    assert main(["plan", *words, "--program", "train", "--suggest", "--fast", "--fresh"]) == 0
    assert len(asked) > 1 and set(asked) == {("train", True, True)}


def test_where_there_is_nothing_to_suggest_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    words = [TINY2, "--config.mesh.data=1", "--config.mesh.fsdp=1", "--topology", "v5e:1x1", "--program", "train"]
    assert main(["plan", *words, "--suggest"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing to suggest: whether the train step fits is not known." in shown
    assert "v5e:1x1, 1 chip on 1 host;" in shown


def test_stage_1_does_not_sample(capsys):
    assert main(["plan", TINY, "--topology", "cpu:1", "--program", "sample"]) == 2
    assert "stage 1 has no program 'sample'" in capsys.readouterr().err


def test_a_sweep_without_libtpu_is_by_estimate(monkeypatch, capsys, tmp_path):
    """The config is of one device: on another slice every axis is written. Nothing but shapes is evaluated."""
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    file = tmp_path / "plan.json"
    one = ["--config.mesh.data=1", "--config.mesh.fsdp=1"]
    assert main(["plan", TINY2, *one, "--topology", "v5e:2x2", "--sweep", "3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Missing: Compiling for a TPU slice needs its compiler: pip install libtpu." in shown
    found = json.loads(file.read_text())["sweep"]
    assert len(found["tried"]) == 3 and found["candidates"] > 3
    words = found["best"]["words"]
    assert "--config.mesh.fsdp=" in words and f"Best, add: {words}" in shown
    assert f"{words} --workdir=WORKDIR, on v5e:2x2" in shown  # what to run next has them
    assert found["best"]["chip_hours"] > 0 and "Chip-hours, at least:" in shown
    assert all(row["result"]["peak"] is None and row["result"]["roofline"]["least"] > 0 for row in found["tried"])


@pytest.mark.heavy
def test_a_sweep_compiles(monkeypatch, capsys, tmp_path):
    """On devices of this machine, of which no memory and no speed is known: what is tried is compiled, the config as it
    is first, and a row says what it takes.
    """
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    monkeypatch.setitem(flags.FLAGS, "cpu", quick)
    file = tmp_path / "plan.json"
    small = ["--config.resolution=32", "--config.data.batch_size=2", "--config.mesh.data=2", "--config.mesh.fsdp=1"]
    assert main(["plan", TINY2, *small, "--topology", "cpu:2", "--sweep=1", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Memory and speed of cpu are not known" in shown and "Best: the config as it is." in shown
    plan = json.loads(file.read_text())
    assert plan["programs"] == []  # the sweep alone was asked for
    (tried,) = plan["sweep"]["tried"]
    assert tried["settings"] == {} and tried["batch"] == 2 and tried["result"]["seconds"] > 0
    assert tried["result"]["peak"] > 0.9 * tried["result"]["resident"]
    (row,) = [line for line in shown.splitlines() if line.startswith("2x1x1x1")]
    assert "GiB" in row


def test_a_sweep_of_nothing_is_told(capsys):
    assert main(["plan", TINY2, "--topology", "cpu:1", "--sweep", "0"]) == 2
    assert "0 tries" in capsys.readouterr().err
