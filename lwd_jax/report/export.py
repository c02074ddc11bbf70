"""Between workdirs and diffusers folders: `export` writes what diffusers' pipeline reads, `import_models` reads it."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
from etils.epath import Path

from lwd_jax.adapters.factors import merged, saved
from lwd_jax.adapters.lora import settings_of
from lwd_jax.adapters.peft import FILE, KOHYA_FILE, as_kohya, as_peft, read_file, write_file
from lwd_jax.autoencoders import save_autoencoder
from lwd_jax.backbones import class_of, extend_backbone, save_backbone, weights_of
from lwd_jax.config import Config, Models, Sampling, Training, to_json
from lwd_jax.errors import UserError, choose, read_json
from lwd_jax.files import locate, locked
from lwd_jax.report.card import write_card
from lwd_jax.report.pipeline import (
    DYNAMIC_SHIFT,
    FAMILIES,
    MANIFEST,
    TEXT_PARTS,
    Family,
    FolderModels,
    WorkdirModels,
    open_models,
)
from lwd_jax.report.progress import Show, ignore, shown
from lwd_jax.report.staging import check_free, staged
from lwd_jax.sample.schedule import TRAIN_TIMES
from lwd_jax.sample.solvers import SCHEDULERS
from lwd_jax.train.checkpoint import FOLDER, Checkpoints
from lwd_jax.train.checkpoint import MANIFEST as SEAL
from lwd_jax.train.models import BACKBONE, MODEL_FILE, TRAINED, Kind, Opened, describe, open_model, read_description
from lwd_jax.train.state import State
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.model import Model

INDEX = "model_index.json"
DIFFUSERS_VERSION = "0.35.0"  # the release whose fields the files below have
IMPORTED = f"{FOLDER}/0/{SEAL}"  # what an import has and no run: a run saves after its first step
DTYPES = ("float32", "bfloat16", "float16")
# What comes of a run of adapters: a pipeline with them in its weights, or a file of them alone.
FORMS = {"merged": None, "adapter": (FILE, as_peft), "kohya": (KOHYA_FILE, as_kohya)}


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system allows one: text encoders are gigabytes and are never written to again."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _add_text(folder: Path, models: WorkdirModels, family: Family) -> dict:
    """Puts the text encoders and tokenizers of the base models beside the rest; their entries of model_index.json."""
    source = models.text_folder() if models.text().get("kind") == family.text else None
    if source is None:
        return dict.fromkeys(family.parts, (None, None))
    index = read_json(source / INDEX)
    present = [part for part in family.parts if (source / part).is_dir()]
    for part in present:
        shutil.copytree(source / part, folder / part, copy_function=_link_or_copy)
    return {part: index[part] if part in present else (None, None) for part in family.parts}


def _add_scheduler(folder: Path, sampling: Sampling, family: Family) -> str:
    """The scheduler that does what the run samples with, as far as the pipeline runs with it; its class."""
    name = choose(SCHEDULERS, family.solver or sampling.solver, "solver")
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": TRAIN_TIMES,
        "shift": sampling.shift,
    }
    if sampling.shift_rule == "dynamic":
        scheduler |= {"use_dynamic_shifting": True} | DYNAMIC_SHIFT
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return name


def _export_autoencoder(folder: Path, models: WorkdirModels, dtype, show: Show) -> tuple[dict, dict, int]:
    """Stage 1: (entries of model_index.json, fingerprints, step). An autoencoder alone is no pipeline: no entries."""
    with shown(show, "reading the autoencoder"):
        _, module, params, step = models.trained()
    with shown(show, "writing the autoencoder"):
        save_autoencoder(folder / "vae", module, params, dtype=dtype)
        return {}, {"autoencoder": fingerprint(params)}, step


def _export_pipeline(folder: Path, models: WorkdirModels, dtype, show: Show) -> tuple[dict, dict, int]:
    """Stage 2: the same, one model in memory at a time."""
    with shown(show, "autoencoder"):
        module, params = models.autoencoder()
        save_autoencoder(folder / "vae", module, params, dtype=dtype)
        fingerprints = {"autoencoder": fingerprint(params)}
        del params
    with shown(show, "reading the backbone"):
        _, module, params, step = models.trained()
        module, params = extend_backbone(module, merged(params), models.config.resolution)
    with shown(show, "writing the backbone"):
        save_backbone(folder / "transformer", module, params, dtype=dtype)
        fingerprints["backbone"] = fingerprint(params)
    name = class_of(module)
    family = FAMILIES[name]
    parts = {
        "_class_name": family.pipeline,
        "scheduler": ("diffusers", _add_scheduler(folder, models.sampling(), family)),
        "transformer": ("diffusers", name),
        "vae": ("diffusers", "AutoencoderKL"),
        "image_encoder": (None, None),
        "feature_extractor": (None, None),
    }
    with shown(show, "text encoders"):
        return parts | _add_text(folder, models, family), fingerprints, step


def _export_adapters(folder: Path, models: WorkdirModels, dtype, show: Show, form: str) -> tuple[dict, dict, int]:
    """The adapters of a run alone; of model_index.json, which does not come of it, the pipeline they are for."""
    name, layout = FORMS[form]
    with shown(show, "reading the backbone and its adapters"):
        _, module, params, step = models.trained()
    write_file(folder / name, weights_of(module), params, layout=layout, dtype=dtype)
    base = read_description(models.path)["base"]["fingerprint"]
    parts = {"_class_name": FAMILIES[class_of(module)].pipeline}
    return parts, {"adapters": fingerprint(saved(params)), "their base": base}, step


def _writer(models: WorkdirModels, form: str):
    """What writes a form: (folder, models, dtype, show) -> (entries of model_index.json, fingerprints, step)."""
    if choose(FORMS, form, "form of export") is None:
        return _export_autoencoder if models.config.stage == 1 else _export_pipeline
    if not models.has_adapters():
        raise UserError(f"'{models.path}' trained no adapters that could be written as '{form}'.")
    return functools.partial(_export_adapters, form=form)


def _origin(models: WorkdirModels) -> dict:
    """What the manifest says of the run."""
    second = models.config.stage == 2
    return {
        "stage": models.config.stage,
        "weights": models.describe()["weights"],
        "text": models.text() if second else {},
        "sampling": dataclasses.asdict(models.sampling()) if second else {},
        "config": dataclasses.asdict(models.config),
    }


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    ema: bool = True,
    dtype: str = "float32",
    autoencoder: str = "",
    base: str = "",
    form: str = "merged",
    overwrite: bool = False,
    on_progress: Show = ignore,
) -> Path:
    """Writes a run's models as a diffusers folder with a model card, or its adapters alone; whole or not at all.

    Stage 1 gives `vae/` alone, stage 2 a pipeline; text encoders come along where the models it started from had them.
    A position table that ends before the run's resolution is extended to it, because diffusers does not interpolate it.

    Args:
      workdir: of the run.
      out: the folder, new or empty.
      ema: the averaged weights, where the run kept an average; False: the plain ones.
      dtype: of the files, one of DTYPES.
      autoencoder: another folder or workdir to take the autoencoder of stage 2 from.
      base: of a run of adapters, the folder or workdir where its base is now.
      form: one of FORMS; all but "merged" are of runs of adapters.
      overwrite: replace an earlier export.
      on_progress: called with (what is being done, done, total).

    Returns:
      The folder.

    Raises:
      UserError: no workdir, no checkpoint, no autoencoder, another base than the adapters', or `out` is taken.
    """
    models = open_models(workdir, ema=ema, autoencoder=autoencoder, base=base)
    if not isinstance(models, WorkdirModels):
        raise UserError(f"{workdir} is a diffusers folder already; lwd export takes the workdir of a run.")
    if not ema:
        models.check_plain()
    if dtype not in DTYPES:
        raise UserError(f"Weights can be written as {', '.join(DTYPES)}, but not as {dtype}.")
    write = _writer(models, form)
    if autoencoder and models.config.stage == 1:
        raise UserError(f"The run in '{workdir}' trained its own autoencoder: another one has no place in its export.")
    with staged(out, overwrite, MANIFEST, (workdir, autoencoder, base)) as folder:
        parts, fingerprints, step = write(folder, models, jnp.dtype(dtype), on_progress)
        if FORMS[form] is None and parts:
            _write_json(folder / INDEX, {"_diffusers_version": DIFFUSERS_VERSION} | parts)
        about = {"form": form, "pipeline": parts.get("_class_name", ""), "step": step, "dtype": dtype}
        manifest = about | {"fingerprints": fingerprints} | _origin(models)
        _write_json(folder / MANIFEST, manifest)
        absent = [part for part in parts if part in TEXT_PARTS and not (folder / part).is_dir()]
        write_card(folder, manifest, models.path, absent=absent, base=models.origin())
    return locate(out)


def _variant(model: Model, sizes) -> str:
    """The name of the row of sizes that a folder's config equals, or "": its own sizes are in model.json."""
    return next((name for name, known in model.variants.items() if known == sizes), "")


