"""Laws: knobs keep the batch; a sweep tries what is possible, learns from the compiler, takes the fastest that fits."""

import dataclasses
import math

import jax
import pytest
import tiny_runs
from tiny_runs import TINY

from lwd_jax.cli.plan import MAKERS
from lwd_jax.config import load_config
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import mesh_shape
from lwd_jax.plan import search
from lwd_jax.plan.compile import mesh_of, resident_bytes
from lwd_jax.plan.count import Operations
from lwd_jax.plan.estimate import estimate, evaluate_shapes, state_bytes
from lwd_jax.plan.programs import planned
from lwd_jax.plan.result import Memory, Result, limit
from lwd_jax.plan.roofline import roofline
from lwd_jax.plan.search import candidates, knobs, meshes, suggest, sweep, with_settings
from lwd_jax.plan.table import sweep_row
from lwd_jax.plan.topology import parse

REMATS = ("none", "attention", "full")
STAGE1 = with_settings(tiny_runs.STAGE1, {"reconstruction.lpips": 0.0, "reconstruction.alpha": 0.0})
V5E = parse("v5e:2x4")


@pytest.fixture(scope="module")
def shapes():
    return evaluate_shapes(TINY, "cpu", REMATS)


def with_chip(topology, **figures):
    return topology._replace(chip=dataclasses.replace(topology.chip, **figures))


# ------------------------------------------------------------------------------------------------------------- knobs


def test_knobs_keep_the_batch_and_the_chips():
    config = load_config({"stage": 2, "remat": "none", "data": {"batch_size": 64}, "mesh": {"data": 2, "fsdp": 8}})
    topology = parse("v5e:4x4")
    tried = list(knobs(config, topology))
    assert tried[0] == {"remat": "full"}
    assert tried[1:3] == [{"remat": "full", "optimizer.accumulate": n} for n in (2, 4)]
    assert [settings["mesh.context"] for settings in tried[3:]] == [2, 4, 8]
    for settings in tried[3:]:
        changed = with_settings(config, settings)
        data, fsdp, context, _ = mesh_shape(changed.mesh, 16)
        assert (data * fsdp * context, changed.data.batch_size) == (16, 64)
        assert 64 // changed.optimizer.accumulate == data * fsdp  # one picture at a time in each place
    assert config.remat == "none"  # the config given is as it was


def test_the_first_knob_that_fits_is_suggested(monkeypatch):
    """The compiler here says what a run takes: 20 GiB, 17 under full remat, half of it on two chips."""
    topology, tried = parse("v5e:4x4"), []

    def sized(config, topology, makers, name, fresh=False):
        size = (17 if config.remat == "full" else 20) / config.mesh.context * 2**30
        return Result(name, 16, {}, 0.0, 1.0, Operations(), memory=Memory(size, 0, 0), peak=size)

    monkeypatch.setattr(search, "plan_program", sized)
    config = load_config({"stage": 2, "remat": "none", "data": {"batch_size": 16}, "mesh": {"fsdp": 16}})
    found = suggest(config, topology, MAKERS, tried.append)
    assert tried[0].words == "--config.remat=full" and found is tried[-1]
    assert "--config.mesh.context=2" in found.words and "--config.mesh.fsdp=8" in found.words
    assert found.result.fits(topology)
    assert len(tried) == 2


# ---------------------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("mesh", [(2, 4, 1, 1), (1, 2, 2, 2)])
def test_an_estimate_is_the_program_that_would_be_compiled(shapes, mesh):
    """The same bytes on every chip and the same operations, of which only shapes were evaluated, for one picture."""
    config = with_settings(TINY, dict(zip(("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor"), mesh)))
    abstract = mesh_of(config, V5E)
    found = estimate(config, V5E, shapes, abstract, state_bytes(shapes, abstract)).result
    program = planned(config, abstract, "cpu", MAKERS, "train")
    assert found.resident == resident_bytes(program.arguments)
    assert found.counted.total == pytest.approx(program.count().total, rel=1e-6)
    assert found.model == pytest.approx(program.model(), rel=1e-6)


