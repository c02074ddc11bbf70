"""Laws: every file of configs/ resolves, and evaluates by shape at full size on the slice its docstring names."""

import functools
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lwd_jax.adapters.factors import is_factor, trainable
from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import from_json, to_json
from lwd_jax.parallel.mesh import abstract_mesh, mesh_shape
from lwd_jax.train.models import open_autoencoder, open_trained
from lwd_jax.train.program import build_program
from lwd_jax.train.setup import stage_of
from lwd_jax.weights.table import flat

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
FULL_SIZE = [file for file in FILES if not file.stem.startswith("quickstart")]
# FLUX's autoencoder is SD3's but for the scale of its latents.
STEPPED = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.heavy] if file.stem.startswith("stage1_flux") else [])
    for file in FULL_SIZE
]

SLICE = re.compile(r"Slice: \S+ \((\d+) chips\)")
BYTES = 16  # of one parameter: weight, two moments, average, in float32
PRODIGY_BYTES = 20  # of one parameter that Prodigy trains: weight, two moments, gradient sum, start; no average


def docstring(file: Path) -> str:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return " ".join(module.__doc__.split())


def names(files):
    return [file.stem for file in files]


def stand_in_for_lpips(x, y):
    return jnp.abs(x - y).mean(axis=(1, 2, 3))  # LPIPS needs its weights; here only the shape of its result counts


LPIPS = jax.tree_util.Partial(stand_in_for_lpips)  # a pytree, as the real one is


@functools.cache
def evaluated(file: Path):
    """(config, program), of which nothing is in memory but shapes."""
    config = read_config(str(file), [])
    chips = int(SLICE.search(docstring(file)).group(1))
    mesh = abstract_mesh(mesh_shape(config.mesh, chips))
    opened = open_trained(config)
    sizes, tokens = None, 0
    if config.stage == 2:
        sizes, tokens = open_autoencoder(config).module.config, opened.module.config.text_tokens
    program = build_program(config, mesh, stage_of(config, opened, sizes, tokens, LPIPS))
    return config, program


def bytes_per_chip(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def test_there_are_configs():
    assert {"stage1_sd3_512", "stage1_sd3_1024"} <= set(names(FILES))
    assert {f"stage2_sd3_{px}" for px in (512, 1024, 2048, 4096)} <= set(names(FILES))
    assert {f"stage1_flux_{px}" for px in (512, 1024)} | {f"flux_full_{px}" for px in (1024, 2048)} <= set(names(FILES))
    assert {f"stage2_sd35_{size}_{px}" for size in ("medium", "large") for px in (1024, 2048)} <= set(names(FILES))
    assert {f"stage2_sd3_lora_{px}" for px in (1024, 2048)} <= set(names(FILES))
    assert {"flux_lora_1024", "flux_lora_2048", "flux_minor_4096"} <= set(names(FILES))


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_resolves(file):
    config = read_config(str(file), [])
    assert config.name == file.stem
    assert from_json(json.loads(to_json(config))) == config


@pytest.mark.parametrize("file", FULL_SIZE, ids=names(FULL_SIZE))
def test_docstring_tells_stage_size_and_command(file):
    config, text = read_config(str(file), []), docstring(file)
    assert text.startswith(f"Stage {config.stage}:")
    assert f"at {config.resolution} px." in text
    assert f"lwd train --config=configs/{file.name} " in text


@pytest.mark.parametrize("file", STEPPED)
def test_step_evaluates_by_shape_at_full_size(file):
    config, program = evaluated(file)
    state, metrics = jax.eval_shape(program.step, program.state, program.batch, jax.random.key(0))
    kind = "picture" if config.stage == 1 else "mean"
    factor = 1 if config.stage == 1 else 8
    assert program.batch[kind].shape[:3] == (config.data.batch_size, *2 * (config.resolution // factor,))
    assert (metrics["loss"].shape, metrics["loss"].dtype) == ((), jnp.float32)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, program.state)]
    assert shapes[0] == shapes[1]


def formula(config, params) -> tuple[str, int, int]:
    """(what a docstring says of the bytes, all bytes, parameters that train), of parameters path -> number."""
    trained = sum(params[path] for path in trainable(params))
    if not adapted(config):
        return f"({trained:,} parameters x {BYTES} bytes", trained * BYTES, trained
    frozen = sum(number for path, number in params.items() if not is_factor(path))
    said = f"({frozen:,} frozen parameters x 2 bytes, bfloat16, and {trained:,} that train x {PRODIGY_BYTES} bytes"
    return said, 2 * frozen + PRODIGY_BYTES * trained, trained


def adapted(config) -> bool:
    return config.adapter.kind != "none"


@pytest.mark.parametrize("file", FULL_SIZE, ids=names(FULL_SIZE))
def test_state_has_the_bytes_that_the_docstring_tells(file):
    config, program = evaluated(file)
    # The position table of SD3 is a buffer of the original model: it is not counted, does not train and has no moments.
    params = {path: math.prod(leaf.shape) for path, leaf in flat(program.state.params).items() if "table" not in path}
    mesh = program.state.step.sharding.mesh
    parts = mesh.shape["fsdp"] * (mesh.shape["context"] if config.stage == 2 else 1)
    said, whole, trained = formula(config, params)
    assert f"HBM per chip: state {whole / parts / 1e9:.1f} GB by formula {said}" in docstring(file)
    if config.stage == 2:  # of adapters float32; otherwise bfloat16, beside the weights that products take
        assert f"gradients {trained * 4 / parts / 1e9:.1f} GB" in docstring(file)
    real = sum(bytes_per_chip(leaf) for leaf in jax.tree.leaves(program.state))
    table = sum(bytes_per_chip(leaf) for path, leaf in flat(program.state.params).items() if "table" in path)
    assert real - table == pytest.approx(whole / parts, rel=0.02)  # small parameters are whole on every chip
