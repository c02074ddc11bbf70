"""Laws: a table there and back is the identity, reads any sharding, and covers exactly or says what does not fit."""

import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwd_jax.errors import UserError
from lwd_jax.weights.layout import CONV, LINEAR, SAME, conv_as_linear, foreign_shape
from lwd_jax.weights.table import Row, cover, flat, nested, read, write

ROWS = [
    Row("in.weight", "in/kernel", conv_as_linear(2, 3)),
    Row("in.bias", "in/bias"),
    Row("blocks.{i}.q.weight", "blocks/q/kernel", LINEAR, start=1, count=3),
    Row("blocks.{i}.conv.weight", "blocks/conv/kernel", CONV, start=1, count=3),
    Row("blocks.0.q.weight", "first/q/kernel", LINEAR, older="blocks.0.query.weight"),
    Row("temperature", "temperature"),
]
SHAPES = {
    "in.weight": (5, 4, 2, 3),
    "in.bias": (5,),
    **{f"blocks.{i}.q.weight": (8, 5) for i in range(4)},
    **{f"blocks.{i}.conv.weight": (8, 2, 3, 1) for i in range(1, 4)},
    "temperature": (),
}
OURS = {
    "in/kernel": (24, 5),
    "in/bias": (5,),
    "blocks/q/kernel": (3, 5, 8),
    "blocks/conv/kernel": (3, 3, 1, 2, 8),
    "first/q/kernel": (5, 8),
    "temperature": (),
}
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def abstract(dtype=jnp.float32):
    return nested({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in OURS.items()})