def test_what_remat_saves_is_less_and_costs_more(shapes):
    saved = [shapes.work[remat].saved for remat in REMATS]
    computed = [shapes.work[remat].operations.total for remat in REMATS]
    assert saved[0] > saved[1] >= saved[2] > 0
    assert computed[0] < computed[1] <= computed[2]
    # Under full remat every block's input waits, in bfloat16; what lies around the blocks is as large again.
    blocks = shapes.tokens.layers * shapes.tokens.count * shapes.tokens.width * 2
    assert blocks < saved[2] < 4 * blocks


def test_traffic_of_an_estimate_by_hand(shapes):
    """Eight-way fsdp: weights in bfloat16 are gathered twice; gradients, those of the kernels in bfloat16 and the others
    in float32, are scattered once."""
    config = with_settings(TINY, {"mesh.data": 1, "mesh.fsdp": 8})
    abstract = mesh_of(config, V5E)
    found = estimate(config, V5E, shapes, abstract, state_bytes(shapes, abstract)).result
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.state.params))
    sent = {(row.kind, row.axes): row.sent for row in found.traffic}
    assert set(sent) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
    assert sent["all-gather", "fsdp"] == pytest.approx(2 * 2 * weights * 7 / 8)
    assert sent["reduce-scatter", "fsdp"] == pytest.approx(shapes.trained * 7 / 8)
    assert 2 * weights < shapes.trained < 3 * weights and shapes.summed == pytest.approx(4 * weights, rel=0.1)


def test_stage_1_is_estimated():
    found = evaluate_shapes(STAGE1, "cpu", ("none", "full"))
    assert found.work["none"].saved > found.work["full"].saved > 0
    left, pruned = candidates(STAGE1, V5E, found)
    assert {candidate.estimate.result.mesh["tensor"] for candidate in left} == {1}
    assert pruned["heads do not divide over tensor"] == 10  # the autoencoder's attention has one head


# --------------------------------------------------------------------------------------------------------- candidates


def test_meshes_are_all_of_the_chips():
    found = list(meshes(8))
    assert len(found) == len(set(found)) == 20 and {math.prod(sizes) for sizes in found} == {8}
    assert (1, 3, 2, 1) in set(meshes(6))


def test_candidates_divide_and_write_what_differs(shapes):
    left, pruned = candidates(TINY, V5E, shapes)
    asis = [candidate for candidate in left if not candidate.settings]
    assert [candidate.config for candidate in asis] == [TINY]
    for candidate in left:
        data, fsdp, context, tensor = mesh_shape(candidate.config.mesh, 8)
        assert candidate.config.data.batch_size % (data * fsdp) == 0
        assert shapes.heads % tensor == 0 and shapes.rows % context == 0
        assert with_settings(TINY, candidate.settings) == candidate.config
        assert candidate.estimate.result.pictures == candidate.config.data.batch_size
    batches = {candidate.config.data.batch_size for candidate in left if candidate.config.mesh == TINY.mesh}
    assert batches == {8 * 2**power for power in range(7)}
    assert set(pruned) <= {"heads do not divide over tensor", "a picture's rows do not divide over context"}


def test_what_is_too_large_by_shape_is_not_compiled(shapes):
    whole = state_bytes(shapes, mesh_of(with_settings(TINY, {"mesh.data": 8, "mesh.fsdp": 1}), V5E))
    small = with_chip(V5E, hbm=whole / 3)
    left, pruned = candidates(TINY, small, shapes)
    assert pruned["the state alone is too large for a chip"] > 0
    assert pruned["state and batch alone are too large for a chip"] > 0
    assert all(candidate.estimate.result.resident <= limit(small) for candidate in left)
    assert all(candidate.estimate.result.mesh["data"] < 8 for candidate in left)


def test_slices_are_told_apart_along_data(shapes):
    left, _ = candidates(TINY, parse("v5e:2x2", 2), shapes)
    assert {candidate.estimate.result.mesh["data"] for candidate in left} == {2, 4, 8}
    assert all(any(row.axes == "slices" for row in candidate.estimate.result.traffic) for candidate in left)


# -------------------------------------------------------------------------------------------------------------- sweep


