"""Laws: bytes between chips, loops multiplied, are those counted by hand; so are the bytes of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lwd_jax.plan.hlo import Module, estimated_cycles, memory_bytes
from lwd_jax.plan.traffic import Traffic, axes_of, groups_of, traffic_of

SIZES = {"data": 2, "fsdp": 2, "context": 2}


def compiled_text(function, *shapes, specs=PartitionSpec()):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), tuple(SIZES))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*given).compile().as_text()


def by_name(rows: list[Traffic]) -> dict:
    return {(row.kind, row.axes): (row.count, row.sent) for row in rows}


def test_a_scan_of_sums_and_what_stands_around_it():
    """On every chip 6 rows of 128 float32: 3072 bytes."""

    def function(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "fsdp")), None

        x = jax.lax.scan(body, x, None, length=5)[0]
        both = jax.lax.all_gather(x, ("data", "context"), axis=0, tiled=True)
        moved = jax.lax.ppermute(jnp.cos(x), "data", [(0, 1), (1, 0)])
        swapped = jax.lax.all_to_all(jnp.tan(x), "context", 0, 1, tiled=True)
        return both.sum() + moved.sum() + swapped.sum()

    found = by_name(traffic_of(Module(compiled_text(function, (6, 128))), SIZES))
    assert found == {
        ("all-reduce", "fsdp"): (5, 5 * 2 * (1 / 2) * 3072),
        ("all-gather", "data+context"): (1, 3 * 3072),
        ("collective-permute", "data"): (1, 3072),
        ("all-to-all", "context"): (1, (1 / 2) * 3072),
    }


def test_loops_within_loops():
    def function(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, ("data", "fsdp", "context"))), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=4)[0]

    found = by_name(traffic_of(Module(compiled_text(function, (32,))), SIZES))
    assert found == {("all-reduce", "data+fsdp+context"): (12, pytest.approx(12 * 2 * (7 / 8) * 128))}


HAND = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered.all-reduce-scatter (p: f32[1024]) -> f32[128] {
  %p = f32[1024]{0} parameter(0)
  %all-reduce.9 = f32[1024]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[128]{0} dynamic-slice(%all-reduce.9, %zero), dynamic_slice_sizes={128}
}

%layer (p0: f32[10,256], p1: s32[], p2: f32[256]) -> f32[256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[256]{0} parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero.1), dynamic_slice_sizes={1,256}
  %flat = f32[256]{0} bitcast(%row)
  ROOT %scaled = f32[256]{0} multiply(%flat, %p2)
}

%update (q0: f32[10,256], q1: s32[], q2: f32[256]) -> f32[10,256] {
  %q0 = f32[10,256]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[256]{0} parameter(2)
  %row.1 = f32[1,256]{1,0} bitcast(%q2)
  %zero.2 = s32[] constant(0)
  ROOT %written = f32[10,256]{1,0} dynamic-update-slice(%q0, %row.1, %q1, %zero.2)
}

%body (state: (s32[], f32[256], f32[10,256])) -> (s32[], f32[256], f32[10,256]) {
  %state = (s32[], f32[256]{0}, /*index=2*/f32[10,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[256]{0} get-tuple-element(%state), index=1
  %all = f32[10,256]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[256]{0:T(256)} fusion(%all, %i, %x), kind=kLoop, calls=%layer, backend_config={"estimated_cycles":"500"}
  %all.1 = f32[10,256]{1,0} fusion(%all, %i, %y), kind=kLoop, calls=%update
  %start = (f32[256]{0}, f32[1024]{0}) all-gather-start(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = f32[1024]{0} all-gather-done(%start)
  %kept = f32[128]{0} fusion(%done), kind=kCustom, calls=%scattered.all-reduce-scatter
  ROOT %state.1 = (s32[], f32[256]{0}, f32[10,256]{1,0}) tuple(%next, %y, %all.1)
}

%condition (state.2: (s32[], f32[256], f32[10,256])) -> pred[] {
  %state.2 = (s32[], f32[256]{0}, f32[10,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.2), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[256], w: f32[10,256]) -> f32[256] {
  %x.1 = f32[256]{0} parameter(0)
  %w = f32[10,256]{1,0} parameter(1)
  %zero.3 = s32[] constant(0)
  %first = (s32[], f32[256]{0}, f32[10,256]{1,0}) tuple(%zero.3, %x.1, %w)
  %loop = (s32[], f32[256]{0}, f32[10,256]{1,0}) while(%first), condition=%condition, body=%body
  %x.2 = f32[256]{0} get-tuple-element(%loop), index=1
  %near = f32[256]{0:T(256)S(1)} copy(%x.2)
  %token = token[] after-all()
  %sent = (f32[256]{0}, u32[], token[]) send(%x.2, %token), channel_id=7
  %gone = token[] send-done(%sent), channel_id=7
  ROOT %result = f32[256]{0} negate(%near)
}
"""


