"""Laws of the batches: one stream for any workers, hosts and restarts; every picture seen; bad pictures replaced."""

import collections
import dataclasses
import hashlib
import json
import logging
import re
import subprocess
import sys

import numpy as np
import psutil
import pytest
from PIL import Image
from tiny_models import quiet, write_data

from lwd_jax.config import Config, Data, Matching, to_json
from lwd_jax.data import batches as module
from lwd_jax.data.batches import IDENTITY, STATE, held_out, held_out_captions, make_batches
from lwd_jax.data.dataset import find_pictures, open_dataset, write_dataset
from lwd_jax.data.latents import Encoder, Plan
from lwd_jax.data.order import uniform
from lwd_jax.data.records import STORAGE
from lwd_jax.data.text import hashed_words
from lwd_jax.errors import UserError

SHAPES = [(40, 60), (61, 40), (48, 48)]
COUNT = 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of plain pictures, each of its own grey level, and its latents."""
    root = tmp_path_factory.mktemp("data")
    pictures = [np.full((*SHAPES[i % 3], 3), 10 * i, np.uint8) for i in range(COUNT)]
    captions = [(f"picture {i}", f"number {i}") for i in range(COUNT)]
    encoder = Encoder("f" * 64, {"scaling": 1.0, "shift": 0.0, "latent_channels": 2}, toy_encode)
    plan = Plan(resolution=64, smallest_bucket=1, storage="float32")
    write_data(root, pictures, captions, encoder, hashed_words(None), plan)
    return root


def toy_encode(pictures):
    mean = pictures[:, ::8, ::8, :2].astype(np.float32)
    return mean, mean / 100


def config_of(folder, stage, **data):
    data = {"batch_size": 4, "workers": 0, "held_out": 3, **data}
    paths = {"dataset": str(folder / "dataset"), "latents": str(folder / "latents")}
    return Config(
        stage=stage, resolution=64, seed=5, data=Data(**{**paths, **data}), matching=Matching(caption_dropout=0.3)
    )


READ = """
import json, sys
import psutil
from lwd_jax.config import from_json
from lwd_jax.data.batches import make_batches

