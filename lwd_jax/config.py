"""The typed description of a run.

`configs/*.py` return short ml_collections ConfigDicts; `load_config` turns one into the frozen dataclasses below, once,
at the door. Every default lives here. A field that does not exist, has the wrong type or contradicts another is a
UserError that says what was meant.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lwd_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Models:
    """Where the models come from: a diffusers folder, or the workdir of an earlier run; "" = random weights."""

    autoencoder: str = ""
    autoencoder_variant: str = "sd3"  # a row of kl.VARIANTS; a folder must agree with it
    backbone: str = ""
    backbone_variant: str = "sd3-medium"  # a row of VARIANTS of sd3 or flux; a folder must agree with it
    ntk: tuple[float, ...] = (1.0, 1.0)  # FLUX: factors of RoPE's base along rows and columns; URAE takes 10 at 4096 px
    proportional_attention: bool = False  # FLUX: logits times sqrt(log_4608(tokens)), tokens of picture and text
    ema: bool = True  # of a workdir, take the averaged weights


@dataclass(frozen=True)
class Data:
    dataset: str = ""  # made by `lwd prepare`; stage 1 reads pictures from it
    latents: str = ""  # made by `lwd encode`; stage 2 reads latents and text states from it
    batch_size: int = 8  # pictures per step, over all devices and all accumulation steps
    workers: int = 2  # processes that decode pictures; 0 = in this process
    flip: bool = True  # random horizontal flips (stage 1)
    buckets: bool = True  # keep aspect ratios: batches of one aspect bucket each; False = centre squares
    held_out: int = 8  # pictures kept from training for previews and validation: those of the largest hashes


@dataclass(frozen=True)
class Matching:
    """Stage 2: flow matching under the wavelet mask (Latent Wavelet Diffusion, arXiv 2506.00433)."""

    saliency: str = "wavelet"  # or released_three_channels: the released code's map, for comparison only
    wavelet: str = "haar"  # any PyWavelets name
    levels: int = 1
    source: str = "clean"  # clean: the map of z0 (paper); noisy: of z_t (released code)
    mask: str = "time"  # time (paper), everywhere (baseline), soft
    floor: float = 0.3
    softness: float = 0.05  # width of the soft mask's step
    normalise: str = "all"  # mean over all elements (paper), or over the supervised area
    time_sampler: str = "logit_normal"  # uniform, logit_normal, mode, cosmap
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"  # none, sigma_sqrt, cosmap
    shift_rule: str = "static"  # none, static, dynamic (FLUX)
    shift: float = 3.0
    guidance: float = 1.0  # told to guidance-distilled backbones (FLUX.1-dev); URAE found 1 decisive
    time_bins: int = 5  # for the metrics
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class Reconstruction:
    """Stage 1: scale-consistent autoencoder fine-tuning."""

    distance: str = "l2"  # l2 or l1
    alpha: float = 0.1  # weight of scale consistency
    beta: float = 0.0  # weight of the KL term
    lpips: float = 0.05  # weight of LPIPS-VGG; needs the extra [lpips]
    scales: tuple[int, ...] = (2, 4)  # drawn per step
    sample_posterior: bool = True  # decode a sample of the posterior; False: its mean
    freeze_output: bool = True  # the decoder's last norm and convolution stay; False: from random weights


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"  # adamw, adafactor, lion, prodigy, muon, schedule_free_adamw
    learning_rate: float = 1e-5
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # global gradient norm; 0 = off
    schedule: str = "constant"  # constant, cosine, linear
    warmup: int = 500
    accumulate: int = 1  # gradient accumulation steps within one training step
    freeze: tuple[str, ...] = ()  # path patterns (regular expressions, searched) that do not train
    train_only: tuple[str, ...] = ()  # if given, only these patterns train


@dataclass(frozen=True)
class Adapter:
    """Stage 2: low-rank adapters over a frozen backbone, which are all that trains (lwd_jax.adapters)."""

    kind: str = "none"  # none: the backbone itself trains; lora, minor_components
    rank: int = 16
    targets: tuple[str, ...] = ("q", "k", "v", "out")  # ends of layer paths, regular expressions: "picture/q"
    alpha: float = 16.0  # LoRA: the product counts alpha / rank
    rank_stabilised: bool = False  # LoRA: alpha / sqrt(rank)
    init: str = "gaussian"  # LoRA: the first factor is gaussian and the second zero; zero: the other way round
    dropout: float = 0.0  # LoRA: of what the adapters see, in training


@dataclass(frozen=True)
class Mesh:
    """Devices per axis; -1 = what is left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Training:
    steps: int = 10_000
    ema: float = 0.9998  # decay; 0 = no average
    log_every: int = 10
    save_every: int = 500
    keep: int = 3  # checkpoints
    preview_every: int = 500  # 0 = never
    preview_prompts: tuple[str, ...] = ()  # stage 2; () = the captions of held-out pictures
    nonfinite_limit: int = 10  # consecutive non-finite steps before the run is ended by name
    profile_start: int = -1
    profile_stop: int = -1


