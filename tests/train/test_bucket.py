"""Laws of a workdir in a bucket: it holds what a folder would, stopping and killing included; see tests/bucket.py."""

import json

import jax
import numpy as np
import pytest
from bucket import Bucket, get_folder, names, put_folder, serve
from test_loop import lines, state_of, train, with_training

from lwd_jax.errors import UserError
from lwd_jax.files import locate
from lwd_jax.train import metrics
from lwd_jax.train.checkpoint import DAMAGED, MANIFEST, damage, read_params, saved_steps


@pytest.fixture(scope="module")
def objects():
    return serve()


@pytest.fixture(scope="module")
def whole(objects, tmp_path_factory):
    """The same run in a folder and in a bucket."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == train("gs://whole/a/run") == (6, 0)
    return folder, "gs://whole/a/run"


def same_state(first, second):
    (state, position), (other, other_position) = state_of(first), state_of(second)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert position == other_position


def test_a_run_in_a_bucket_is_the_run_in_a_folder(whole, objects):
    folder, address = whole
    same_state(folder, address)
    assert lines(folder) == lines(address)
    jax.tree.map(np.testing.assert_array_equal, read_params(folder)[0], read_params(address)[0])
    for name in ("config.json", "model.json"):
        assert (locate(address) / name).read_text() == (folder / name).read_text()
    events = [name for name in names("whole") if "/tb/" in name]
    assert len(events) == 1 and len(objects["whole", events[0]][0]) > 500
    tops = {name.removeprefix("a/run/").split("/")[0] for name in names("whole")}
    assert tops == {"config.json", "model.json", metrics.FILE, "tb", "checkpoints"}


def test_arrays_were_written_by_tensorstore_itself(whole, objects):
    """Orbax hands TensorStore's own client the address: no file of this machine is in between."""
    arrays = [name for name in names("whole") if "/params/" in name and "ocdbt" in name]
    assert arrays


def test_stopped_and_resumed_it_is_the_uninterrupted_run(whole):
    train("gs://stopped/run", with_training(steps=3))
    assert saved_steps("gs://stopped/run") == [2, 3]
    assert train("gs://stopped/run").step == 6
    same_state(whole[0], "gs://stopped/run")
    assert lines("gs://stopped/run")[-1] == lines(whole[0])[-1]


def test_lines_after_the_restored_step_are_written_once(objects):
    """As a run leaves them that is killed after its last save; and what it was writing then is not a checkpoint."""
    train("gs://killed/run", with_training(steps=4))
    content, generation = objects["killed", "run/metrics.jsonl"]
    late = json.dumps({"step": 5, "loss": 1.0}).encode() + b'\n{"step": 6, "lo'
    objects["killed", "run/metrics.jsonl"] = (content + late, generation)
    objects["killed", "run/checkpoints/5/params/d/0"] = (b"torn", 1)
    assert saved_steps("gs://killed/run") == [2, 4]
    train("gs://killed/run")
    assert [line["step"] for line in metrics.read("gs://killed/run")] == [2, 4, 6]
    assert not [name for name in names("killed") if name.startswith("run/checkpoints/5/")]


def test_lines_come_before_their_checkpoint(objects, monkeypatch):
    """A run that is killed right after a commit has every line up to it."""
    order = []
    put = dict.__setitem__
    monkeypatch.setattr(metrics, "PUSH_SECONDS", 1e9)

    class Watched(dict):
        def __setitem__(self, key, value):
            order.append(key[1])
            put(self, key, value)

    monkeypatch.setattr(Bucket, "objects", Watched(Bucket.objects))
    train("gs://order/run", with_training(steps=2))
    assert order.index("run/metrics.jsonl") < order.index("run/checkpoints/2/commit_success.txt")


def test_a_workdir_is_carried_into_a_bucket_and_out_of_it(whole, tmp_path):
    folder, _ = whole
    train(tmp_path / "begun", with_training(steps=2))
    put_folder(tmp_path / "begun", "gs://carried/run")
    train("gs://carried/run", with_training(steps=4))
    get_folder("gs://carried/run", tmp_path / "back")
    train(tmp_path / "back")
    same_state(folder, tmp_path / "back")


def test_a_step_that_lost_an_object_is_put_aside(objects, caplog):
    address = "gs://damaged/run"
    train(address, with_training(steps=4))
    step = locate(address) / "checkpoints" / "4"
    assert json.loads((step / MANIFEST).read_text()) and damage(step) == ""
    weights = [key for key in objects if key[0] == "damaged" and key[1].startswith("run/checkpoints/4/params")]
    largest = max(weights, key=lambda key: len(objects[key][0]))
    objects[largest] = (objects[largest][0][:-1], objects[largest][1])
    assert "checksum" in damage(step)
    train(address)
    assert "checkpoint 4 of gs://damaged/run is damaged" in caplog.text
    assert (locate(address) / DAMAGED / "4.0").is_dir() and saved_steps(address) == [2, 4, 6]
    assert damage(locate(address) / "checkpoints" / "4") == ""


def test_a_bucket_holds_no_run_before_there_is_one(objects):
    assert saved_steps("gs://empty/run") == [] and metrics.read("gs://empty/run") == []
    with pytest.raises(UserError, match="gs://empty/run is not the workdir of a run"):
        read_params("gs://empty/run")
