"""Law: what of every config is split how over the slice that its docstring names, as written in golden/*.txt.

`python tests/parallel/test_golden.py --write` writes the files anew; read their difference before it is committed.
"""

import functools
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import jax
import pytest

from lwd_jax.cli.config_flag import read_config
from lwd_jax.parallel import rules
from lwd_jax.parallel.mesh import abstract_mesh, mesh_shape
from lwd_jax.parallel.rules import SMALL, batch_shardings, path_string
from lwd_jax.plan.programs import abstract_stage, placed
from lwd_jax.plan.topology import parse
from lwd_jax.train.program import abstract_state
from lwd_jax.train.state import state_shardings

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.py") if not file.stem.startswith("quickstart"))
SLICE = re.compile(r"Slice: (\S+) \((\d+) chips\)")
# Whole on every chip although over SMALL: biases stacked over the blocks of a scan. Each block's own is far below it
# (held below), and is needed whole for a moment's addition: gathering it block by block would cost more than it saves.
STACKED_BIAS = re.compile(r"blocks/.*/bias$")


class Evaluated:
    """A config's state and batch on its slice: ShapeDtypeStructs with layouts."""

    def __init__(self, name: str):
        file = CONFIGS / f"{name}.py"
        self.config = read_config(str(file), [])
        topology, chips = SLICE.search(file.read_text()).groups()
        assert parse(topology).chips == int(chips)
        self.topology, self.mesh = topology, abstract_mesh(mesh_shape(self.config.mesh, int(chips)))
        stage = abstract_stage(self.config)
        state = abstract_state(self.config, stage)
        self.state = placed(state, state_shardings(state, self.mesh))
        self.batch = placed(stage.batch, batch_shardings(stage.batch, self.mesh))


evaluated = functools.cache(Evaluated)


def whole(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def a_chip(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def layout(leaf) -> str:
    """As "(-, fsdp, tensor)", axes of one device included: they are what a larger mesh would split."""
    axes = ["+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in leaf.sharding.spec]
    return f"({', '.join(axes)})" if any(axis != "-" for axis in axes) else "whole"


def table_of(tree) -> list[tuple[str, int, str, int]]:
    """(pattern, how many leaves, layout, bytes a chip) of leaves that are alike but for numbers in their path."""
    found = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[re.sub(r"\d+", "*", path_string(path)), layout(leaf)].append(leaf)
    return [(pattern, len(of), how, sum(map(a_chip, of))) for (pattern, how), of in found.items()]


def text_of(name: str) -> str:
    found = evaluated(name)
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.shape.items())
    table = [("bytes a chip", "leaves", "layout", "parameter")]
    table += [(f"{size:,}", str(count), how, pattern) for pattern, count, how, size in table_of(found.state.params)]
    table += [(f"{size:,}", str(count), how, f"batch: {part}") for part, count, how, size in table_of(found.batch)]
    for part in ("params", "opt_state", "ema"):
        leaves = jax.tree.leaves(getattr(found.state, part))
        table.append((f"{sum(map(a_chip, leaves)):,}", str(len(leaves)), "", f"all of {part}"))
    both = jax.tree.leaves((found.state, found.batch))
    table.append((f"{sum(map(a_chip, both)):,}", str(len(both)), "", "state and batch"))
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [
        "  ".join((size.rjust(widths[0]), count.rjust(widths[1]), how.ljust(widths[2]), pattern))
        for size, count, how, pattern in table
    ]
    return "\n".join([f"{name} on {found.topology}: {mesh}", "", *lines, ""])


def test_every_config_has_its_file():
    assert sorted(file.stem for file in GOLDEN.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_those_of_the_golden_file(name):
    again = "python tests/parallel/test_golden.py --write"
    assert text_of(name) == (GOLDEN / f"{name}.txt").read_text(), f"If this was meant: {again}"


def unsplit(found: Evaluated) -> dict[str, jax.ShapeDtypeStruct]:
    """What of the state is at least SMALL and whole on every chip."""
    leaves = jax.tree_util.tree_leaves_with_path(found.state)
    large = {path_string(path): leaf for path, leaf in leaves if whole(leaf) >= SMALL}
    return {path: leaf for path, leaf in large.items() if a_chip(leaf) == whole(leaf)}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_large_is_silently_whole(name):
    """Where parameters are to be split at all: fsdp 1 says that they are not, and the docstring tells it."""
    found = evaluated(name)
    if found.mesh.shape["fsdp"] == 1:
        assert "whole parameters on every chip" in (CONFIGS / f"{name}.py").read_text()
        return
    for path, leaf in unsplit(found).items():
        assert STACKED_BIAS.search(path), f"{path} {leaf.shape} is whole on every chip"
        assert whole(leaf) / leaf.shape[0] < SMALL / 8


def test_a_kernel_that_is_whole_would_be_found(monkeypatch):
    """The control: a rule that leaves one kernel whole is seen, in the parameters, moments and average."""
    careless = (rules.Rule(r"picture/up/kernel$", ((),)), *rules.RULES)
    monkeypatch.setattr(rules, "RULES", careless)
    found = Evaluated("stage2_sd3_1024")
    named = [path for path in unsplit(found) if path.endswith("joint_blocks/picture/up/kernel")]
    assert len(named) == 4 and not any(STACKED_BIAS.search(path) for path in named)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    GOLDEN.mkdir(exist_ok=True)
    for each in NAMES:
        (GOLDEN / f"{each}.txt").write_text(text_of(each))
        print(GOLDEN / f"{each}.txt")
