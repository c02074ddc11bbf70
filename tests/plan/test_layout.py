"""Laws: a program laid out early is the one that is compiled to the end, but for its code; whatever becomes of the
process that does it, there is an answer and nothing of it is left.
"""

import dataclasses
import os
import tempfile
from types import SimpleNamespace

import jax
import pytest
from etils.epath import Path
from tiny_runs import TINY

from lwd_jax.cli.plan import MAKERS
from lwd_jax.errors import UserError
from lwd_jax.plan import layout
from lwd_jax.plan.compile import NO_CODE, plan_program
from lwd_jax.plan.layout import compile_whole, lay_out, read_layout
from lwd_jax.plan.topology import open_topology, parse

REPORT = "Memory Space: default (color=0)\nTotal bytes: {} (5KiB)\nMemory Space: vmem (color=1)\nTotal bytes: 9999999\n"
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 1000, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <3 copy.1 @0> (size=1000,offset=0): f32[250]
allocation 2: size 200, parameter 1, shape |f32[50]| at ShapeIndex {}:
allocation 3: size 100, output shape is |(f32[250], f32[8])|, maybe-live-out:
allocation 4: size 66000, color 1, preallocated-temp:
allocation 5: size 3000, preallocated-temp:
"""
ENDINGS = {
    "-memory-usage-report.txt": REPORT.format(5000),
    "-buffer-assignment.txt": ASSIGNMENT,
    ".txt": "HloModule jit_step",
    "_after_buffer_assignment.txt": "HloModule jit_step",
}


def write(folder: Path, module: str, endings: dict[str, str]) -> None:
    for ending, text in endings.items():
        (folder / f"module_0003.{module}.cl_9.after_optimizations{ending}").write_text(text)


def test_what_the_compiler_wrote_is_read(tmp_path):
    """What is donated is an argument, and no output; other memories do not count; another module is another's."""
    folder = Path(tmp_path)
    write(folder, "jit_seed", {ending: "" for ending in ENDINGS})
    assert read_layout(folder, "jit_step") is None
    write(folder, "jit_step", ENDINGS)
    found = read_layout(folder, "jit_step")
    assert dataclasses.astuple(found.memory) == (1200, 100, 3700, None) and found.text == "HloModule jit_step"
    (folder / "module_0003.jit_step.cl_9.after_codegen.txt").write_text("with cycles")
    assert read_layout(folder, "jit_step")._replace(text="") == found._replace(text="")
    assert read_layout(folder, "jit_step").text == "with cycles"


def test_it_is_read_once_it_is_whole(tmp_path, monkeypatch):
    """In the order in which the compiler writes: nothing is taken before the last file; another's last is not it."""
    folder, steps = Path(tmp_path), iter([*ENDINGS])

    def poll(_):
        write(folder, "jit_other", ENDINGS)
        ending = next(steps)
        write(folder, "jit_step", {ending: ENDINGS[ending]})
        return False

    answers = SimpleNamespace(poll=lambda _: True, recv=lambda: setattr(answers, "poll", poll) or "jit_step")
    assert layout._wait(answers, folder) == read_layout(folder, "jit_step")
    assert list(steps) == []


@pytest.mark.parametrize("endings", [ENDINGS, {}], ids=["reports", "none"])
def test_a_whole_program_has_its_code(endings):
    """Where the compiler writes no files, memory_analysis is what is known. Nothing of the files is left."""
    folders, topology = [], open_topology("cpu:8")._replace(chip=parse("v5e:2x4").chip, name="v5e:2x4")
    sizes = {"argument": 1000, "output": 900, "alias": 800, "temp": 77, "generated_code": 60}
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": n for name, n in sizes.items()})

    def compiled(compiler_options):
        folders.append(Path(compiler_options["xla_dump_to"]))
        write(folders[0], "jit_step", endings)
        return SimpleNamespace(memory_analysis=lambda: analysis)

    lowered = SimpleNamespace(compile=compiled, compiler_ir=lambda: named("jit_step"))
    found = compile_whole(SimpleNamespace(lower=lambda: lowered), topology)
    assert dataclasses.astuple(found.memory) == ((1200, 100, 3700, 60) if endings else (1000, 100, 77, 60))
    assert found.text == endings.get(".txt", "") and not folders[0].exists()


def named(module: str):
    return SimpleNamespace(operation=SimpleNamespace(attributes={"sym_name": SimpleNamespace(value=module)}))


class Refusing:
    """A program that the compiler does not take."""

    def lower(self, *given):
        return SimpleNamespace(compiler_ir=lambda: named("jit_refused"), compile=self.compile)

    def compile(self, compiler_options):
        assert Path(compiler_options["xla_dump_to"]).is_dir()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 21.50G of 15.75G hbm.")


def refusing(module):
    return Refusing()


def dying(module):
    os.kill(os.getpid(), 9)


def ending(module):
    os._exit(3)


@pytest.mark.parametrize(
    ("decoder", "error", "said"),
    [
        (refusing, jax.errors.JaxRuntimeError, "21.50G"),
        (dying, UserError, "exit code -9 .* enough memory"),
        (ending, UserError, "exit code 3 and laid nothing out.$"),
    ],
)
def test_what_becomes_of_the_process_is_told(decoder, error, said, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error, match=said):
        lay_out(TINY, open_topology("cpu:8"), MAKERS._replace(decoder=decoder), "decode")
    assert list(tmp_path.iterdir()) == []


def test_an_early_layout_is_that_of_the_whole_program(monkeypatch, tmp_path):
    """And is taken for a whole one in nobody's stead, while a whole one is kept for both."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    topology = open_topology("v5e:2x4")
    early = plan_program(TINY, topology, MAKERS, "decode", fast=True)
    whole = plan_program(TINY, topology, MAKERS, "decode")
    assert early.memory == dataclasses.replace(whole.memory, code=None) and whole.memory.code > 0
    assert (early.traffic, early.moved) == (whole.traffic, whole.moved)
    assert (early.cycles, early.missing, whole.missing) == (0.0, NO_CODE, "") and whole.cycles > 0
    assert whole.peak > whole.memory.arguments >= whole.resident and whole.memory.temporaries > 0
    assert plan_program(TINY, topology, MAKERS, "decode", fast=True) == whole
