"""Laws of the loop: resuming is the uninterrupted run, no line is there twice, a bad run ends by name, signals save."""

import dataclasses
import functools
import json
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from full_disk import full_disk
from toy_stage import ToyBatches, toy_batch, toy_config, toy_params, toy_stage

from lwd_jax import config as configs
from lwd_jax.config import from_json
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train import loop, metrics
from lwd_jax.train.checkpoint import Checkpoints, read_params
from lwd_jax.train.feed import Fed
from lwd_jax.train.loop import run
from lwd_jax.train.program import build_program

CONFIG = toy_config()
MESH = make_mesh(configs.Mesh(), jax.devices()[:1])


@functools.cache
def program():
    return build_program(CONFIG, MESH, toy_stage())


def train(workdir, config=CONFIG, batches=ToyBatches, **options):
    return run(program(), batches and batches(), config, workdir, MESH, description="{}", **options)


def with_training(**values):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **values))


def state_of(workdir):
    checkpoints = Checkpoints(workdir, keep=3)
    restored = checkpoints.restore(program().state, CONFIG)
    checkpoints.close()
    return jax.device_get(restored.state), restored.data


def lines(workdir):
    """metrics.jsonl without what a clock measured."""
    timed = ("pictures_per_second", "data_wait_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in metrics.read(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert train(workdir) == (6, 0)
    return workdir


def test_a_run_writes_its_files(whole):
    assert from_json(json.loads((whole / "config.json").read_text())) == CONFIG
    assert (whole / "model.json").read_text() == "{}"
    assert any((whole / "tb").iterdir())
    assert [line["step"] for line in metrics.read(whole)] == [2, 4, 6]
    for line in metrics.read(whole):
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["pictures_per_second"] > 0 and line["skipped"] == 0
        assert 0 <= line["data_wait_share"] <= 1 and line["learning_rate"] == pytest.approx(1e-2)
        assert len(line["loss_by_time"]) == 2 and line["count_by_time"] == [2.0, 14.0]


def test_resuming_is_the_uninterrupted_run(whole, tmp_path):
    """State, data position and metrics, bit for bit; stopped at a save and between two log lines."""
    train(tmp_path, with_training(steps=3))
    assert train(tmp_path).step == 6
    (first, position), (second, other) = state_of(whole), state_of(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert position == other == {"index": 6}
    assert lines(tmp_path)[-1] == lines(whole)[-1]


def test_lines_after_the_restored_step_are_written_once(tmp_path):
    train(tmp_path, with_training(steps=4))
    with open(tmp_path / metrics.FILE, "a") as file:  # as a run leaves them that is killed after its last save
        file.write(json.dumps({"step": 5, "loss": 1.0}) + "\n" + '{"step": 6, "lo')
    train(tmp_path)
    assert [line["step"] for line in metrics.read(tmp_path)] == [2, 4, 6]


def test_a_finished_run_does_nothing_more(whole):
    before = (whole / metrics.FILE).read_bytes()
    assert train(whole, batches=None) == (6, 0)
    assert (whole / metrics.FILE).read_bytes() == before


def test_a_full_disk_names_the_step(tmp_path):
    with full_disk(9_000), pytest.raises(UserError, match="The checkpoint of step 2 could not be written to"):
        train(tmp_path)
    assert train(tmp_path) == (6, 0)


def test_one_run_at_a_time_in_a_workdir(whole, tmp_path):
    """Another run is refused while one is there, also before its first save, and touches nothing."""
    other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)

    def previews(step, params):
        with pytest.raises(UserError, match="is being written to by another process"):
            train(tmp_path, other)
        return {}

    assert train(tmp_path, with_training(preview_every=3), previews=previews) == (6, 0)
    assert from_json(json.loads((tmp_path / "config.json").read_text())).seed == CONFIG.seed
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path)[0], state_of(whole)[0])


