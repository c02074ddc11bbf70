"""Laws: what is planned is what the run compiles; what is donated is counted once."""

import math

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import STAGE1, TINY

from lwd_jax.cli.plan import MAKERS
from lwd_jax.errors import UserError
from lwd_jax.objective import lpips
from lwd_jax.plan import compile as plan
from lwd_jax.plan import layout
from lwd_jax.plan.compile import plan_program
from lwd_jax.plan.programs import abstract_stage, names_of, planned
from lwd_jax.plan.topology import open_topology, parse


def test_donated_memory_is_counted_once():
    """A state of 4 MiB goes in and comes out in the same place, beside 1 MiB of something new."""
    state, new = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), 1 << 18
    step = jax.jit(lambda x: (x * 2 + 1, jnp.full(new, x[0, 0])), donate_argnums=0)
    memory = layout._analysed(step.lower(state).compile())
    assert (memory.arguments, memory.outputs) == (4 << 20, pytest.approx(1 << 20, abs=256))
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries + memory.code


@pytest.mark.parametrize(
    ("said", "peak"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.", 21.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.00M of 16.00M vmem.", None),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_what_the_compiler_refuses_is_told(said, peak):
    topology = open_topology("cpu:8")._replace(chip=parse("v5e:2x4").chip)

    def refuse():
        raise jax.errors.JaxRuntimeError(said)

    program = planned(TINY, plan.mesh_of(TINY, topology), "cpu", MAKERS, "decode")._replace(lower=refuse)
    found = plan.compile_program(program, plan.mesh_of(TINY, topology), topology)
    assert (found.peak, found.memory) == (peak, None)
    assert found.fits(topology) is (None if peak is None else False)
    assert (said[:20] in found.missing) is (peak is None)


def test_the_train_step_is_the_one_of_the_run():
    """It takes the state of which the plan tells the bytes, donated; what it computes holds the recomputation."""
    topology = open_topology("cpu:8")
    step = planned(TINY, plan.mesh_of(TINY, topology), "cpu", MAKERS, "train")
    found = [leaf for leaf in jax.tree.leaves(step.lower().args_info) if leaf.donated]
    assert len(found) == len(jax.tree.leaves(step.arguments[0]))
    state, batch = (plan.resident_bytes(part) for part in step.arguments)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.arguments[0].params))
    assert 4 * 4 * weights / 4 < state < 4 * 4 * weights and batch > 0  # weights, moments, average; over fsdp 4
    assert step.count().total == pytest.approx(4 / 3 * step.model(), rel=0.1)


@pytest.fixture(scope="module")
def sampled():
    return plan_program(TINY, open_topology("cpu:8"), MAKERS, "sample")


def test_arguments_are_those_of_shape_evaluation(sampled):
    assert sampled.memory.arguments == pytest.approx(sampled.resident, rel=0.01)
    assert sampled.peak > sampled.resident
    assert sampled.missing == "" and sampled.seconds > 0


def test_the_parameters_are_gathered_over_fsdp(sampled):
    """Bytes by kind and axis come from the compiled text; nothing crosses `data` but what the halves exchange."""
    assert sum(row.sent for row in sampled.traffic if row.axes == "fsdp") > 0
    assert {row.axes for row in sampled.traffic} <= {"data", "fsdp", "data+fsdp"}


@pytest.mark.parametrize("name", ["encode", "sample", "decode"])
def test_what_runs_forward_is_evaluated_by_shape(name):
    """One picture for each of eight places; nothing is compiled without devices, and the table says so."""
    topology = parse("cpu:8")._replace(missing="no compiler")
    found = plan_program(TINY, topology, MAKERS, name)
    assert (found.pictures, found.memory, found.peak, found.missing) == (8, None, None, "no compiler")
    assert found.resident > 0
    # Two halves of guidance, three steps; an autoencoder's formula is the count itself.
    assert found.counted.total == pytest.approx(found.model, rel=1e-9)


def test_lpips_is_planned_without_its_weights(monkeypatch):
    monkeypatch.setattr(lpips, "_weights", None)  # nobody reads them
    distance, picture = abstract_stage(STAGE1).loss.args[0], jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(lambda distance, x: distance(x, x), distance, picture).shape == (2,)
    sizes = {name: leaf.shape for name, leaf in distance.args[0].items()}
    assert sizes == lpips.shapes()


def test_the_programs_of_a_stage():
    assert names_of(2, "all") == ("train", "encode", "sample", "decode")
    assert names_of(2, "sample") == ("sample", "decode")
    assert names_of(1, "all") == ("train", "encode", "decode")
    with pytest.raises(UserError, match="stage 1 has no program 'sample'"):
        names_of(1, "sample")


def test_a_mesh_of_another_size_is_told():
    with pytest.raises(UserError, match="mesh"):
        plan_program(TINY, parse("v5e:2x2"), MAKERS, "train")