batches = make_batches(from_json(json.loads(sys.argv[1])))
kept = [next(batches) for _ in range(3)]
print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.readline()
batches.close()
"""


@pytest.fixture
def reader(folder):
    """A process that reads batches through two worker processes, and the numbers of its children."""
    config = to_json(config_of(folder, 2, workers=2))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", READ, config], **pipes) as process:
        children = [psutil.Process(number) for number in json.loads(process.stdout.readline())]
        yield process, children
        process.kill()


def test_workers_end_with_a_process_that_is_killed(reader):
    process, children = reader
    assert len(children) >= 2 and all(child.is_running() for child in children)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_no_shared_memory_is_left_behind(reader):
    process, _ = reader
    _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and "leaked" not in said


def blocks(hosts):
    return np.arange(hosts)[:, None]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype and (a[name] == b[name]).all()


@pytest.mark.parametrize("batch_size, told", [(16, True), (2, False)])
def test_sizes_that_few_latents_have_are_told_of(folder, caplog, batch_size, told):
    """With how often an epoch shows one of them at most, which is counted here."""
    with caplog.at_level(logging.WARNING):
        got = make_batches(config_of(folder, 2, batch_size=batch_size))
    words = re.search(r"(\d+) of (\d+) latents are of (\d+) sizes .* up to (\d+) times an epoch", caplog.text)
    assert bool(words) == told
    if told:
        shown = collections.Counter(
            (batch["mean"].shape, float(level))
            for batch in take(got, got.batches_per_epoch)
            for level in batch["std"].max((1, 2, 3))
        )
        sizes = {size for size, _ in shown}
        assert list(map(int, words.groups())) == [COUNT - 3, COUNT - 3, len(sizes), max(shown.values())]


def test_stage_1_batches(folder):
    got = make_batches(config_of(folder, 1))
    found = take(got, 2 * got.batches_per_epoch)
    assert {batch["picture"].shape[1:3] for batch in found} == set(got.shapes)
    for batch in found:
        assert batch.keys() == {"picture"} and batch["picture"].dtype == np.uint8 and len(batch["picture"]) == 4
    levels = {int(level) for batch in found[: got.batches_per_epoch] for level in batch["picture"].max((1, 2, 3))}
    dataset = open_dataset(folder / "dataset")
    kept = {10 * i for i in np.argsort(dataset.sha256)[:-3]}
    assert levels == kept and got.state()[STATE] == 8 * got.batches_per_epoch
    aside = {int(level) for level in held_out(config_of(folder, 1))["picture"].max((1, 2, 3))}
    assert aside == {10 * i for i in range(COUNT)} - kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_2_batches(folder, dtype):
    got = make_batches(dataclasses.replace(config_of(folder, 2), dtype=dtype))
    text = hashed_words(None)
    seen, dropped, total = set(), 0, 0
    for batch in take(got, 12 * got.batches_per_epoch):
        height, width = batch["mean"].shape[1:3]
        assert (8 * height, 8 * width) in got.shapes
        assert {name for name, value in batch.items() if value.dtype != np.float32} <= {"tokens"}
        assert batch["tokens"].dtype == STORAGE[dtype]
        assert batch["std"].shape == (4, height, width, 2) and (batch["std"] == batch["mean"] / 100).all()
        for row in range(4):
            number = round(batch["mean"][row].max() / 10)
            seen.add(number)
            total += 1
            options = {"": 0, f"picture {number}": 1, f"number {number}": 2}
            states = text.encode(list(options))
            match = [k for k in range(3) if (states.tokens[k] == batch["tokens"][row]).all()]
            assert len(match) == 1 and (states.pooled[match[0]] == batch["pooled"][row]).all()
            assert (states.mask[match[0]] == batch["token_mask"][row]).all()
            dropped += match[0] == 0
    assert len(seen) == COUNT - 3
    assert abs(dropped / total - 0.3) < 4 * (0.3 * 0.7 / total) ** 0.5


@pytest.fixture(scope="module")
def shown(folder):
    """[batches, rows, 2] of 40 epochs with half of all captions dropped: record, and caption alternative or -1."""
    config = dataclasses.replace(config_of(folder, 2), matching=Matching(caption_dropout=0.5))
    captions = ["", *(words.format(i) for i in range(COUNT) for words in ("picture {}", "number {}"))]
    place_of = {pooled.tobytes(): place for place, pooled in enumerate(hashed_words(None).encode(captions).pooled)}
    got = make_batches(config)
    found = []
    for batch in take(got, 40 * got.batches_per_epoch):
        records = (batch["mean"].max((1, 2, 3)) / 10).round().astype(int)
        places = np.array([place_of[pooled.tobytes()] for pooled in batch["pooled"]])
        assert ((places == 0) | ((places - 1) // 2 == records)).all()
        found.append(np.stack([records, np.where(places == 0, -1, (places - 1) % 2)], -1))
    return np.stack(found)


def test_captions_are_dropped_anew_in_every_epoch(shown):
    """And drawn anew: of every record each alternative is seen, and the empty caption."""
    seen = {tuple(row) for row in shown.reshape(-1, 2)}
    assert seen == {(record, caption) for record in np.unique(shown[..., 0]) for caption in (-1, 0, 1)}


def test_the_rows_of_a_batch_are_dropped_one_by_one(shown):
    dropped = np.sum(shown[..., 1] == -1, axis=1)
    found = np.bincount(dropped, minlength=5) / len(dropped)
    expected = np.array([1, 4, 6, 4, 1]) / 16  # binomial
    assert (np.abs(found - expected) < 4 * (expected * (1 - expected) / len(dropped)) ** 0.5).all()


def test_caption_alternatives_are_drawn_equally_often(shown):
    captions = shown[..., 1][shown[..., 1] >= 0]
    assert abs(captions.mean() - 0.5) < 4 * (0.25 / captions.size) ** 0.5


@pytest.mark.parametrize("stage", [1, 2])
def test_restored_anywhere_it_continues(folder, stage):
    config = config_of(folder, stage)
    whole = make_batches(config)
    all_batches, states = [], []
    for _ in range(13):
        states.append(whole.state())
        all_batches.append(next(whole))
    for at in (0, 1, 6, 11):
        same(
            take(make_batches(config, start_index=states[at][STATE]), 2),
            all_batches[at : at + 2],
        )
    whole.restore(states[3])
    same(take(whole, 5), all_batches[3:8])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_concatenate_to_the_global_batch(folder, stage, hosts):
    config = config_of(folder, stage)
    alone = take(make_batches(config), 6)
    parts = [make_batches(config, process_index=i, blocks=blocks(hosts)) for i in range(hosts)]
    shares = [take(part, 6) for part in parts]
    same([{k: np.concatenate([s[b][k] for s in shares]) for k in alone[b]} for b in range(6)], alone)
    assert len({part.state()[STATE] for part in parts}) == 1
    # Four hosts stop, two go on.
    resumed = [make_batches(config, process_index=i, blocks=blocks(2), start_index=16) for i in range(2)]
    shares = [take(part, 2) for part in resumed]
    same([{k: np.concatenate([s[b][k] for s in shares]) for k in alone[b]} for b in range(2)], alone[4:])


def test_hosts_whose_rows_are_not_neighbours(folder):
    config = config_of(folder, 1)
    alone = take(make_batches(config), 3)
    interleaved = np.array([[0, 3], [1, 2]])  # as a ring through a slice of two hosts
    for index, rows in enumerate(interleaved):
        share = take(make_batches(config, process_index=index, blocks=interleaved), 3)
        same(share, [{name: part[rows] for name, part in batch.items()} for batch in alone])


@pytest.mark.parametrize("stage", [1, 2])
def test_worker_processes_do_not_matter(folder, stage):
    alone = take(make_batches(config_of(folder, stage)), 7)
    config = config_of(folder, stage, workers=2)
    pool = make_batches(config)
    same(take(pool, 4), alone[:4])
    state = pool.state()
    pool.close()
    # Saved with two workers, continued with one.
    config = config_of(folder, stage, workers=1)
    other = make_batches(config, start_index=state[STATE])
    same(take(other, 3), alone[4:])
    other.close()


def test_a_bad_picture_is_replaced_and_counted(folder, monkeypatch):
    config = config_of(folder, 1, flip=False)
    good = make_batches(config)
    expected = take(good, good.batches_per_epoch)
    dataset = open_dataset(folder / "dataset")
    bad = hashlib.sha256(dataset[int(np.argsort(dataset.sha256)[0])].picture).hexdigest()
    decode = module.decode

    def broken(data, *rest):
        if hashlib.sha256(data).hexdigest() == bad:
            raise OSError("broken")
        return decode(data, *rest)

    monkeypatch.setattr(module, "decode", broken)
    level = 10 * int(np.argsort(dataset.sha256)[0])
    got = make_batches(config)
    found = take(got, got.batches_per_epoch)
    changed = 0
    for a, b in zip(expected, found):
        hit = a["picture"].max((1, 2, 3)) == level
        changed += hit.sum()
        assert (a["picture"][~hit] == b["picture"][~hit]).all() and not (b["picture"].max((1, 2, 3)) == level).any()
    assert got.replaced == changed > 0 and good.replaced == 0


def test_squares_and_flips(folder):
    config = config_of(folder, 1, buckets=False)
    got = make_batches(config)
    assert got.shapes == [(64, 64)] and next(got)["picture"].shape == (4, 64, 64, 3)
    assert got.batches_per_epoch == -(-(COUNT - 3) // 4)


def write_pictures(root, pictures):
    """A dataset of pictures without captions."""
    (root / "images").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
    captions = [()] * len(pictures)
    write_dataset(root / "dataset", root / "images", find_pictures(root / "images"), captions, quiet)


def test_a_few_odd_pictures_join_another_size(tmp_path):
    """On their own they would fill whole batches in every epoch."""
    write_pictures(tmp_path, [np.full((64, 128 if i == 5 else 64, 3), 10 * i, np.uint8) for i in range(6)])
    got = make_batches(config_of(tmp_path, 1, held_out=0))
    levels = {int(level) for batch in take(got, got.batches_per_epoch) for level in batch["picture"].max((1, 2, 3))}
    assert got.shapes == [(64, 64)] and levels == {0, 10, 20, 30, 40, 50}


def test_flips_are_half_of_all(tmp_path):
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    write_pictures(tmp_path, [ramp, ramp + 100])
    config = config_of(tmp_path, 1, held_out=0, batch_size=50)
    pictures = np.concatenate([b["picture"] for b in take(make_batches(config), 8)])
    flipped = pictures[:, 0, 0, 0] > pictures[:, 0, -1, 0]
    assert abs(flipped.mean() - 0.5) < 0.1
    unflipped = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=False))
    pictures = next(make_batches(unflipped))["picture"]
    assert (pictures[:, 0, 0, 0] < pictures[:, 0, -1, 0]).all()


@pytest.mark.parametrize("buckets", [True, False])
def test_crops_and_flips_are_pinned(folder, monkeypatch, buckets):
    """To their own streams, written down: a run that goes on with another version sees what it would have seen."""
    crop, flip = 2, 3
    # Two columns that tell the place of the crop, and which of them was the left one.
    monkeypatch.setattr(module, "decode", lambda data, size, place: np.array([[(*place, 0), (*place, 1)]]))
    batches = take(make_batches(config_of(folder, 1, buckets=buckets)), 5)
    found = np.concatenate([batch["picture"] for batch in batches])[:, 0]
    places = [[uniform(5, crop, i, axis) if buckets else 0.5 for axis in (0, 1)] for i in range(20)]
    assert (found[:, 0, :2] == places).all() and (found[:, 1, :2] == places).all()
    assert (found[:, 0, 2] == [uniform(5, flip, i) < 0.5 for i in range(20)]).all()


@pytest.mark.parametrize("stage", [1, 2])
def test_another_seed_is_another_order(folder, stage):
    config = config_of(folder, stage, flip=stage == 2)
    name = "picture" if stage == 1 else "mean"
    orders = [
        np.concatenate([batch[name].max((1, 2, 3)) for batch in take(make_batches(each), 5)])
        for each in (config, dataclasses.replace(config, seed=6), config)
    ]
    assert (orders[0] == orders[2]).all() and np.sum(orders[0] != orders[1]) > 10


def test_held_out(folder):
    assert held_out(config_of(folder, 1))["picture"].shape == (3, 64, 64, 3)
    batch, captions = held_out(config_of(folder, 2)), held_out_captions(config_of(folder, 2))
    assert 1 <= len(captions) == len(batch["mean"]) <= 3
    for row, caption in enumerate(captions):
        assert caption == f"picture {round(batch['mean'][row].max() / 10)}"
        assert (batch["tokens"][row] == hashed_words(None).encode([caption]).tokens[0]).all()
    assert len(held_out_captions(config_of(folder, 1))) == 3


@pytest.mark.parametrize(
    "stage, change, words",
    [
        (1, {"dataset": ""}, "data.dataset"),
        (2, {"latents": ""}, "data.latents"),
        (1, {"dataset": "nowhere"}, "no dataset folder"),
        (2, {"latents": "nowhere"}, "no folder of latents"),
        (1, {"batch_size": 3}, "does not divide into 2 parts"),
        (1, {"held_out": COUNT}, "held_out"),
        (2, {"buckets": False}, "data.buckets"),
    ],
)
def test_mistakes(folder, stage, change, words):
    with pytest.raises(UserError, match=words):
        make_batches(config_of(folder, stage, **change), blocks=blocks(2))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_of_other_data_is_refused(folder, stage):
    batches = make_batches(config_of(folder, stage))
    state = batches.state()
    batches.restore(state)
    with pytest.raises(UserError, match="data"):
        batches.restore(state | {IDENTITY: "of another folder"})
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    "stage, change",
    [(1, {"level": 9}), (2, {"level": 9}), (2, {"caption": "d"}), (2, {"weights": "g"}), (2, {"length": 7})],
)
def test_a_state_of_changed_data_is_refused(tmp_path, stage, change):
    """As many records as before, of which one, or what encoded them, is another."""

    def batches_of(root, level=0, caption="b", weights="f", length=8):
        root.mkdir()
        pictures = [np.full((64, 64, 3), value, np.uint8) for value in (1, 2, 3, level)]
        encoder = Encoder(weights * 64, {"scaling": 1.0, "shift": 0.0, "latent_channels": 2}, toy_encode)
        captions = [("a", "c"), ("a", caption), ("a",), ("a",)]
        write_data(root, pictures, captions, encoder, hashed_words(None, length), Plan(resolution=64))
        return make_batches(config_of(root, stage, held_out=0))

    state = batches_of(tmp_path / "before").state()
    batches_of(tmp_path / "same").restore(state)
    with pytest.raises(UserError, match="not those this run was started with"):
        batches_of(tmp_path / "changed", **change).restore(state)


def test_latents_of_another_resolution(folder):
    config = dataclasses.replace(config_of(folder, 2), resolution=96)
    with pytest.raises(UserError, match="64 px.*96"):
        make_batches(config)
    with pytest.raises(UserError, match="held_out is 0"):
        held_out(config_of(folder, 1, held_out=0))