@dataclass(frozen=True)
class Sampling:
    solver: str = "euler"  # euler, heun
    steps: int = 28
    guidance: float = 5.0  # classifier-free guidance scale; 1 = off
    shift: float = 3.0
    shift_rule: str = "static"  # static, dynamic (FLUX)
    embedded_guidance: float = 3.5  # told to guidance-distilled backbones (FLUX.1-dev)


@dataclass(frozen=True)
class Config:
    name: str = ""
    stage: int = 2
    seed: int = 0
    resolution: int = 1024  # px; the side of a square picture, and the area of the other aspect buckets
    dtype: str = "bfloat16"  # of matrix products and activations
    param_dtype: str = "float32"  # of parameters that are frozen; what trains is always float32
    remat: str = "full"  # none, attention (save attention outputs), full
    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    matching: Matching = field(default_factory=Matching)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    optimizer: Optimizer = field(default_factory=Optimizer)
    adapter: Adapter = field(default_factory=Adapter)
    mesh: Mesh = field(default_factory=Mesh)
    training: Training = field(default_factory=Training)
    sampling: Sampling = field(default_factory=Sampling)


_CHOICES = {
    "stage": (1, 2),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "attention", "full"),
    "matching.source": ("clean", "noisy"),
    "matching.normalise": ("all", "supervised"),
    "matching.shift_rule": ("none", "static", "dynamic"),
    "reconstruction.distance": ("l2", "l1"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "adapter.kind": ("none", "lora", "minor_components"),
    "adapter.init": ("gaussian", "zero"),
    "sampling.solver": ("euler", "heun"),
    "sampling.shift_rule": ("static", "dynamic"),
}
# What means nothing in a stage: another value than the default is a contradiction there.
_UNUSED = {
    1: (
        "matching",
        "sampling",
        "adapter",
        "data.latents",
        "models.backbone",
        "models.ntk",
        "models.proportional_attention",
        "training.preview_prompts",
    ),
    2: ("reconstruction", "data.dataset", "data.flip"),
}
# What an adapter of a kind does not read, likewise.
_UNUSED_OF_ADAPTER = {
    "none": ("rank", "targets", "alpha", "rank_stabilised", "init", "dropout"),
    "lora": (),
    "minor_components": ("alpha", "rank_stabilised", "init", "dropout"),
}
# Fields that are read only where another has one of these values. Settings for other values may stay in a config whose
# one field is overridden (the plain arm of a comparison), so that this is told of and no error.
_READ_WITH = (
    ("matching.mask", ("time", "soft"), ("matching.floor",)),
    ("matching.mask", ("soft",), ("matching.softness",)),
    ("matching.time_sampler", ("logit_normal",), ("matching.logit_mean", "matching.logit_std")),
    ("matching.time_sampler", ("mode",), ("matching.mode_scale",)),
    ("matching.shift_rule", ("static",), ("matching.shift",)),
    ("sampling.shift_rule", ("static",), ("sampling.shift",)),
    ("optimizer.name", ("adamw", "lion", "prodigy", "muon", "schedule_free_adamw"), ("optimizer.b1", "optimizer.b2")),
    ("optimizer.name", ("adamw", "prodigy", "muon", "schedule_free_adamw"), ("optimizer.eps",)),
    ("optimizer.name", ("adamw", "adafactor", "lion", "prodigy", "muon"), ("training.ema",)),
)
_DEFAULTS = Config()
_INF = math.inf
_SEEDS = 2**32  # jax.random.key reads 32 bits of a seed
_RANGES = {  # field -> (lowest, highest, bounds are excluded)
    "resolution": (16, _INF, False),
    "data.batch_size": (1, _INF, False),
    "data.workers": (0, _INF, False),
    "data.held_out": (0, _INF, False),
    "matching.levels": (1, _INF, False),
    "matching.floor": (0, 1, True),
    "matching.softness": (0, _INF, True),
    "matching.logit_std": (0, _INF, True),
    "matching.shift": (0, _INF, True),
    "matching.time_bins": (1, _INF, False),
    "matching.caption_dropout": (0, 1, False),
    "reconstruction.alpha": (0, _INF, False),
    "reconstruction.beta": (0, _INF, False),
    "reconstruction.lpips": (0, _INF, False),
    "optimizer.learning_rate": (0, _INF, True),
    "optimizer.eps": (0, _INF, True),
    "optimizer.weight_decay": (0, _INF, False),
    "optimizer.clip": (0, _INF, False),
    "optimizer.warmup": (0, _INF, False),
    "optimizer.accumulate": (1, _INF, False),
    "adapter.rank": (1, _INF, False),
    "adapter.alpha": (0, _INF, True),
    "training.steps": (1, _INF, False),
    "training.log_every": (1, _INF, False),
    "training.save_every": (1, _INF, False),
    "training.keep": (1, _INF, False),
    "training.preview_every": (0, _INF, False),
    "training.nonfinite_limit": (1, _INF, False),
    "sampling.steps": (1, _INF, False),
    "sampling.shift": (0, _INF, True),
}


