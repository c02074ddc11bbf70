"""Laws of checkpoints: complete and bit for bit, damage is seen, another run's config is refused, any mesh restores."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy_stage import toy_batch, toy_config, toy_stage

from lwd_jax import config as configs
from lwd_jax.config import to_json
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.parallel.rules import path_string
from lwd_jax.train import checkpoint
from lwd_jax.train.checkpoint import (
    DAMAGED,
    MANIFEST,
    Checkpoints,
    check_same_run,
    damage,
    params_fingerprint,
    read_params,
    saved_steps,
)
from lwd_jax.train.program import build_program
from lwd_jax.train.state import eval_params
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat, nested

CONFIG = toy_config()


@functools.cache
def program(fsdp=1, config=CONFIG):
    return build_program(config, make_mesh(configs.Mesh(fsdp=fsdp), jax.devices()[:fsdp]), toy_stage())


def after(steps, config=CONFIG):
    state = program(1, config).init(jax.random.key(0))
    for i in range(steps):
        state, _ = program(1, config).step(state, toy_batch(i), jax.random.key(1))
    return state


@pytest.fixture
def saved(tmp_path):
    """A workdir with steps 1 and 2, and the state at 2."""
    state = after(1)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(state, {"index": 1}, CONFIG)
    state, _ = program().step(state, toy_batch(1), jax.random.key(1))
    checkpoints.save(state, {"index": 2}, CONFIG)
    checkpoints.finish(2)
    checkpoints.close()
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    return tmp_path, jax.device_get(state)


def restore(workdir, config=CONFIG, fsdp=1):
    checkpoints = Checkpoints(workdir, keep=3)
    try:
        return checkpoints.restore(program(fsdp).state, config)
    finally:
        checkpoints.close()


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_the_state_comes_back_bit_for_bit_and_typed(saved):
    workdir, state = saved
    found = restore(workdir)
    same(found.state, state)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert jax.tree.map(lambda a: a.dtype, found.state) == jax.tree.map(lambda a: a.dtype, state)
    assert found.data == {"index": 2}


def test_a_save_is_not_touched_by_later_steps(tmp_path):
    """The state is donated to the next step while the save still runs."""
    state = after(1)
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {}, CONFIG)
    for i in range(1, 20):
        state, _ = program().step(state, toy_batch(i), jax.random.key(1))
    checkpoints.finish(1)
    same(checkpoints.restore(program().state, CONFIG).state, expected)
    checkpoints.close()


@pytest.mark.parametrize("fsdp", [2, 8])
def test_another_mesh_restores_the_same_numbers(saved, fsdp):
    workdir, state = saved
    found = restore(workdir, fsdp=fsdp).state
    same(found, state)
    assert found.params["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 16 // fsdp, 16)


def test_a_new_workdir_has_nothing(tmp_path):
    assert saved_steps(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="no sound checkpoint"):
        restore(tmp_path)
    assert saved_steps(tmp_path) == []


def data_files(step):
    return [path for path in step.rglob("*") if path.is_file() and path.name != MANIFEST and path.stat().st_size]


def test_every_file_of_a_step_is_in_its_manifest(saved):
    step = saved[0] / "checkpoints" / "2"
    assert len(json.loads((step / MANIFEST).read_text())) >= len(data_files(step)) > 5
    assert damage(step) == ""


def test_one_flipped_bit_is_seen_anywhere(saved):
    step = saved[0] / "checkpoints" / "2"
    random = np.random.default_rng(0)
    for path in data_files(step):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        assert path.name in damage(step)
        path.write_bytes(whole)
    assert damage(step) == ""


def test_a_damaged_step_is_named_and_the_one_before_is_used(saved, caplog):
    workdir, _ = saved
    largest = max(data_files(workdir / "checkpoints" / "2"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        params, _, step = read_params(workdir)
        found = restore(workdir)
    assert step == int(found.state.step) == 1 and found.data == {"index": 1}
    assert f"checkpoint 2 of {workdir}" in caplog.text and largest.name in caplog.text
    assert (workdir / DAMAGED / "2.0").is_dir()
    same(params, eval_params(found.state))


def test_a_file_that_was_not_saved_is_damage_too(saved):
    """Of two copies that were mixed up, say: TensorStore reads what it finds."""
    step = saved[0] / "checkpoints" / "2"
    (step / "params" / "stray").write_bytes(b"1")
    assert damage(step).startswith("params/stray ")


def test_only_damaged_steps_is_a_clear_mistake(saved):
    workdir, _ = saved
    for step in ("1", "2"):
        max(data_files(workdir / "checkpoints" / step), key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(UserError, match="no sound checkpoint"):
        read_params(workdir)
    with pytest.raises(UserError, match="no sound checkpoint"):
        restore(workdir)


def test_a_step_without_its_manifest_still_counts(saved):
    """Killed between the commit and the manifest."""
    workdir, state = saved
    (workdir / "checkpoints" / "2" / MANIFEST).unlink()
    same(restore(workdir).state, state)


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 1),
        ("optimizer.learning_rate", 0.5),
        ("data.batch_size", 4),
        ("models.backbone_variant", "tiny"),
        ("matching.floor", 0.2),
        ("training.ema", 0.5),
        ("param_dtype", "bfloat16"),
    ],
)
def test_another_run_is_refused_by_name(saved, field, value):
    section, _, name = field.rpartition(".")
    values = {name: value} if not section else {section: dataclasses.replace(getattr(CONFIG, section), **{name: value})}
    with pytest.raises(UserError, match=f"{field} = .*{value}"):
        restore(saved[0], dataclasses.replace(CONFIG, **values))


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:-1] or ("another",)
    return value + ("another" if isinstance(value, str) else 1)


def test_a_run_goes_on_with_other_values_of_what_changes_no_number_alone(tmp_path):
    """Every other field is refused by its name, also one that is new to the config."""
    fields, free = flat(dataclasses.asdict(CONFIG)), set()
    for path, value in fields.items():
        try:
            changed = configs.from_json(nested(fields | {path: another(value)}))
            check_same_run(dataclasses.asdict(CONFIG), changed, tmp_path)
            free.add(path)
        except UserError as error:
            assert f"started with {path.replace('/', '.')} = {value!r}, but" in str(error)
    training = ("steps", "log_every", "save_every", "keep", "preview_every", "preview_prompts", "nonfinite_limit")
    assert {path for path in free if not path.startswith(("mesh/", "sampling/"))} == {
        "name", "remat", "data/workers", "training/profile_start", "training/profile_stop",
        *(f"training/{name}" for name in training),
    }  # fmt: skip
    assert {path for path in fields if path.startswith(("mesh/", "sampling/"))} <= free


def test_one_place_may_be_written_in_two_ways(saved, tmp_path, monkeypatch):
    """A run that began with a relative path goes on with an absolute one, or through a link."""
    workdir, _ = saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").symlink_to(tmp_path)

    def at(name):
        return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, latents=name))

    for name in (str(tmp_path / "latents"), "./latents", "here/latents"):
        check_same_run(dataclasses.asdict(at("latents")), at(name), workdir)
    for name in ("", "other", "gs://bucket/latents"):
        with pytest.raises(UserError, match="data.latents = 'latents'"):
            check_same_run(dataclasses.asdict(at("latents")), at(name), workdir)


def test_harmless_changes_are_not_refused(saved):
    training = dataclasses.replace(CONFIG.training, steps=50, log_every=1, save_every=7, keep=9, preview_prompts=("a",))
    data = dataclasses.replace(CONFIG.data, workers=0)
    mesh = configs.Mesh(data=2)
    changes = {"name": "b", "remat": "full", "training": training, "data": data, "mesh": mesh}
    assert restore(saved[0], dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_are_not_harmless_where_the_rate_depends_on_them(tmp_path, schedule):
    config = toy_config(optimizer={"schedule": schedule})
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=99))
    with pytest.raises(UserError, match="training.steps = 6"):
        check_same_run(dataclasses.asdict(config), longer, tmp_path)


def test_a_silent_cast_is_refused(saved):
    """Orbax would cast; here the parameter is named."""
    workdir, _ = saved
    state = program().state
    half = state._replace(
        params=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), state.params)
    )
    checkpoints = Checkpoints(workdir, keep=3)
    with pytest.raises(UserError, match="blocks/k/kernel.*float32.*bfloat16"):
        checkpoints.restore(half, CONFIG)
    checkpoints.close()


def test_a_state_kept_in_another_shape_is_refused_by_name(saved):
    """By an earlier version, say: Orbax would end in a traceback."""
    workdir, _ = saved
    state = program().state
    named = jax.tree_util.tree_leaves_with_path(state.opt_state)
    path = next(path for path, leaf in named if leaf.ndim == 2)
    other = jax.tree_util.tree_map_with_path(
        lambda at, a: jax.ShapeDtypeStruct((5, 3), a.dtype, sharding=a.sharding) if at == path else a, state.opt_state
    )
    checkpoints = Checkpoints(workdir, keep=3)
    with pytest.raises(UserError, match=rf"'opt_state/{path_string(path)}' in shape .*keeps \(5, 3\)"):
        checkpoints.restore(state._replace(opt_state=other), CONFIG)
    checkpoints.close()


def test_read_params_gives_the_average_or_the_plain_ones(saved):
    workdir, state = saved
    average, config, step = read_params(workdir)
    plain, _, _ = read_params(workdir, ema=False)
    assert step == 2 and config == CONFIG
    same(average, eval_params(state))
    same(plain, state.params)
    assert np.any(average["blocks"]["q"]["kernel"] != plain["blocks"]["q"]["kernel"])
    assert isinstance(average["blocks"]["q"]["kernel"], jax.Array)


@pytest.mark.parametrize("ema", [True, False])
def test_its_fingerprint_is_read_one_parameter_at_a_time_on_the_host(saved, monkeypatch, ema):
    workdir, _ = saved
    params = read_params(workdir, ema)[0]
    seen, restored = [], checkpoint._restored

    def watched(*arguments):
        found = restored(*arguments)
        seen.extend(found.items())
        assert len(found) == 1 and all(isinstance(leaf, np.ndarray) for leaf in found.values())
        return found

    monkeypatch.setattr(checkpoint, "_restored", watched)
    assert params_fingerprint(workdir, ema) == fingerprint(params)
    assert [name for name, _ in seen] == sorted(flat(params))


@pytest.mark.parametrize("moment", ["judged", "described", "restored", "closed"])
def test_a_step_that_its_run_removes_meanwhile_is_not_read(tmp_path, monkeypatch, caplog, moment):
    """A run that keeps one checkpoint saves the next, and removes this one, just before it is judged, ..., closed."""
    checkpoints, state = Checkpoints(tmp_path, keep=1), after(1)
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    checkpoints.save(state, {}, CONFIG)
    checkpoints.finish(1)
    state, _ = program().step(state, toy_batch(1), jax.random.key(1))
    place, name = {
        "judged": (checkpoint, "damage"),
        "described": (ocp.CheckpointManager, "item_metadata"),
        "restored": (ocp.CheckpointManager, "restore"),
        "closed": (ocp.CheckpointManager, "close"),
    }[moment]
    original, saving = getattr(place, name), iter([True])

    def meanwhile(*args, **kwargs):
        if next(saving, False):
            checkpoints.save(state, {}, CONFIG)
            checkpoints.finish(2)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, meanwhile)
    with caplog.at_level(logging.WARNING):
        params, _, step = read_params(tmp_path, ema=False)
    assert step == 2 and saved_steps(tmp_path) == [2] and "was removed while it was read" in caplog.text
    assert "damaged" not in caplog.text
    same(params, state.params)
    monkeypatch.undo()
    checkpoints.close()


def test_what_cannot_be_read_is_no_removed_step(saved, monkeypatch):
    """The error is the reader's own, not swallowed."""
    workdir, _ = saved

    def fails(*args, **kwargs):
        raise ValueError("of the reader")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    with pytest.raises(ValueError, match="of the reader"):
        read_params(workdir)


def test_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match="not the workdir"):
        read_params(tmp_path)


def test_a_save_that_did_not_arrive_is_noticed(tmp_path):
    """A full disk is silent in Orbax until the next save."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(after(1), {}, CONFIG)
    checkpoints.finish(1)
    with pytest.raises(UserError, match="step 2 is not in"):
        checkpoints.finish(2)
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = after(0)
    for i in range(4):
        checkpoints.save(state._replace(step=jnp.asarray(i, jnp.int32)), {}, CONFIG)
    checkpoints.finish(3)
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()
