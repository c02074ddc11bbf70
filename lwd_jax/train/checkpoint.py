"""Checkpoints: the complete state, the data position and the resolved config, saved by Orbax in the background.

`workdir/checkpoints/<step>/` holds the items `params` (of a run of adapters: these alone), `ema` (if there is one),
`rest` (optimizer, counters) and `run` (JSON).
Orbax commits a step by renaming its folder (in a bucket: by a last file in it), so that a killed run leaves whole steps
only; it does not see bit rot, and a full disk shows only when the save is waited for. So a checksum of every file is
written into the committed step (MANIFEST) and compared before it is read, and `finish` waits and looks.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path
from jax.experimental import multihost_utils

from lwd_jax import config as configs
from lwd_jax.adapters.factors import saved as saved_params
from lwd_jax.errors import Transient, UserError, read_json
from lwd_jax.files import absolute, checksums, files_in, in_bucket, locate, write_whole
from lwd_jax.parallel.processes import verdict
from lwd_jax.parallel.rules import path_string
from lwd_jax.train.state import State
from lwd_jax.train.step import keeps_average
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat, nested

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
_JSON = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata")
DAMAGED = "damaged"  # where a step that fails its manifest is put aside
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A run may be continued with another value of these; every other field changes what is computed.
HARMLESS = re.compile(
    r"^(name|remat|data\.workers|mesh\..*|sampling\..*"
    r"|training\.(steps|log_every|save_every|keep|preview_every|preview_prompts|nonfinite_limit)"
    r"|training\.profile_(start|stop))$"
)

_PLACES = ("data.dataset", "data.latents", "models.autoencoder", "models.backbone")
log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """`state` on its mesh, and `data`, what `batches.state()` gave when it was saved."""

    state: State
    data: dict


# ---------------------------------------------------------------------------------------------------- manifest


def _checksums(step: Path) -> dict[str, tuple[int, int | None]]:
    return {name: sums for name, sums in checksums(step).items() if name != MANIFEST}


def _agree(found: tuple, expected: list) -> bool:
    """Of a step that was carried from a disk into a bucket, or back, one side knows the size alone."""
    return all(new == old for new, old in zip(found, expected) if None not in (new, old))


def write_manifest(step: Path) -> None:
    """`checksums` of the files of a committed step, into its MANIFEST. A step removed meanwhile is left alone."""
    try:
        sums = _checksums(step)
        if not sums:  # a bucket would make the folder again
            raise FileNotFoundError(step)
        write_whole(step / MANIFEST, json.dumps(sums, indent=1).encode())
    except FileNotFoundError:
        log.info("checkpoint %s was removed before its manifest was written", step.name)


def _cut(step: Path) -> str:
    """Which of the JSON files that Orbax writes is none, or ""."""
    for path in files_in(step):
        if path.name in _JSON or path.parent.name == "array_metadatas":
            try:
                json.loads(path.read_text())
            except ValueError:
                return f"{path.relative_to(step)} is not sound JSON"
    return ""


def damage(step: Path) -> str:
    """What is wrong with a step's files, or "": a name and what happened to it. Without a manifest (the run was killed
    in the moment after the commit) only its descriptions can be judged."""
    path = step / MANIFEST
    if not path.is_file():
        return _cut(step)
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        return f"{MANIFEST} cannot be read"
    found = _checksums(step)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected or not _agree(found[name], expected[name]):
            return f"{name} does not have the checksum it was saved with"
    return ""


def _judged(step: Path) -> str:
    """`damage`, as process 0 finds it: one reading of the files, and one verdict for all hosts."""
    return verdict(damage(step) if jax.process_index() == 0 else "")


# ------------------------------------------------------------------------------------------------------ config


def _fields(config: configs.Config) -> dict[str, Any]:
    return {name.replace("/", "."): value for name, value in flat(dataclasses.asdict(config)).items()}


def check_same_run(saved: dict, config: configs.Config, where: Path) -> None:
    """Refuses to continue a run with another description of what is computed.

    Raises:
      UserError: names the field and both values. `training.steps` may change only where the learning rate does not
        depend on it.
    """
    old, new = _fields(configs.from_json(saved)), _fields(config)
    for name in sorted(new):
        if name in _PLACES and _place(old[name]) == _place(new[name]):
            continue
        bound = name == "training.steps" and config.optimizer.schedule != "constant"
        # The base of adapters may have moved: its fingerprint says that it is the same.
        moved = name == "models.backbone" and config.adapter.kind != "none"
        if old[name] != new[name] and (bound or not (moved or HARMLESS.match(name))):
            raise UserError(
                f"The run in {where} was started with {name} = {old[name]!r}, but the config now says {new[name]!r}; "
                "use a new --workdir for another run."
            )


def _place(name: str) -> str:
    """A folder, however it is written."""
    return name if not name or in_bucket(name) else os.path.realpath(name)


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lwd_jax": importlib.metadata.version("lwd_jax"), "python": platform.python_version(), **versions}


def _check_arrays(saved: Any, wanted: Any, step: Path) -> None:
    """Orbax casts silently: compare names, shapes and dtypes of the parameters first."""
    saved, wanted = flat(saved), flat(wanted)
    for name in sorted(saved.keys() | wanted.keys()):
        pair = (saved.get(name), wanted.get(name))
        old, new = ((tuple(a.shape), str(a.dtype)) if a is not None else None for a in pair)
        if old != new:
            raise UserError(
                f"{step} holds the parameter '{name}' as {old or 'nothing'}, but the model of this config has "
                f"{new or 'none'}."
            )


def _check_rest(saved: Any, wanted: Any, step: Path) -> None:
    """The same of the optimizer's state, whose shapes an earlier version may have kept otherwise."""
    saved, wanted = (
        {path_string(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name]:
            raise UserError(
                f"{step} holds '{name}' in shape {saved[name]}, but this version of lwd_jax keeps {wanted[name]}: go "
                "on with the version that began the run, or start a new one from its weights."
            )


# ------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: made if it is not there.
      keep: how many of the newest to keep.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self.folder = absolute(locate(workdir)) / FOLDER
        self._keep = keep
        self._started: int | None = None
        self._unsealed: int | None = None
        self._failed = False
        self._sealing: threading.Thread | None = None
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True, cleanup_tmp_directories=True, create=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=_handlers())

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, data: dict, config: configs.Config) -> None:
        """Starts saving; returns when the state is copied to the host. A step that is there already is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.seal(wait=True)
        items = {
            "params": ocp.args.StandardSave(saved_params(state.params)),
            "rest": ocp.args.StandardSave(_rest(state)),
            "run": ocp.args.JsonSave({"config": dataclasses.asdict(config), "data": data, "versions": _versions()}),
        }
        if keeps_average(config):
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._started = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise self._unwritten(error) from error
        self._unsealed = step

    def _unwritten(self, error: Exception) -> Transient:
        self._failed = True
        return Transient(f"The checkpoint of step {self._started} could not be written to {self.folder}: {error}.")

    def seal(self, wait: bool = False) -> None:
        """Writes the manifest of a committed save, in a thread; called once a step. `wait`: until it is written.

        Raises:
          Transient: waited, and the save failed.
        """
        if wait:
            try:
                self._manager.wait_until_finished()
            except (OSError, ValueError) as error:
                raise self._unwritten(error) from error
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            if jax.process_index() == 0:
                self._sealing = threading.Thread(target=write_manifest, args=(self.folder / str(self._unsealed),))
                self._sealing.start()
            self._unsealed = None
        if wait and self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def finish(self, step: int) -> None:
        """Waits for the last save and looks whether it is there.

        Raises:
          Transient: it is not (the disk is full, say; Orbax does not always raise).
        """
        self.seal(wait=True)
        if self._manager.latest_step() != step or not (self.folder / str(step)).is_dir():
            raise Transient(f"The checkpoint of step {step} is not in {self.folder}; is the disk full?")

    def close(self) -> None:
        """Waits for what is being written and ends the background threads. A failure is told once."""
        if not self._failed:
            self.seal(wait=True)
        with contextlib.suppress(OSError, ValueError) if self._failed else contextlib.nullcontext():
            self._manager.close()

    def preempted(self, step: int) -> bool:
        """Whether a multi-host job has been told to stop (all hosts agree on the step)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def restore(self, abstract: State, config: configs.Config) -> Restored:
        """The newest sound step, on the mesh and with the layouts of `abstract`; of adapters without their base.

        A damaged step is named in a warning and put aside into `damaged/`, and the one before it is used.

        Raises:
          UserError: another run's config, a model of other shapes or dtypes, or no sound step.
        """
        found = ""
        for step in reversed(self.steps()):
            wrong = _judged(self.folder / str(step))
            if not wrong:
                return self._restore(step, abstract, config)
            found += f" (step {step}: {wrong})"
            self._put_aside(step, wrong)
        raise UserError(f"{self.folder.parent} has no sound checkpoint{found}; damaged ones are in {DAMAGED}/.")

    def _put_aside(self, step: int, wrong: str) -> None:
        log.warning("checkpoint %s of %s is damaged (%s); using the one before", step, self.folder.parent, wrong)
        self._manager.close()
        if jax.process_index() == 0:
            aside = self.folder.parent / DAMAGED
            aside.mkdir(exist_ok=True)
            number = next(number for number in itertools.count() if not (aside / f"{step}.{number}").exists())
            # In a bucket this makes the folder, without which nothing can be moved there.
            (aside / f"{step}.{number}.txt").write_text(f"{wrong}\n")
            (self.folder / str(step)).rename(aside / f"{step}.{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoint put aside")
        self._open()

    def _restore(self, step: int, abstract: State, config: configs.Config) -> Restored:
        where = self.folder / str(step)
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        check_same_run(run["config"], config, self.folder.parent)
        params = saved_params(abstract.params)
        stored, rest = self._manager.item_metadata(step), _rest(abstract)
        _check_arrays(stored.params.tree, params, where)
        _check_rest(stored.rest.tree, rest, where)
        items = {
            "params": ocp.args.StandardRestore(params),
            "rest": ocp.args.StandardRestore(rest),
        }
        if keeps_average(config):
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Restored(State(params=found.params, ema=found.ema if "ema" in items else {}, **found.rest), run["data"])