def test_a_program_written_by_hand():
    """Asynchronous gathers are counted where they start, ten times; the fused sum and slice is a scatter."""
    found = by_name(traffic_of(Module(HAND), SIZES))
    assert found == {
        ("all-gather", "fsdp+context"): (10, 10 * 3 * 1024),
        ("reduce-scatter", "data+fsdp+context"): (10, 10 * (7 / 8) * 4096),
        ("send", "slices"): (1, 1024 + 0),
    }


def test_memory_of_a_program_written_by_hand():
    """A loop that takes one of ten rows moves a row each time; what lies in the fast memory does not count."""
    row, counter = 1024, 4
    layer = row + counter + row + row  # the row, its number, x; y
    update = counter + row + row  # the number, y; the row that is written
    gather = row
    scatter = 4096 + 512
    each = 3 * counter + layer + update + gather + scatter  # 3 of `next`: two read, one written
    once = row + row + row + 0  # the copy reads, the result is written, what is sent is read
    assert memory_bytes(Module(HAND)) == 10 * each + once


def test_cycles_are_multiplied():
    assert estimated_cycles(Module(HAND)) == 5000


def test_a_gather_that_goes_on_through_fusions_is_counted_where_it_begins():
    """As the TPU compiler writes it: begun outside of a loop, carried on in the loop's fusions, ended after it."""
    gather = (
        "(g: f32[256]) -> f32[1024] {\n  %g = f32[256]{0} parameter(0)\n"
        "  ROOT %all-gather.1 = f32[1024]{0} all-gather(%g), "
        'channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, frontend_attributes={chain_id="0"}\n}\n\n'
    )
    chain = f"%begin {gather}%go_on {gather}%body"
    goes_on = "%going = f32[1024]{0} fusion(%y), kind=kOutput, calls=%go_on\n  ROOT %state.1 ="
    begins = "%async-collective-start.1 = f32[1024]{0} fusion(%x.1), kind=kCustom, calls=%begin\n  %zero.3 ="
    text = HAND.replace("%body", chain, 1).replace("ROOT %state.1 =", goes_on).replace("%zero.3 =", begins)
    before, after = (by_name(traffic_of(Module(each), SIZES)) for each in (HAND, text))
    key = ("all-gather", "fsdp+context")
    assert after[key] == (before[key][0] + 1, before[key][1] + 3 * 1024)


def test_a_trip_count_that_is_written_down_goes_first():
    known = 'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    module = Module(HAND.replace("condition=%condition, body=%body", known))
    assert by_name(traffic_of(module, SIZES))["all-gather", "fsdp+context"] == (3, 3 * 3 * 1024)


def test_a_trip_count_that_is_nowhere_is_told():
    with pytest.raises(ValueError, match="trip count of loop"):
        traffic_of(Module(HAND.replace("s32[] constant(10)", "s32[] parameter(1)")), SIZES)


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
        ("channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups(attributes, groups):
    assert groups_of(attributes, 8) == groups


def test_groups_in_an_unknown_form_are_told():
    with pytest.raises(ValueError, match="cannot be read: replica_groups=new"):
        groups_of("replica_groups=new['a'=8] {'a'}, x=1", 8)


def test_axes():
    assert axes_of([[0, 1], [2, 3]], SIZES) == "context"
    assert axes_of([[0, 4], [1, 5]], SIZES) == "data"
    assert axes_of([[0, 2, 4, 6]], SIZES) == "data+fsdp"
    assert axes_of([[0], [1]], SIZES) == ""
