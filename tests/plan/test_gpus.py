"""Laws of programs for GPUs, compiled where there is none; only where the extra [cuda] is installed."""

import pytest
from tiny_runs import TINY

from lwd_jax.cli.plan import MAKERS
from lwd_jax.plan import gpus
from lwd_jax.plan.compile import plan_program
from lwd_jax.plan.layout import compile_whole
from lwd_jax.plan.programs import mesh_of, planned
from lwd_jax.plan.topology import open_topology

pytestmark = pytest.mark.skipif(not gpus.has_compiler(), reason="needs the extra [cuda]")


@pytest.fixture(scope="module")
def step():
    """The train step on eight H100: (topology, program, layout)."""
    topology = open_topology("h100:8")
    program = planned(TINY, mesh_of(TINY, topology), "gpu", MAKERS, "train")
    return topology, program, compile_whole(program, topology)


def test_the_state_is_updated_in_place(step):
    """What is computed of the state lies where the old one lay, and no conditional copies it on its way there."""
    memory, text = step[2]
    assert memory.outputs < 0.01 * memory.arguments and " conditional(" not in text


def test_attention_is_cudnns(step):
    assert "__cudnn$fmha" in step[2].text


def test_memory_and_traffic_are_known():
    found = plan_program(TINY, open_topology("h200:8"), MAKERS, "train", fresh=True)
    assert found.missing == "" and found.peak > found.resident and found.moved > 0
    assert {row.axes for row in found.traffic} >= {"fsdp"}
