"""The door: what a config may say, and the one sentence it gets back when it is wrong."""

import dataclasses
import json

import ml_collections
import pytest

from lwd_jax.cli import main
from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import _RANGES, Config, from_json, load_config, to_json
from lwd_jax.errors import UserError


def test_defaults_resolve_and_round_trip():
    config = load_config({})
    assert config == Config()
    assert from_json(json.loads(to_json(config))) == config


def test_config_dict_and_nested_values():
    values = ml_collections.ConfigDict({"stage": 1, "reconstruction": {"scales": (2,), "alpha": 1}})
    config = load_config(values)
    assert config.reconstruction.scales == (2,) and config.reconstruction.alpha == 1.0
    assert from_json(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({"optimiser": {}}, ["optimiser", "Did you mean 'optimizer'"]),
        ({"optimizer": {"learnign_rate": 1e-4}}, ["optimizer.learnign_rate", "Did you mean 'learning_rate'"]),
        ({"dtype": "bfloat"}, ["dtype", "bfloat16"]),
        ({"stage": 3}, ["stage"]),
        ({"data": {"batch_size": "8"}}, ["data.batch_size", "int"]),
        ({"data": 8}, ["data", "section"]),
        ({"stage": 1, "matching": {"floor": 0.2}}, ["matching", "stage 1"]),
        ({"stage": 2, "reconstruction": {"alpha": 0.2}}, ["reconstruction", "stage 2"]),
        ({"matching": {"floor": 1.0}}, ["floor", "(0, 1)"]),
        ({"data": {"batch_size": 6}, "optimizer": {"accumulate": 4}}, ["batch_size 6", "accumulate 4"]),
        ({"resolution": 1000}, ["resolution", "16"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["mesh"]),
        ({"training": {"ema": 1.0}}, ["ema"]),
        ({"optimizer": {"b1": 1.0}}, ["optimizer.b1", "[0, 1)"]),
        ({"optimizer": {"b2": 1.0}}, ["optimizer.b2", "[0, 1)"]),
        ({"optimizer": {"eps": 0.0}}, ["optimizer.eps", "(0, "]),
        ({"optimizer": {"weight_decay": float("inf")}}, ["optimizer.weight_decay", "finite"]),
        ({"matching": {"logit_mean": float("nan")}}, ["matching.logit_mean", "finite"]),
        ({"models": {"ntk": (float("inf"), 1.0)}}, ["models.ntk", "finite"]),
        ({"models": {"ntk": (None, 1)}}, ["models.ntk", "None"]),
        ({"optimizer": {"freeze": (0,)}}, ["optimizer.freeze", "str"]),
        ({"stage": 1, "reconstruction": {"scales": (2, None)}}, ["scales", "None"]),
        ({"seed": 2**32}, ["seed", "4294967295"]),
        ({"seed": -1}, ["seed", "[0, "]),
        ({"optimizer": {"accumulate": 0}}, ["optimizer.accumulate", "[1, "]),
        ({"optimizer": {"clip": -1.0}}, ["optimizer.clip"]),
        ({"training": {"log_every": 0}}, ["training.log_every"]),
        ({"training": {"save_every": 0}}, ["training.save_every"]),
        ({"training": {"nonfinite_limit": 0}}, ["nonfinite_limit"]),
        ({"matching": {"shift": 0.0}}, ["matching.shift", "(0, "]),
        ({"matching": {"time_bins": 0}}, ["time_bins"]),
        ({"sampling": {"solver": "eular"}}, ["sampling.solver", "Did you mean 'euler'"]),
        ({"stage": 1, "reconstruction": {"scales": ()}}, ["scales"]),
        ({"stage": 1, "reconstruction": {"scales": (1,)}}, ["scales", "at least 2"]),
        ({"stage": 1, "reconstruction": {"scales": ("2",)}}, ["scales", "int"]),
        ({"stage": 1, "models": {"backbone": "sd3"}}, ["models.backbone", "stage 1"]),
        ({"stage": 2, "data": {"flip": False}}, ["data.flip", "stage 2"]),
        ({"adapter": {"kind": "lara"}}, ["adapter.kind", "Did you mean 'lora'"]),
        ({"adapter": {"kind": "lora", "ranks": 4}}, ["adapter.ranks", "Did you mean 'rank'"]),
        ({"adapter": {"rank": 4}}, ["adapter.rank", "kind 'none'"]),
        ({"adapter": {"kind": "minor_components", "alpha": 1.0}}, ["adapter.alpha", "minor_components"]),
        ({"adapter": {"kind": "lora", "rank": 0}}, ["adapter.rank", "[1, "]),
        ({"adapter": {"kind": "lora", "dropout": 1.0}}, ["adapter.dropout", "[0, 1)"]),
        ({"adapter": {"kind": "lora", "targets": []}}, ["adapter.targets"]),
        ({"stage": 1, "adapter": {"kind": "lora"}}, ["'adapter'", "stage 1"]),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_field(values, words):
    with pytest.raises(UserError) as caught:
        load_config(values)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# Values that fields may not have, values just inside their bounds, and the fields. Written out here, since a bound that
# is read from the table of ranges could not be wrong.
BOUNDS = [
    ((0,), (16,), ["resolution"]),
    ((0,), (1,), ["data.batch_size", "matching.levels", "matching.time_bins", "optimizer.accumulate", "adapter.rank"]),
    ((0,), (1,), ["training.steps", "training.log_every", "training.save_every", "training.keep", "sampling.steps"]),
    ((0,), (1,), ["training.nonfinite_limit"]),
    ((-1,), (0,), ["data.workers", "data.held_out", "optimizer.warmup", "training.preview_every"]),
    ((-1e-6,), (0,), ["reconstruction.alpha", "reconstruction.beta", "reconstruction.lpips"]),
    ((-1e-6,), (0,), ["optimizer.weight_decay", "optimizer.clip"]),
    ((0,), (1e-6,), ["matching.softness", "matching.logit_std", "matching.shift", "sampling.shift", "adapter.alpha"]),
    ((0,), (1e-6,), ["optimizer.learning_rate", "optimizer.eps"]),
    ((0, 1), (1e-6, 1 - 1e-6), ["matching.floor"]),
    ((-1e-6, 1 + 1e-6), (0, 1), ["matching.caption_dropout"]),
    ((-1e-6, 1), (0, 1 - 1e-6), ["optimizer.b1", "optimizer.b2", "training.ema", "adapter.dropout"]),
]


def test_every_range_has_its_bounds_here():
    assert _RANGES.keys() <= {name for *_, names in BOUNDS for name in names}


@pytest.mark.parametrize(
    "name, outside, inside", [(name, outside, inside) for outside, inside, names in BOUNDS for name in names]
)
def test_what_lies_outside_its_bounds_is_refused(name, outside, inside):
    section, _, field = name.rpartition(".")
    given = {"stage": 1} if section == "reconstruction" else {"adapter": {"kind": "lora"}}

    def load(value):
        return load_config(given | ({section: given.get(section, {}) | {field: value}} if section else {field: value}))

    for value in inside:
        load(value)
    for value in outside:
        with pytest.raises(UserError, match=f"'{name}' must lie in "):
            load(value)


def test_every_default_is_immutable():
    for spec in dataclasses.fields(Config):
        value = getattr(Config(), spec.name)
        if dataclasses.is_dataclass(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, 0)


def test_overrides_from_the_command_line(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config():\n    return ml_collections.ConfigDict({'stage': 2, 'optimizer': {'warmup': 10}})\n"
    )
    overrides = ["--config.optimizer.learning_rate=1e-3", "--config.data.buckets=false", "--config.matching.mask=soft"]
    config = read_config(str(file), overrides)
    assert config.optimizer.learning_rate == 1e-3 and config.optimizer.warmup == 10
    assert config.data.buckets is False and config.matching.mask == "soft"
    with pytest.raises(UserError, match="Did you mean 'warmup'"):
        read_config(str(file), ["--config.optimizer.warmpu=3"])
    with pytest.raises(UserError, match="section"):
        read_config(str(file), ["--config.optimizer.warmup.x=3"])
    with pytest.raises(UserError, match="no config file"):
        read_config(str(tmp_path / "other.py"), [])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resolved_config_is_a_config_too(stage, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(to_json(load_config({"stage": stage})))
    assert read_config(str(file), []) == load_config({"stage": stage})


def test_the_command_frame(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