def _build(cls: type, values: Mapping[str, Any], where: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"There is no config field '{where}{key}'.{did_you_mean(key, fields)}")
    return cls(**{key: _convert(fields[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(spec: dataclasses.Field, value: Any, name: str):
    default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
    if dataclasses.is_dataclass(default):
        if not isinstance(value, Mapping):
            raise UserError(f"Config field '{name}' is a section of fields, but {value!r} was given.")
        return _build(type(default), value, f"{name}.")
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        kind = {tuple[int, ...]: int, tuple[float, ...]: float}.get(spec.type, str)
        value = [float(part) if kind is float and type(part) is int else part for part in value]
        if wrong := [part for part in value if type(part) is not kind]:
            raise UserError(f"Config field '{name}' holds values of type {kind.__name__}, but {wrong[0]!r} was given.")
        return tuple(_finite(part, name) for part in value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"Config field '{name}' must be of type {type(default).__name__}, but {value!r} was given.")
    return _finite(value, name)


def _finite(value: Any, name: str):
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"Config field '{name}' must be a finite number, but it is {value}.")
    return value


def _get(config: Config, dotted: str):
    value = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_adapter(config: Config) -> None:
    adapter = config.adapter
    for name in _UNUSED_OF_ADAPTER[adapter.kind]:
        if getattr(adapter, name) != getattr(_DEFAULTS.adapter, name):
            raise UserError(f"Config 'adapter.{name}' has no effect with adapter.kind '{adapter.kind}'; remove it.")
    if not adapter.targets:
        raise UserError("Config field 'adapter.targets' names no layer to adapt.")


def _check(config: Config) -> None:
    for name, choices in _CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            near = did_you_mean(str(value), [str(c) for c in choices])
            raise UserError(f"Config field '{name}' cannot be {value!r}.{near}")
    for name in _UNUSED[config.stage]:
        if _get(config, name) != _get(_DEFAULTS, name):
            raise UserError(f"Config '{name}' has no effect in stage {config.stage}; remove it.")
    _check_adapter(config)
    check_seed(config.seed)
    for name in ("training.ema", "adapter.dropout", "optimizer.b1", "optimizer.b2"):
        if not 0 <= _get(config, name) < 1:
            raise UserError(f"Config field '{name}' must lie in [0, 1), but it is {_get(config, name)}.")
    for name, (low, high, strict) in _RANGES.items():
        value = _get(config, name)
        if not low <= value <= high or (strict and value in (low, high)):
            bounds = f"({low}, {high})" if strict else f"[{low}, {high}]"
            raise UserError(f"Config field '{name}' must lie in {bounds}, but it is {value}.")
    if config.data.batch_size % config.optimizer.accumulate:
        raise UserError(
            f"data.batch_size {config.data.batch_size} does not divide into optimizer.accumulate "
            f"{config.optimizer.accumulate} parts."
        )
    if config.resolution % 16:
        raise UserError(f"Config field 'resolution' must be a multiple of 16, but it is {config.resolution}.")
    if config.reconstruction.alpha and not config.reconstruction.scales:
        raise UserError("reconstruction.alpha is not 0, but reconstruction.scales names no scale to draw.")
    if any(scale < 2 for scale in config.reconstruction.scales):
        raise UserError(f"Every one of reconstruction.scales must be at least 2, not {config.reconstruction.scales}.")
    if len(config.models.ntk) != 2 or min(config.models.ntk) <= 0:
        raise UserError(f"models.ntk must be two positive factors, of rows and columns, not {config.models.ntk}.")
    if list(vars(config.mesh).values()).count(-1) > 1:
        raise UserError("Only one axis of 'mesh' can be -1 (what is left).")


def without_effect(config: Config) -> list[str]:
    """A sentence for every field of _READ_WITH that was set to something and is not read."""
    return [
        f"Config '{name}' has no effect with {switch} '{_get(config, switch)}'."
        for switch, values, names in _READ_WITH
        if _get(config, switch) not in values
        for name in names
        if _get(config, name) != _get(_DEFAULTS, name)
    ]


def check_seed(seed: int) -> None:
    """Raises UserError if a seed is none that jax.random.key reads whole."""
    if not 0 <= seed < _SEEDS:
        raise UserError(f"The seed must lie in [0, {_SEEDS - 1}], but it is {seed}.")


def load_config(values: Any) -> Config:
    """The frozen Config of an ml_collections ConfigDict or a plain (nested) mapping.

    Raises:
      UserError: an unknown field (with the nearest known one), a wrong type, a value out of range, a contradiction.
    """
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    config = _build(Config, values, "")
    _check(config)
    return config


def to_json(config: Config) -> str:
    """The resolved config, every field written out; `from_json` takes it back."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(values: Mapping[str, Any]) -> Config:
    """The Config of what `to_json` wrote, once it is read."""
    return _build(Config, values, "")