def _handlers() -> dict:
    """How each item is stored; without them a new process cannot read what the items are before it restores them."""
    standard = {name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "rest")}
    return standard | {"run": ocp.JsonCheckpointHandler()}


def _rest(state: State) -> dict:
    return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped, "streak": state.streak}


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps that a workdir holds whole checkpoints of, in order; [] of a folder that is not there."""
    committed = ocp.utils.checkpoint_steps_paths(locate(workdir) / FOLDER)
    return sorted(int(path.name) for path in committed if path.name.isdigit())


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether a run was started there."""
    return (locate(path) / FOLDER).is_dir()


def read_config(workdir: str | os.PathLike) -> configs.Config:
    """The resolved config of a run.

    Raises:
      UserError: the folder is not a workdir.
    """
    file = locate(workdir) / "config.json"
    if not file.is_file() or not is_workdir(workdir):
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json and {FOLDER}/.")
    return configs.from_json(read_json(file))


def read_params(
    workdir: str | os.PathLike, ema: bool = True, *, shardings=None, like=None
) -> tuple[Any, configs.Config, int]:
    """The trained parameters of a run's newest sound checkpoint.

    Args:
      workdir: of a run.
      ema: the averaged ones, where the run keeps an average. Of schedule-free AdamW always its average.
      shardings: a function from the abstract parameters to layouts; None = the default device.
      like: a tree like the parameters, whose dtypes they are cast to as they are read; None = as they were saved.

    Returns:
      (params, the run's config, the step).

    Raises:
      UserError: not a workdir, or no sound checkpoint.
    """

    def read(manager, step, config):
        stored, sources = _stored(manager, step, config, ema)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = flat(shardings(nested(stored)) if shardings else dict.fromkeys(stored, here))
        wanted = stored if like is None else flat(like)
        found = {}
        for item, paths in sources.items():
            leaves = {
                path: jax.ShapeDtypeStruct(stored[path].shape, wanted[path].dtype, sharding=places[path])
                for path in paths
            }
            found |= _restored(manager, step, item, leaves)
        return nested(found)

    return _of_newest(workdir, read)


