import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.parallel.rules import batch_shardings, param_shardings, place_batch, spec_of

MESH = make_mesh(configs.Mesh(data=1, fsdp=2, context=2, tensor=2))
F32 = 4
BOTH = ("fsdp", "context")


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("joint_blocks/picture/q/kernel", (24, 64, 64), P(None, BOTH, "tensor")),
        ("joint_blocks/picture/added_q/kernel", (24, 64, 64), P(None, BOTH, "tensor")),
        ("joint_blocks/text/out/kernel", (24, 64, 64), P(None, "tensor", BOTH)),
        ("mlp/up/kernel", (64, 256), P(BOTH, "tensor")),
        ("mlp/up/kernel", (66, 256), P("fsdp", "tensor")),  # context does not divide it
        ("mlp/down/kernel", (256, 64), P("tensor", BOTH)),
        ("mlp/down/lora_a", (256, 4), P(BOTH, None)),
        ("blocks/norm_q/scale", (24, 64), P()),
        ("blocks/q/bias", (24, 64), P()),
        ("decoder/conv_in/kernel", (3, 3, 16, 64), P(None, None, "fsdp", "tensor")),
        ("decoder/conv_out/kernel", (3, 3, 64, 3), P(None, None, "fsdp", None)),
        ("encoder/conv_in/kernel", (3, 3, 3, 64), P(None, None, None, "fsdp")),
        ("odd/conv/kernel", (3, 3, 3, 5), P()),  # small, and nothing divides: whole everywhere
        ("time/proj/kernel", (64, 64), P(BOTH, None)),
    ],
)
def test_layouts(path, shape, spec):
    assert spec_of(path, shape, F32, MESH) == spec


def test_without_context_there_is_no_such_axis():
    mesh = make_mesh(configs.Mesh(data=1, fsdp=4, context=1, tensor=2))
    assert spec_of("mlp/up/kernel", (64, 256), F32, mesh) == P("fsdp", "tensor")


def test_a_scanned_axis_is_never_split():
    assert spec_of("blocks/conv/kernel", (8, 3, 3, 64, 64), F32, MESH)[0] is None
    assert spec_of("blocks/q/kernel", (8, 64, 64), F32, MESH)[0] is None


def test_what_no_rule_names_raises():
    with pytest.raises(UserError, match="blocks/mystery"):
        spec_of("blocks/mystery", (64, 64), F32, MESH)


def test_a_large_parameter_that_does_not_divide_raises():
    with pytest.raises(UserError, match="big/q/kernel.*divide"):
        spec_of("big/q/kernel", (1025, 1023), F32, MESH)


def test_shards_lie_where_the_table_says():
    tree = {"blocks": {"q": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))}}}
    placed = jax.device_put(tree, param_shardings(tree, MESH))
    assert placed["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 2, 4)
    assert placed["blocks"]["q"]["bias"].addressable_shards[0].data.shape == (2, 8)


def _batch(shape):
    shapes = {"mean": shape, "pooled": (shape[0], 3)}
    return {name: jax.ShapeDtypeStruct(each, jnp.float32) for name, each in shapes.items()}


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((4, 8, 5, 16), P(("data", "fsdp"), "context")),
        ((4, 5, 8, 16), P(("data", "fsdp"), None, "context")),
        ((4, 5, 7, 16), P(("data", "fsdp"))),
    ],
)
def test_batches_are_split_over_pictures_and_height(shape, spec):
    shardings = batch_shardings(_batch(shape), MESH)
    assert shardings["mean"].spec == spec and shardings["pooled"].spec == P(("data", "fsdp"))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="3 pictures"):
        batch_shardings(_batch((3, 8, 8, 16)), MESH)


@pytest.mark.parametrize("sizes", [(2, 4, 1, 1), (2, 1, 4, 1), (1, 1, 8, 1)])
@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 6, 8, 2), (5, 7, 5, 1), (5, 9), (5,)])
@pytest.mark.parametrize("kind", [np.float32, np.bool_, np.uint32])
def test_rows_are_placed_as_the_whole_batch_would_be(sizes, shape, kind):
    mesh, random = make_mesh(configs.Mesh(*sizes)), np.random.default_rng(0)
    host, rows = random.integers(0, 100, shape).astype(kind), random.integers(0, 5, 8)
    placed, whole = place_batch(host, mesh, rows), place_batch(host[rows], mesh)
    np.testing.assert_array_equal(placed, host[rows])
    np.testing.assert_array_equal(whole, host[rows])
    assert placed.sharding == whole.sharding == batch_shardings({"": host[rows]}, mesh)[""]
    assert placed.dtype == kind and place_batch(None, mesh, rows) is None