@pytest.fixture
def compiled(monkeypatch, shapes):
    """A compiler that finds what is estimated, but that "none" saves thirty times as much; -> what it was asked for."""
    asked = []

    def plan_program(config, topology, makers, name, fresh=False):
        mesh = mesh_of(config, topology._replace(devices=None))
        guess = estimate(config, topology, shapes, mesh, state_bytes(shapes, mesh))
        size = guess.temporaries * (30 if config.remat == "none" else 1)
        memory = Memory(guess.result.resident, 0.0, size)
        asked.append(config)
        return dataclasses.replace(guess.result, memory=memory, peak=memory.peak, seconds=1.0)

    monkeypatch.setattr(search, "evaluate_shapes", lambda *_: shapes)
    monkeypatch.setattr(search, "plan_program", plan_program)
    return asked


def slow_chip(shapes, room: float):
    """Eight chips bound by arithmetic, with room for the state and for `room` pictures saved under "none"."""
    mesh = mesh_of(with_settings(TINY, {"mesh.data": 1, "mesh.fsdp": 8}), V5E)
    hbm = (state_bytes(shapes, mesh) + shapes.trained / 8 + room * shapes.work["none"].saved) / 0.9
    return with_chip(V5E, hbm=hbm, peak=1e9)._replace(devices=[object()])


def test_the_fastest_that_fits_is_found(compiled, shapes):
    """Room for two pictures without remat, says the estimate; the compiler finds that they take thirty times as much,
    and one fits nowhere, not even over all chips: the sweep turns to the next policy, and keeps the batch, for more of
    it is no faster.
    """
    topology, seen = slow_chip(shapes, 2.0), []
    config = with_settings(TINY, {"remat": "full"})
    found = sweep(config, topology, MAKERS, 6, seen.append)
    assert seen == found.tried and len(seen) == len(compiled) <= 6
    assert seen[0].settings == {} and compiled[0] == config
    assert seen[1].config.remat == "none" and seen[1].result.fits(topology) is False
    fastest = max(
        (each for each in seen if each.result.fits(topology)),
        key=lambda each: roofline(each.result, topology).pictures_per_second,
    )
    cost = [1 / roofline(each.result, topology).pictures_per_second for each in (found.best, fastest)]
    assert found.best.result.fits(topology) and cost[0] == pytest.approx(cost[1], rel=0.02)
    assert found.best.config.remat == "attention" and found.best.config.data.batch_size == 8
    assert found.missing == "" and found.candidates > 100


def test_no_more_is_compiled_than_was_asked_for(compiled, shapes):
    found = sweep(TINY, slow_chip(shapes, 100.0), MAKERS, 1, lambda tried: None)
    assert len(compiled) == 1 and found.best.settings == {}


def test_where_nothing_fits_there_is_no_best(compiled, shapes, monkeypatch):
    topology = slow_chip(shapes, 1.0)
    refused = Result("train", 8, {"data": 8}, 0.0, 1.0, Operations(), peak=None, missing="Does not compile: no")
    monkeypatch.setattr(search, "plan_program", lambda *_: refused)
    assert sweep(TINY, topology, MAKERS, 3, lambda tried: None).best is None


def test_what_turns_out_to_be_impossible_does_not_end_a_sweep(compiled, shapes, monkeypatch):
    compiles = search.plan_program

    def plan_program(config, *others):
        if config != TINY:
            raise UserError("This is not possible.")
        return compiles(config, *others)

    monkeypatch.setattr(search, "plan_program", plan_program)
    topology = slow_chip(shapes, 100.0)
    found = sweep(TINY, topology, MAKERS, 4, lambda tried: None)
    assert found.best.settings == {} and len(found.tried) == 4
    assert all(sweep_row(each, topology).endswith("  This is not possible.") for each in found.tried[1:])


def test_a_topology_without_a_possible_mesh_is_told(compiled):
    with pytest.raises(UserError, match="possible on v5e:2x4: .*the state alone is too large for a chip"):
        sweep(TINY, with_chip(V5E, hbm=1e3), MAKERS, 3, lambda tried: None)


def test_without_a_compiler_the_order_is_by_estimate(compiled):
    topology = V5E._replace(missing="No compiler.")
    found = sweep(TINY, topology, MAKERS, 3, lambda tried: None)
    assert not compiled and len(found.tried) == 3 and found.best in found.tried
    assert all(each.result.peak is None for each in found.tried)
    assert found.missing.startswith("No compiler.") and "estimates" in found.missing