class _OnDisk(NamedTuple):
    """A parameter of a checkpoint; np.asarray reads it to the host."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)


def params_fingerprint(workdir: str | os.PathLike, ema: bool = True) -> str:
    """The fingerprint (weights.folder) of what `read_params` gives; one parameter at a time is read, on the host.

    Raises:
      UserError: see `read_params`.
    """

    def read(manager, step, config):
        stored, sources = _stored(manager, step, config, ema)

        def leaf(item, path):
            return _OnDisk(stored[path].shape, lambda: _restored(manager, step, item, {path: stored[path]})[path])

        return fingerprint(nested({path: leaf(item, path) for item, paths in sources.items() for path in paths}))

    return _of_newest(workdir, read)[0]


def _of_newest(workdir: str | os.PathLike, read: Callable) -> tuple[Any, configs.Config, int]:
    """`read(manager, step, config)` of a run's newest sound checkpoint, the run's config, and the step."""
    config = read_config(workdir)
    folder = absolute(locate(workdir)) / FOLDER
    found, passed = "", set()
    while new := [step for step in saved_steps(workdir) if step not in passed]:
        step = new[-1]
        where, files = folder / str(step), files_in(folder / str(step))
        passed.add(step)
        try:
            wrong = damage(where)
            with contextlib.closing(_reader(folder)) as manager:
                result = None if wrong else read(manager, step, config)
        except Exception:  # a missing file comes as an error of many kinds
            if not _removed(where, files):
                raise
        # Looked at last of all: in place of a chunk whose index is gone TensorStore may give zeros.
        if _removed(where, files):
            log.warning("checkpoint %s of %s was removed while it was read; taking a newer one", step, workdir)
        elif wrong:
            found += f" (step {step}: {wrong})"
            log.warning("checkpoint %s of %s is damaged (%s); using the one before", step, workdir, wrong)
        else:
            return result, config, step
    raise UserError(f"{workdir} has no sound checkpoint{found or ' yet'}.")


def _removed(step: Path, files: list[Path]) -> bool:
    """Whether a step that had these files is going, as the oldest goes when its run has saved another."""
    return not files or not set(files) <= set(files_in(step))


def _reader(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True)
    # These handlers can leave out what is not asked for; the files are the same.
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in ("params", "ema")}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _stored(manager: ocp.CheckpointManager, step: int, config: configs.Config, ema: bool) -> tuple[dict, dict]:
    """Shapes and dtypes of the parameters by path, and which of them to read from which item: (leaves, item -> paths).
    Every parameter once, from the average where it has one."""
    averaged = keeps_average(config) and (ema or config.optimizer.name == "schedule_free_adamw")
    items = manager.item_metadata(step)
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(items.params.tree).items()}
    average = flat(items.ema.tree).keys() if averaged else set()
    sources = {"params": sorted(leaves.keys() - average), "ema": sorted(average)}
    return leaves, {item: paths for item, paths in sources.items() if paths}


def _restored(manager: ocp.CheckpointManager, step: int, item: str, leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves of one item of a step in the dtypes and layouts of the given ones; without a layout on the host."""
    tree = nested(leaves)
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    if any(leaf.sharding is None for leaf in leaves.values()):
        how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), tree)
    wanted = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
    return flat(manager.restore(step, args=ocp.args.Composite(**{item: wanted}))[item])