def tensors(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_there_and_back_is_the_identity(dtype, wide):
    """Bit for bit, in the checkpoint's own dtype and through float32 master weights."""
    theirs = tensors(dtype)
    params = read(ROWS, theirs, abstract(), dtype=None if wide else dtype)
    assert {path: leaf.shape for path, leaf in flat(params).items()} == OURS
    assert {leaf.dtype for leaf in flat(params).values()} == {np.dtype(np.float32 if wide else dtype)}
    back = dict(write(ROWS, params))
    assert set(back) == set(theirs)
    for name, tensor in theirs.items():
        ours = back[name].astype(dtype)
        assert ours.shape == tensor.shape and ours.tobytes() == tensor.tobytes(), name
        assert back[name].flags.c_contiguous


def test_values_are_where_the_layouts_say():
    theirs = tensors()
    params = flat(read(ROWS, theirs, abstract()))
    np.testing.assert_array_equal(params["blocks/q/kernel"][1], theirs["blocks.2.q.weight"].T)
    kernel = theirs["blocks.3.conv.weight"]
    assert params["blocks/conv/kernel"][2, 1, 0, 1, 6] == kernel[6, 1, 1, 0]
    patch = np.random.default_rng(1).standard_normal((2, 3, 4))  # rows, columns, channels
    by_hand = np.einsum("ochw,hwc->o", theirs["in.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ params["in/kernel"], by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    "layout, shape", [(SAME, (3,)), (LINEAR, (3, 4)), (CONV, (3, 4, 5, 6)), (conv_as_linear(2, 3), (5, 4, 2, 3))]
)
def test_layouts_invert(layout, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_array_equal(layout.to_foreign(layout.to_ours(x)), x)
    assert foreign_shape(layout, layout.to_ours(x).shape) == shape


def test_reading_does_not_alias_the_source():
    theirs = tensors()
    params = read(ROWS, theirs, abstract())
    before = np.asarray(params["in"]["bias"]).copy()
    theirs["in.bias"][:] = 7.0
    np.testing.assert_array_equal(params["in"]["bias"], before)


def test_read_into_shards():
    """Eight devices, each with its own part, the same numbers."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    places = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), abstract())
    places["blocks"]["q"]["kernel"] = NamedSharding(mesh, PartitionSpec(None, None, ("fsdp", "tensor")))
    places["first"]["q"]["kernel"] = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    theirs = tensors()
    params = read(ROWS, theirs, abstract(), shardings=places)
    jax.tree.map(np.testing.assert_array_equal, params, read(ROWS, theirs, abstract()))
    assert params["blocks"]["q"]["kernel"].addressable_shards[3].data.shape == (3, 5, 1)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == places
    for name, tensor in write(ROWS, params):
        np.testing.assert_array_equal(tensor, theirs[name])


def test_one_tensor_is_read_at_a_time():
    """No more than one foreign tensor is alive while reading."""
    alive = []

    class Lazy:
        def __init__(self, array):
            self.shape, self.dtype, self._array = array.shape, array.dtype, array

        def __array__(self, dtype=None, copy=None):
            assert not any(ref() is not None for ref in alive)
            fresh = self._array.copy()
            alive.append(weakref.ref(fresh))
            return fresh

    read(ROWS, {name: Lazy(tensor) for name, tensor in tensors().items()}, abstract())
    assert len(alive) == len(SHAPES)


def test_older_names_are_read_and_not_written():
    theirs = tensors()
    old = dict(theirs)
    old["blocks.0.query.weight"] = old.pop("blocks.0.q.weight")
    params = read(ROWS, old, abstract())
    jax.tree.map(np.testing.assert_array_equal, params, read(ROWS, theirs, abstract()))
    assert "blocks.0.query.weight" not in dict(write(ROWS, params))
    with pytest.raises(UserError, match="'blocks.0.query.weight'"):
        read(ROWS, theirs | {"blocks.0.query.weight": theirs["blocks.0.q.weight"]}, abstract())


MUTANTS = {
    "missing": (lambda t: t.pop("blocks.2.q.weight"), "lacks 1 tensor .*'blocks.2.q.weight'"),
    "extra": (lambda t: t.update(spare=np.zeros(3, np.float32)), "1 tensor unknown .*'spare'"),
    "path": (lambda t: t.update({"../../etc/x": np.zeros(3, np.float32)}), "'../../etc/x'"),
    "misshaped": (lambda t: t.update({"in.bias": np.zeros(6, np.float32)}), r"'in.bias' is \(6,\), not \(5,\)"),
    "transposed": (lambda t: t.update({"blocks.1.q.weight": np.zeros((5, 8), np.float32)}), "'blocks.1.q.weight'"),
    "whole numbers": (lambda t: t.update({"in.bias": np.zeros(5, np.int32)}), r"'in.bias' \(int32\)"),
    "many": (lambda t: [t.pop(f"blocks.{i}.q.weight") for i in range(4)] + [t.pop("in.bias")], "5 tensors.*1 more"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_named(mutant):
    change, message = MUTANTS[mutant]
    theirs = tensors()
    change(theirs)
    with pytest.raises(UserError, match=message):
        read(ROWS, theirs, abstract())


@pytest.mark.parametrize(
    "rows, message",
    [
        (ROWS + [Row("in.bias", "temperature")], "'temperature'"),
        (ROWS[:1] + ROWS[2:], "in no row.*'in/bias'"),
        (ROWS + [Row("other", "other/bias")], "not in the model: 'other/bias'"),
        (ROWS[:1] + [Row("in.weight", "in/bias")] + ROWS[2:], "more than one row .*'in.weight'"),
        (ROWS[:2] + [ROWS[2]._replace(count=4, start=0)] + ROWS[3:4] + ROWS[5:], "'first/q/kernel'"),
        (ROWS[:2] + [ROWS[2]._replace(count=2)] + ROWS[3:], "unknown .*'blocks.3.q.weight'"),
    ],
)
def test_wrong_tables_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        cover(rows, SHAPES, abstract())


def test_write_checks_the_parameters():
    params = read(ROWS, tensors(), abstract())
    params["spare"] = {"bias": jnp.zeros(3)}
    with pytest.raises(UserError, match="'spare/bias'"):
        list(write(ROWS, params))
    del params["spare"]
    params["blocks"]["q"]["kernel"] = params["blocks"]["q"]["kernel"][:2]
    with pytest.raises(UserError, match="'blocks/q/kernel'.* stack 3"):
        list(write(ROWS, params))