def test_a_run_that_another_overtook_does_not_begin(tmp_path, monkeypatch):
    """It looked for checkpoints, and when it could write another run had come and gone."""
    first_state = loop._first_state

    def slowly(*arguments):
        monkeypatch.undo()
        train(tmp_path, with_training(steps=2))
        return first_state(*arguments)

    monkeypatch.setattr(loop, "_first_state", slowly)
    with pytest.raises(UserError, match="not this run's to write to: another run wrote checkpoints there"):
        train(tmp_path)
    assert state_of(tmp_path)[0].step == 2


def test_previews_are_called_at_fixed_steps_with_the_average(tmp_path):
    seen = {}

    def previews(step, params):
        seen[step] = jax.tree.map(np.array, params)
        return {"psnr": 10.0 + step}

    train(tmp_path, with_training(preview_every=3, steps=4), previews=previews)
    assert sorted(seen) == [0, 3, 4]
    shown = {line["step"]: line["preview/psnr"] for line in metrics.read(tmp_path) if "preview/psnr" in line}
    assert shown == {0: 10, 3: 13, 4: 14}
    assert [line["step"] for line in metrics.read(tmp_path) if "loss" in line] == [2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, seen[4], jax.device_get(read_params(tmp_path)[0]))


def test_lines_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    """Mounted buckets get a file when it is synchronised, and no sooner."""
    happened, sync, save = [], os.fsync, Checkpoints.save

    def synced(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith(metrics.FILE):
            happened.append(len(metrics.read(tmp_path)))
        return sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Checkpoints, "save", lambda *given: happened.append("save") or save(*given))
    train(tmp_path)
    assert happened == [1, "save", 2, "save", 3, "save"]


@pytest.mark.parametrize("ends", ["killed", "signalled"])
def test_what_was_reached_is_saved_before_it_is_looked_at(whole, tmp_path, monkeypatch, ends):
    """A run that ends in its previews, or before them by a signal, has the step; resumed, it looks at it once."""
    seen, killed, training = [], [], with_training(save_every=3, preview_every=3)

    def previews(step, params):
        if (step, ends) == (3, "killed") and killed == []:
            killed.append(step)
            raise RuntimeError("killed")
        seen.append(step)
        return {"psnr": 1.0}

    if ends == "killed":
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path, training, previews=previews)
    else:
        save = Checkpoints.save
        monkeypatch.setattr(Checkpoints, "save", lambda *given: save(*given) or os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path, training, previews=previews) == (3, signal.SIGTERM)
        monkeypatch.undo()
    assert seen == [0] and state_of(tmp_path)[0].step == 3
    assert train(tmp_path, training, previews=previews) == (6, 0)
    assert seen == [0, 3, 6]
    assert [line["step"] for line in metrics.read(tmp_path) if "preview/psnr" in line] == [0, 3, 6]
    jax.tree.map(np.testing.assert_array_equal, state_of(whole)[0], state_of(tmp_path)[0])


def test_given_parameters_are_the_start(tmp_path):
    given = jax.tree.map(lambda p: np.asarray(p) * 2, program().init(jax.random.key(0)).params)
    seen = []
    train(
        tmp_path, with_training(steps=1, preview_every=1), params=lambda: given,
        previews=lambda step, params: seen.append(jax.tree.map(np.array, params)) or {},
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, given, seen[0])


def test_the_seed_draws_the_initial_weights_and_the_noise_of_every_step(tmp_path):
    found = []
    for seed in (0, 1):

        def init(key, params):
            found.append(float(jax.random.normal(key)))
            return program().init(key, toy_params())  # the same, so that nothing but noise changes the loss

        config = dataclasses.replace(with_training(steps=1), seed=seed)
        run(program()._replace(init=init), ToyBatches(), config, tmp_path / f"{seed}", MESH, description="{}")
        found.append(metrics.read(tmp_path / f"{seed}")[0]["loss"])
    (draw, loss), (other_draw, other_loss) = found[:2], found[2:]
    assert draw != other_draw and loss != other_loss