def _read_weights(kind: Kind, opened: Opened, path: str, adapter: str, show: Show) -> tuple[dict, dict, dict]:
    """(what the checkpoint is to hold, sections of the config, what else is said of the model)."""
    if not adapter:
        with shown(show, f"reading the {kind.field}"):
            return opened.params(), {}, {}
    if kind is not BACKBONE:
        raise UserError("Adapters are of a backbone, but an autoencoder was to be imported.")
    factors = read_file(adapter, weights_of(opened.module), opened.abstract())
    with shown(show, "fingerprint of the base"):
        base = {"path": path, "fingerprint": opened.fingerprint()}
    return jax.tree.map(jnp.asarray, factors), {"adapter": settings_of(factors)}, {"base": base}


def import_models(
    folder: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    stage: int = 0,
    adapter: str = "",
    overwrite: bool = False,
    on_progress: Show = ignore,
) -> Config:
    """Makes a workdir whose checkpoint of step 0 holds the weights of a diffusers folder, which must cover the model.

    Args:
      folder: a pipeline folder or that of one model.
      workdir: new or empty.
      stage: 1 takes the autoencoder, 2 the backbone (the autoencoder stays where it is); 0 = 2 if there is one.
      adapter: a file of adapters over the backbone, in diffusers' layout: they are what the checkpoint holds, and the
        folder stays where it is as their base. "" = none.
      overwrite: replace an earlier import; a run that has trained is never replaced.
      on_progress: called with (what is being done, done, total).

    Returns:
      The config of the workdir.

    Raises:
      UserError: no such folder or file, missing, extra or misshaped weights, `workdir` is taken.
    """
    check_free(workdir, overwrite, IMPORTED, (folder, adapter))
    source = open_models(folder)
    if not isinstance(source, FolderModels):
        raise UserError(f"{folder} is a workdir already; lwd import takes a diffusers folder.")
    # A backbone that cannot be read is a mistake to be told of, not a reason to take the autoencoder.
    second = source.has_backbone() or (source.path / BACKBONE.subfolder).is_dir()
    kind = TRAINED[stage or (2 if second else 1)]
    opened = open_model(kind, str(source.path), "")
    path = str(source.path.absolute())
    names = {
        "autoencoder_variant": "",
        "backbone_variant": "",
        "autoencoder": path if source.has_autoencoder() else "",
        kind.field: path,
        f"{kind.field}_variant": _variant(opened.model, opened.module.config),
    }
    settings = {"resolution": source.resolution(), "sampling": source.sampling()} if kind is BACKBONE else {}
    params, found, extra = _read_weights(kind, opened, path, adapter, on_progress)
    # No average: there is nothing to continue here, only weights to start from.
    config = Config(
        name=f"import of {source.path.name}",
        stage=kind.stage,
        models=Models(**names),
        training=Training(ema=0.0),
        **settings,
        **found,
    )
    with shown(on_progress, "writing the checkpoint"):
        _write_import(locate(workdir), overwrite, config, params, describe(kind, opened, extra))
    return config


def _write_import(workdir: Path, overwrite: bool, config: Config, params, description: str) -> None:
    """A workdir with the one checkpoint of step 0, which no run writes to meanwhile."""
    unused = locked(workdir, f"The workdir '{workdir}'") if workdir.is_dir() else contextlib.nullcontext()
    with unused, staged(workdir, overwrite, "config.json") as target:
        zero = jnp.zeros((), jnp.int32)
        checkpoints = Checkpoints(target, keep=1)
        try:
            checkpoints.save(State(zero, params, {}, {}, zero, zero), {}, config)
            checkpoints.finish(0)
        finally:
            checkpoints.close()
        (target / MODEL_FILE).write_text(description, encoding="utf-8")
        (target / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
