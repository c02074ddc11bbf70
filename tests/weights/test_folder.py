"""Laws: folders are written whole and read back bit for bit; what is not sound weights is refused by name."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from full_disk import full_disk
from safetensors.numpy import save_file

from lwd_jax.errors import UserError
from lwd_jax.weights.folder import STEM, Tensors, fingerprint, read_config, write_folder

CONFIG = {"_class_name": "Thing", "sizes": [1, 2]}


def some(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (7, 5), "a.bias": (5,), "b": (), "c": (3, 2, 2)}
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def check(folder, wanted):
    stored = Tensors(folder)
    assert set(stored) == set(wanted) and len(stored) == len(wanted)
    for name, tensor in wanted.items():
        assert stored[name].shape == tensor.shape and stored[name].dtype == tensor.dtype
        assert np.asarray(stored[name]).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("limit, files", [(1e9, 1), (60, 3), (1, 4)])
def test_there_and_back(tmp_path, dtype, limit, files):
    wanted = some(dtype)
    limit = limit * np.dtype(dtype).itemsize / 4
    write_folder(tmp_path / "x", CONFIG, wanted.items(), max_shard_bytes=limit)
    assert read_config(tmp_path / "x") == CONFIG
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == files
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    check(tmp_path / "x", wanted)


def test_shards_are_named_and_indexed_as_diffusers_does(tmp_path):
    write_folder(tmp_path / "x", CONFIG, some().items(), max_shard_bytes=60)
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == ["config.json"] + [f"{STEM}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [
        f"{STEM}.safetensors.index.json"
    ]
    index = json.loads((tmp_path / "x" / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * (35 + 5 + 1 + 12)}
    assert index["weight_map"]["a.weight"] == names[1]


def test_another_dtype_in_the_file(tmp_path):
    write_folder(tmp_path / "x", CONFIG, some().items(), dtype=ml_dtypes.bfloat16)
    check(tmp_path / "x", {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in some().items()})


def test_nothing_half_written(tmp_path):
    def broken():
        yield "a", np.zeros(3, np.float32)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "x", CONFIG, broken(), max_shard_bytes=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    with full_disk(10), pytest.raises(UserError, match="Weights cannot be written to"):
        write_folder(tmp_path / "x", CONFIG, some().items())
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    write_folder(tmp_path / "x", CONFIG, some().items())  # empty: taken
    with pytest.raises(UserError, match="exists already"):
        write_folder(tmp_path / "x", CONFIG, {}.items())
    check(tmp_path / "x", some())


def test_a_variant_alone_is_read(tmp_path):
    save_file(some(np.float16), tmp_path / f"{STEM}.fp16.safetensors")
    check(tmp_path, some(np.float16))
    save_file(some(), tmp_path / f"{STEM}.safetensors")  # the plain file comes before variants
    check(tmp_path, some())


def test_ambiguous_weights(tmp_path):
    save_file(some(), tmp_path / f"{STEM}.fp16.safetensors")
    save_file(some(), tmp_path / f"{STEM}.bf16.safetensors")
    with pytest.raises(UserError, match="bf16.safetensors.*fp16.safetensors"):
        Tensors(tmp_path)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "vae.pt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"{name}.*convert it to safetensors"):
        Tensors(tmp_path)


def test_a_pickle_named_safetensors(tmp_path):
    (tmp_path / f"{STEM}.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(UserError, match="not a sound safetensors file"):
        Tensors(tmp_path)


def test_truncated_file(tmp_path):
    save_file(some(), tmp_path / f"{STEM}.safetensors")
    data = (tmp_path / f"{STEM}.safetensors").read_bytes()
    (tmp_path / f"{STEM}.safetensors").write_bytes(data[:-8])
    with pytest.raises(UserError, match="not a sound safetensors file"):
        Tensors(tmp_path)


def test_a_name_given_twice(tmp_path):
    """safetensors reads such a file without a word and takes the last."""
    entry = '"w":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 8) + "," + entry % (8, 16) + "}").encode()
    data = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / f"{STEM}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(UserError, match="'w'|not a sound"):
        Tensors(tmp_path)


def index_of(tmp_path, **change):
    write_folder(tmp_path / "x", CONFIG, some().items(), max_shard_bytes=60)
    path = tmp_path / "x" / f"{STEM}.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))
    return tmp_path / "x"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": "../elsewhere.safetensors"}, "'../elsewhere.safetensors', which is not"),
        ({"b": "/etc/passwd"}, "'/etc/passwd'"),
        ({"b": f"{STEM}-00009-of-00003.safetensors"}, "00009-of-00003.safetensors, which is missing"),
        ({"ghost": f"{STEM}-00001-of-00003.safetensors"}, "disagree .*'ghost'"),
        ({"b": f"{STEM}-00001-of-00003.safetensors"}, "disagree .*'b'"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Tensors(index_of(tmp_path, **change))


def test_missing_things(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_config(tmp_path / "no")
    with pytest.raises(UserError, match="no folder"):
        Tensors(tmp_path / "no")
    with pytest.raises(UserError, match="no config.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        Tensors(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not sound JSON"):
        read_config(tmp_path)


def test_fingerprint_is_of_names_shapes_and_values():
    params = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "a": {"bias": jnp.zeros(3)}}
    same = {"a": {"bias": np.zeros(3, np.float16)}, "b": {"kernel": jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3)}}
    assert fingerprint(params) == fingerprint(same) and len(fingerprint(params)) == 64
    others = [
        {"b": {"kernel": params["b"]["kernel"].reshape(3, 2)}, "a": params["a"]},
        {"c": params["b"], "a": params["a"]},
        {"b": {"kernel": params["b"]["kernel"].at[1, 1].add(1e-6)}, "a": params["a"]},
    ]
    assert len({fingerprint(p) for p in others} | {fingerprint(params)}) == 4