def test_the_speed_is_of_all_pictures_of_a_batch_and_of_the_seconds_of_training(tmp_path, monkeypatch):
    """Every step takes a second and waits another for its batch; what previews and saving take is left out."""
    clock = SimpleNamespace(now=0.0)

    class SlowFeed:
        waited, replaced = 0.0, 0

        def __init__(self, batches, mesh):
            self._batches = batches

        def __next__(self):
            clock.now += 1
            self.waited += 1
            return Fed(next(self._batches), self._batches.state(), 0)

        def close(self):
            pass

    def step(*given):
        clock.now += 1
        return program().step(*given)

    def previews(step, params):
        clock.now += 5
        return {}

    def save(checkpoints, *given):
        clock.now += 7
        return saving(checkpoints, *given)

    saving = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    for room in (loop, metrics):
        monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now))
    monkeypatch.setattr(loop, "Feed", SlowFeed)
    config = with_training(steps=3, log_every=100, preview_every=1)
    run(program()._replace(step=step), ToyBatches(), config, tmp_path, MESH, description="{}", previews=previews)
    names = ("step", "pictures_per_second", "data_wait_share")
    found = [tuple(map(line.get, names)) for line in metrics.read(tmp_path)]
    assert found == [(1, 4.0, 0.5), (2, 4.0, 0.5), (3, 4.0, 0.5)]


def poisoned(index):
    batch = toy_batch(index)
    if index >= 2:
        batch["weight"][0] = np.inf
    return batch


def test_a_run_that_stays_non_finite_ends_by_name(tmp_path):
    with pytest.raises(UserError, match="loss and grad_norm not finite for 3 steps in a row, up to step 5"):
        train(tmp_path, with_training(nonfinite_limit=3, save_every=100), functools.partial(ToyBatches, make=poisoned))


def test_skipped_steps_are_counted_and_do_not_spoil_the_means(tmp_path):
    train(tmp_path, with_training(steps=4, log_every=3, save_every=100), functools.partial(ToyBatches, make=poisoned))
    first, second = metrics.read(tmp_path)
    assert first["skipped"] == 1 and first["loss"] > 0 and second["skipped"] == 2 and "loss" not in second


class SignalledBatches(ToyBatches):
    """Sends this process SIGTERM when batch 3 is read."""

    def __next__(self):
        batch = super().__next__()
        if self.index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def test_sigterm_saves_and_the_same_command_resumes(whole, tmp_path):
    outcome = train(tmp_path, with_training(steps=100_000, save_every=100_000), SignalledBatches)
    assert outcome.signal == signal.SIGTERM and 1 <= outcome.step < 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert state_of(tmp_path)[1] == {"index": outcome.step}
    train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state_of(whole)[0], state_of(tmp_path)[0])


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    """The run is whole, and who asked for an end is told of it."""

    def previews(step, params):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    assert train(tmp_path, with_training(preview_every=6), previews=previews) == (6, signal.SIGTERM)


def test_metrics_are_fetched_a_step_late(tmp_path, monkeypatch):
    """The next step has begun before the host waits for one."""
    happened, made, fetch = [], [], jax.device_get

    def step(*given):
        state, found = program().step(*given)
        made.append(found)
        happened.append(f"begin {len(made)}")
        return state, found

    def fetched(value):
        happened.extend(f"fetch {number}" for number, found in enumerate(made, 1) if found is value)
        return fetch(value)

    monkeypatch.setattr(jax, "device_get", fetched)
    config = with_training(steps=4, save_every=4)
    run(program()._replace(step=step), ToyBatches(), config, tmp_path, MESH, description="{}")
    later = [word for number in (1, 2, 3) for word in (f"begin {number + 1}", f"fetch {number}")]
    assert happened == ["begin 1", *later, "fetch 4"]


def test_a_reader_that_fails_ends_the_run_with_its_own_error(tmp_path):
    class Failing(ToyBatches):
        def __next__(self):
            raise UserError("The dataset is gone.")

    with pytest.raises(UserError, match="dataset is gone"):
        train(tmp_path, batches=Failing)


def test_a_profile_is_written(tmp_path):
    train(tmp_path, with_training(steps=3, profile_start=2, profile_stop=3))
    assert any((tmp_path / "profile").rglob("*.pb"))
