"""Laws: every row of benchmarks/tpu_plan.py is a plan that `lwd plan` takes: its config resolves, its mesh has the
chips of its slice, and its batch divides.
"""

import sys
from pathlib import Path

import pytest

from lwd_jax.cli import parser_of
from lwd_jax.cli.config_flag import read_config
from lwd_jax.parallel.mesh import mesh_shape
from lwd_jax.plan.programs import names_of
from lwd_jax.plan.topology import parse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tpu_plan  # noqa: E402


@pytest.mark.parametrize("name", tpu_plan.ROWS)
def test_a_row_is_a_plan(name):
    row = tpu_plan.ROWS[name]
    words = tpu_plan.command(row, "plan.json")
    args, overrides = parser_of("plan").parse_known_args(words[words.index("plan") + 1 :])
    config = read_config(args.config, overrides)
    assert mesh_shape(config.mesh, parse(args.topology, args.num_slices).size) == row.mesh
    assert config.data.batch_size == row.batch and row.batch % (row.mesh[0] * row.mesh[1]) == 0
    assert names_of(config.stage, args.program)


def test_a_row_that_fails_is_told(capsys):
    row = tpu_plan.ROWS["sd3_1024"]._replace(topology="v5e:4")
    (line,) = tpu_plan._lines("sd3_1024", row, tpu_plan.plan(row))
    assert "FAILED" in line and "2 sides" in line


def test_the_verdict_is_of_both_limits():
    """Fits the chip, and stays under what the row promises."""
    row = tpu_plan.ROWS["sd3_1024"]
    program = {
        "program": "train",
        "peak": 2.5 * 2**30,
        "fits": True,
        "traffic": [{"sent": 3e9}],
        "memory": {"code": 9.0},
        "seconds": 9.0,
    }
    (line,) = tpu_plan._lines("sd3_1024", row, {"programs": [program]})
    assert "2.50 GiB a chip, at most 2.8: yes; 3.00 GB sent" in line and "compiled in 9 s" in line
    (line,) = tpu_plan._lines("sd3_1024", row, {"programs": [program | {"memory": {"code": None}}]})
    assert "laid out in 9 s" in line
    for changed in ({"peak": 2.9 * 2**30}, {"fits": False}):
        (line,) = tpu_plan._lines("sd3_1024", row, {"programs": [program | changed]})
        assert "at most 2.8: NO" in line
