"""Laws of encoded datasets: right values, keys by content and weights, nothing done twice, nothing half-written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from lwd_jax.data import latents as module
from lwd_jax.data.dataset import find_pictures, open_dataset, write_dataset
from lwd_jax.data.latents import (
    Encoder,
    Plan,
    check_autoencoder,
    check_text,
    encode_dataset,
    open_latents,
    picture_key,
    text_key,
)
from lwd_jax.data.pictures import decode
from lwd_jax.data.text import hashed_words
from lwd_jax.errors import UserError

SHAPES = [(64, 100), (100, 64), (80, 80)]
PLAN = Plan(resolution=64, smallest_bucket=1, batch_size=2, save_seconds=0.0)  # every entry is saved at once


def quiet(*_):
    pass


class Toy:
    """An autoencoder that counts the pictures it was shown, and can be made to fail."""

    def __init__(self, fingerprint="a" * 64, fail_after=10**9, dtype="float32"):
        self.batches, self.fail_after, self.fingerprint, self.dtype = 0, fail_after, fingerprint, dtype

    def __call__(self, pictures):
        assert pictures.shape[0] == PLAN.batch_size and pictures.dtype == np.uint8
        if self.batches == self.fail_after:
            raise KeyboardInterrupt
        self.batches += 1
        mean = pictures[:, ::8, ::8].astype(np.float32) / 9
        return mean, np.sqrt(mean)

    @property
    def encoder(self):
        return Encoder(self.fingerprint, {"scaling": 1.5, "shift": 0.1, "latent_channels": 3}, self, self.dtype)


def save(folder, number, seed=None):
    rng = np.random.default_rng(number if seed is None else seed)
    Image.fromarray(rng.integers(0, 256, (*SHAPES[number % 3], 3), dtype=np.uint8)).save(folder / f"{number:02}.png")


def dataset_of(root, captions=None):
    paths = find_pictures(root / "images")
    captions = captions or [(f"picture {path.stem}", "shared") for path in paths]
    write_dataset(root / "dataset", root / "images", paths, captions, quiet)
    return open_dataset(root / "dataset")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(7):
        save(tmp_path / "images", number)
    return tmp_path


def encode(root, dataset, toy, text=None, plan=PLAN, overwrite=False):
    text = text or hashed_words(None)
    return encode_dataset(dataset, root / "latents", toy.encoder, text, plan, quiet, overwrite)


def check_values(root, dataset, bound):
    """Every entry is what encoding its own picture and captions gives."""
    latents, text = open_latents(root / "latents"), hashed_words(None)
    assert len(latents) == len(dataset) and (latents.sha256 == dataset.sha256).all()
    for number in range(len(dataset)):
        size = tuple(latents.sizes[number])
        expected = decode(dataset[number].picture, size)[::8, ::8] / np.float32(9)
        mean, std = latents.latent(number)
        assert mean.dtype == std.dtype == np.float32 and mean.shape == (size[0] // 8, size[1] // 8, 3)
        assert (np.abs(mean - expected) <= bound * expected + 1e-6).all()
        assert (np.abs(std - np.sqrt(expected)) <= bound * np.sqrt(expected) + 1e-6).all()
        assert latents.caption_count(number) == 2
        for alternative, caption in enumerate(dataset[number].captions):
            states, found = latents.text(number, alternative)
            wanted = text.encode([caption])
            assert found == caption
            for got, want in zip(states, wanted):
                assert got.dtype == np.float32 and np.abs(got - want[0]).max() <= 2 * bound + 1e-6


@pytest.mark.parametrize("storage, bound", [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0)])
def test_values_and_metadata(root, storage, bound):
    dataset, toy = dataset_of(root), Toy()
    outcome = encode(root, dataset, toy, plan=dataclasses.replace(PLAN, storage=storage))
    assert outcome == (7, 0, 9, 0, [])  # nine captions: seven of their own, a shared one, the empty one
    check_values(root, dataset, bound)
    latents, text = open_latents(root / "latents"), hashed_words(None)
    assert (latents.null_text.tokens == text.encode([""]).tokens[0]).all()
    metadata = latents.metadata
    assert metadata["autoencoder_fingerprint"] == "a" * 64 and metadata["autoencoder"]["shift"] == 0.1
    assert metadata["text"] == text.describe() and metadata["records"] == 7 and metadata["resolution"] == 64
    assert sum(shape["pictures"] for shape in metadata["shapes"]) == 7


def test_nothing_is_done_twice(root):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    again = Toy()
    assert encode(root, dataset, again) == (0, 7, 0, 9, []) and again.batches == 0
    # One picture changes, one goes, one comes, one caption changes.
    save(root / "images", 1, seed=99)
    (root / "images" / "04.png").unlink()
    save(root / "images", 8)
    captions = [(f"picture {p.stem}", "shared") for p in find_pictures(root / "images")]
    captions[0] = ("another text", "shared")
    dataset = dataset_of(root, captions)
    assert encode(root, dataset, Toy())[:4] == (2, 5, 2, 7)  # captions: "another text" and "picture 08"
    check_values(root, dataset, 2**-11)
    latents = open_latents(root / "latents")
    assert latents.text(0, 0)[1] == "another text" and len(latents) == 7
    assert (latents.sha256 == open_dataset(root / "dataset").sha256).all()


def test_a_changed_encoder_makes_everything_anew(root):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    assert encode(root, dataset, Toy("b" * 64), overwrite=True)[:4] == (7, 0, 0, 9)
    assert encode(root, dataset, Toy("b" * 64), hashed_words(None, length=8), overwrite=True)[:4] == (0, 7, 9, 0)
    assert encode(root, dataset, Toy("b" * 64), plan=dataclasses.replace(PLAN, resolution=96), overwrite=True)[0] == 7
    # What nobody needs any more is deleted.
    assert len(list((root / "latents" / "pictures").glob("part-*"))) == 7


def test_keys_notice_every_part():
    base = ("s", (64, 96), "f", "float16", "float32")
    others = [("t", (96, 64), "g", "float32", "bfloat16")[i] for i in range(5)]
    changed = [(*base[:i], other, *base[i + 1 :]) for i, other in enumerate(others)]
    assert len({picture_key(*parts) for parts in (base, *changed)}) == 6
    assert (
        len({text_key(*parts) for parts in [("c", "f", "s"), ("d", "f", "s"), ("c", "g", "s"), ("c", "f", "t")]}) == 4
    )


def test_a_killed_run_continues(root):
    dataset = dataset_of(root)
    with pytest.raises(KeyboardInterrupt):
        encode(root, dataset, Toy(fail_after=2))
    with pytest.raises(UserError, match="not complete"):
        open_latents(root / "latents")
    outcome = encode(root, dataset, Toy())
    assert (outcome.pictures_made, outcome.pictures_kept, outcome.texts_kept) == (4, 3, 9)
    check_values(root, dataset, 2**-11)


def test_a_kill_while_writing_leaves_no_half_part(root, monkeypatch):
    dataset = dataset_of(root)
    write_records = module.Store.flush.__globals__["write_records"]

    def dying(folder, name, features, rows):
        write_records(folder, name, features, rows)
        if name == "latents":
            raise KeyboardInterrupt

    monkeypatch.setitem(module.Store.flush.__globals__, "write_records", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(root, dataset, Toy())
    assert not list((root / "latents" / "pictures").glob("part-*"))
    monkeypatch.undo()
    # A real kill leaves the temporary folder behind; the next run removes it.
    (root / "latents" / "pictures" / ".part-000000.12345678.partial").mkdir()
    assert encode(root, dataset, Toy()).pictures_made == 7
    assert not list((root / "latents" / "pictures").glob(".*"))


def test_an_older_complete_cache_stays_readable_until_the_new_one_is_complete(root):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    before = [open_latents(root / "latents").latent(i)[0] for i in range(7)]
    with pytest.raises(KeyboardInterrupt):
        encode(root, dataset, Toy("b" * 64, fail_after=1), overwrite=True)
    latents = open_latents(root / "latents")
    assert latents.metadata["autoencoder_fingerprint"] == "a" * 64
    assert all((latents.latent(i)[0] == before[i]).all() for i in range(7))


def test_unreadable_pictures_are_left_out(root, monkeypatch):
    dataset = dataset_of(root)
    first = dataset[0].picture

    def broken(data, size):
        if data == first:
            raise OSError("broken")
        return decode(data, size)

    monkeypatch.setattr(module, "decode", broken)
    outcome = encode(root, dataset, Toy())
    assert outcome.pictures_made == 6 and outcome.rejects == [("00.png", "cannot be read: broken")]
    latents = open_latents(root / "latents")
    assert len(latents) == 6 and latents.text(0, 0)[1] == "picture 01" and latents.metadata["rejects"]
    assert latents.sha256.tolist() == dataset.sha256[1:].tolist()
    # The picture left out and the one after it are of two sizes.
    assert [latents.latent(i)[0].shape for i in range(6)] == [(h // 8, w // 8, 3) for h, w in latents.sizes]


def test_pictures_without_a_caption_are_unconditional(root):
    captions = [()] + [("a", "b", "c", "d", "e")] * 6
    encode(root, dataset_of(root, captions), Toy())
    latents = open_latents(root / "latents")
    assert latents.caption_count(0) == 1 and latents.text(0, 0)[1] == "" and latents.caption_count(1) == 4
    assert [latents.text(1, i)[1] for i in range(4)] == ["a", "b", "c", "d"]  # the first ones


def test_small_buckets_join_and_squares(root):
    dataset = dataset_of(root)
    encode(root, dataset, Toy(), plan=dataclasses.replace(PLAN, smallest_bucket=3))
    assert len(open_latents(root / "latents").metadata["shapes"]) == 2
    encode(root, dataset, Toy(), plan=dataclasses.replace(PLAN, keep_aspect=False), overwrite=True)
    assert (open_latents(root / "latents").sizes == 64).all()


def test_values_that_the_storage_cannot_hold(root):
    dataset = dataset_of(root)
    huge = Encoder("c" * 64, {}, lambda x: (np.full((2, 8, 8, 3), 7e4, np.float32), np.ones((2, 8, 8, 3), np.float32)))
    with pytest.raises(UserError, match="70000.*float32"):
        encode_dataset(dataset, root / "latents", huge, hashed_words(None), PLAN, quiet)
    broken = dataclasses.replace(huge, encode=lambda x: (np.full((2, 8, 8, 3), np.nan), np.ones((2, 8, 8, 3))))
    with pytest.raises(UserError, match="nan"):
        encode_dataset(dataset, root / "latents", broken, hashed_words(None), PLAN, quiet)


def test_a_kill_before_the_last_file_is_continued(root, monkeypatch):
    dataset, write_whole = dataset_of(root), module.write_whole

    def dying(path, content):
        if path.name == "metadata.json":
            for left in (".metadata.json.7.partial", ".DS_Store"):
                (path.parent / left).touch()
            raise KeyboardInterrupt
        write_whole(path, content)

    monkeypatch.setattr(module, "write_whole", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(root, dataset, Toy())
    monkeypatch.undo()
    assert list((root / "latents").glob("index-*.npz"))
    assert encode(root, dataset, Toy()) == (0, 7, 0, 9, [])
    check_values(root, dataset, 2**-11)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"resolution": 96}, "resolution 64, not 96"),
        ({"keep_aspect": False}, "buckets True, not False"),
        ({"storage": "float32"}, "storage float16, not float32"),
        ({"toy": Toy("b" * 64)}, "autoencoder_fingerprint aaaaaaaaaaaaaaaa, not bbbbbbbbbbbbbbbb"),
        ({"toy": Toy(dtype="bfloat16")}, "dtype float32, not bfloat16"),
        ({"text": hashed_words(None, length=8)}, "text_fingerprint"),
    ],
)
def test_what_was_made_otherwise_is_not_dropped_unasked(root, change, said):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    before = files_of(root / "latents")
    toy, text = change.pop("toy", Toy()), change.pop("text", None)
    with pytest.raises(UserError, match=f"{said}.*--overwrite"):
        encode(root, dataset, toy, text, dataclasses.replace(PLAN, **change))
    assert toy.batches == 0 and files_of(root / "latents") == before
    # What leaves the rest as it is needs no leave.
    encode(root, dataset, Toy(), plan=dataclasses.replace(PLAN, captions=1, batch_size=2, smallest_bucket=3))


def test_metadata_that_does_not_say_how_is_of_another_way(root):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    file = root / "latents" / "metadata.json"
    file.write_text(json.dumps({"format": 1}))
    with pytest.raises(UserError, match="resolution None, not 64.*--overwrite"):
        encode(root, dataset, Toy())
    assert encode(root, dataset, Toy(), overwrite=True)[:2] == (0, 7)
    check_values(root, dataset, 2**-11)


def test_what_another_process_wrote_meanwhile_is_not_dropped_unasked(root, monkeypatch):
    dataset, locked = dataset_of(root), module.locked

    def late(folder, what):
        monkeypatch.undo()
        encode(root, dataset, Toy("b" * 64))
        return locked(folder, what)

    monkeypatch.setattr(module, "locked", late)
    with pytest.raises(UserError, match="made with autoencoder_fingerprint bbbb"):
        encode(root, dataset, Toy())
    assert open_latents(root / "latents").metadata["autoencoder_fingerprint"] == "b" * 64


def test_one_process_at_a_time(root):
    """While a run encodes, another one in the same folder is refused; afterwards it finds all done."""
    dataset, toy, refused = dataset_of(root), Toy(), []

    def encode_meanwhile(what, done, total):
        if what == "pictures" and not refused:
            with pytest.raises(UserError, match="latents' is being written to by another process") as caught:
                encode(root, dataset, Toy())
            refused.append(caught)

    encode_dataset(dataset, root / "latents", toy.encoder, hashed_words(None), PLAN, encode_meanwhile)
    assert refused and encode(root, dataset, Toy()) == (0, 7, 0, 9, [])
    check_values(root, dataset, 2**-11)


@pytest.mark.parametrize(
    "made", ["pictures/part-1.jpg", "pictures/photo.jpg", "text/notes.txt", "latent/x", "notes~", "index.npz"]
)
def test_a_folder_of_somebody_else_is_left_alone(root, made):
    dataset = dataset_of(root)
    (root / "latents" / made).parent.mkdir(parents=True, exist_ok=True)
    (root / "latents" / made).write_text("mine")
    before = sorted((root / "latents").rglob("*"))
    with pytest.raises(UserError, match="holds no latents; choose another --out"):
        encode(root, dataset, Toy())
    assert sorted((root / "latents").rglob("*")) == before


def test_captions_are_known_without_reading_pictures(root, monkeypatch):
    captions = [("one", "zwei \u00fc"), ("\u6f22",), (), *[(f"{i}",) for i in range(4)]]
    dataset = dataset_of(root, captions)
    read = [dataset[number].captions for number in range(7)]
    assert dataset.captions() == read and sorted(read) == sorted(captions)
    encode(root, dataset, Toy())

    def no(*_):
        raise AssertionError("a picture is read")

    monkeypatch.setattr(type(dataset), "__getitem__", no)
    assert encode(root, dataset, Toy())[:2] == (0, 7)
    # A dataset of an earlier version has no captions in its index, and hashes as text.
    monkeypatch.undo()
    index = dict(np.load(root / "dataset" / "index.npz"))
    del index["captions"]
    np.savez(root / "dataset" / "index.npz", **index | {"sha256": index["sha256"].astype("U64")})
    older = open_dataset(root / "dataset")
    assert older.captions() == read and older.sha256.dtype == "S64" and (older.sha256 == dataset.sha256).all()


@pytest.mark.parametrize("cut", [0, 100, "half", "flipped", "missing"])
@pytest.mark.parametrize("store", ["dataset", "latents/pictures/part-000000"])
def test_damaged_records_are_named(root, store, cut):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    (file,) = (root / store).glob("*.array_record-*")
    content = file.read_bytes()
    flipped = content[:70] + bytes([content[70] ^ 255]) + content[71:]
    if cut == "missing":
        file.unlink()
    else:
        file.write_bytes({"half": content[: len(content) // 2], "flipped": flipped}.get(cut) or content[: cut or 0])
    with pytest.raises(UserError, match=f"{root / store}.*(cannot be read|damaged).*\\.$"):
        if store == "dataset":
            open_dataset(root / store)[0]
        else:
            open_latents(root / "latents").latent(0)


@pytest.mark.parametrize("content", ["{}", "[]", '"x"', '{"format": 1}', '{"format": 1, "index": "index.npz"}'])
def test_metadata_of_something_else(root, content):
    encode(root, dataset_of(root), Toy())
    (root / "latents" / "metadata.json").write_text(content)
    with pytest.raises(UserError, match="have format|is damaged|must hold a JSON object"):
        open_latents(root / "latents")


def test_mistakes(root, tmp_path):
    dataset = dataset_of(root)
    encode(root, dataset, Toy())
    latents = open_latents(root / "latents")
    check_autoencoder(latents, "a" * 64)
    with pytest.raises(UserError) as caught:
        check_autoencoder(latents, "b" * 64)
    assert "a" * 16 in str(caught.value) and "b" * 16 in str(caught.value)
    check_text(latents, 128, 128)
    for width, pooled in ((4096, 2048), (4096, 128), (128, 2048)):
        with pytest.raises(UserError, match=f"are 128 and pooled 128 .*reads {width} and {pooled}"):
            check_text(latents, width, pooled)
    with pytest.raises(UserError, match="no folder of latents"):
        open_latents(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no latents"):
        open_latents(root / "images")
    with pytest.raises(UserError, match="choose another --out"):
        encode_dataset(dataset, root / "images", Toy().encoder, hashed_words(None), PLAN, quiet)
    with pytest.raises(UserError, match="does not divide"):
        encode(root, dataset, Toy(), plan=dataclasses.replace(PLAN, resolution=100), overwrite=True)
    with pytest.raises(UserError, match="storage"):
        encode(root, dataset, Toy(), plan=dataclasses.replace(PLAN, storage="float8"))
    shutil.copytree(root / "latents", tmp_path / "older")
    metadata = tmp_path / "older" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(UserError, match="format 0"):
        open_latents(tmp_path / "older")
