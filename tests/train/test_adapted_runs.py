"""Laws of runs of adapters: nothing else trains or is saved, the base is checked by what it holds and not by where it
lies, resuming is the uninterrupted run, eight devices equal one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_models import backbone, write_inputs

from lwd_jax.adapters.factors import is_factor, merged, saved, trainable
from lwd_jax.adapters.peft import FILE
from lwd_jax.backbones import save_backbone
from lwd_jax.cli import main
from lwd_jax.config import load_config
from lwd_jax.errors import UserError
from lwd_jax.report.pipeline import open_models
from lwd_jax.train.checkpoint import Checkpoints, read_params
from lwd_jax.train.loop import run
from lwd_jax.train.models import BACKBONE, open_model, read_description
from lwd_jax.train.setup import make_setup
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.table import flat

LORA = {"kind": "lora", "rank": 3, "alpha": 6.0, "targets": ["q", "out", "picture/up"], "dropout": 0.1}
MINOR = {"kind": "minor_components", "rank": 2, "targets": ["q", "k"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    write_inputs(root)
    save_backbone(root / "other", *backbone(5))
    return root


def config_of(root, adapter=LORA, backbone="transformer", **sections):
    values = {
        "resolution": 32, "dtype": "float32", "param_dtype": "float32", "remat": "none", "adapter": adapter,
        "models": {"autoencoder": f"{root}/vae", "autoencoder_variant": "", "backbone": f"{root}/{backbone}"},
        "data": {"latents": f"{root}/latents", "batch_size": 4, "workers": 0, "held_out": 2, "buckets": False},
        "optimizer": {"learning_rate": 1e-2, "warmup": 1, "weight_decay": 0.1},
        "training": {"steps": 4, "ema": 0.5, "log_every": 1, "save_every": 2, "preview_every": 0},
    }  # fmt: skip
    values["models"]["backbone_variant"] = ""
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return load_config(values)


def train(config, workdir, devices=1):
    setup = make_setup(config, jax.devices()[:devices])
    described = {"description": setup.description, "params": setup.params}
    return run(setup.program, setup.batches, config, workdir, setup.mesh, **described)


@pytest.fixture(scope="module")
def trained(root):
    """The workdir of a run of four steps."""
    assert train(config_of(root), root / "run") == (4, 0)
    return root / "run"


def base_of(root, name="transformer", **kinds):
    return flat(open_model(BACKBONE, f"{root}/{name}", "", **kinds).params())


def same(first, second):
    first, second = flat(jax.device_get(first)), flat(jax.device_get(second))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def differ(first, second):
    first, second = flat(first), flat(second)
    return {name for name, leaf in first.items() if not np.array_equal(leaf, second[name])}


# ----------------------------------------------------------------------------------------------------------- state


def test_only_the_factors_train_over_a_base_in_bfloat16(root):
    config = config_of(root, param_dtype="bfloat16")
    setup = make_setup(config, jax.devices()[:1])
    state = setup.program.init(jax.random.key(0), setup.params())
    leaves = flat(state.params)
    for name, leaf in leaves.items():
        wide = is_factor(name) or name == "position/table"
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), name
    factors = set(trainable(leaves))
    assert len(factors) == 2 * 9 and all(name.endswith(("lora_a", "lora_b")) for name in factors)
    assert set(flat(state.ema)) == set(flat(state.opt_state[0].mu)) == factors
    abstract = jax.tree.map(lambda a: (a.shape, a.dtype), setup.program.state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == abstract


@pytest.mark.parametrize("start", ["folder", "run", "adapters"])
def test_what_trains_begins_unrounded_beside_what_is_frozen_in_bfloat16(root, trained, tmp_path, start):
    if start == "run":
        train(config_of(root, {}, training={"steps": 1, "save_every": 1}), tmp_path / "run")
    place = {"folder": root / "transformer", "run": tmp_path / "run", "adapters": trained}[start]
    exact = flat(merged(open_model(BACKBONE, str(place), "").params()))
    only = {"train_only": ["joint_blocks/picture/(q|down)/kernel"]}
    config = config_of(root, {}, models={"backbone": str(place)}, param_dtype="bfloat16", optimizer=only)
    setup = make_setup(config, jax.devices()[:1])
    state = setup.program.init(jax.random.key(0), setup.params())
    leaves, trains = flat(state.params), flat(state.ema).keys()
    assert trains == {f"joint_blocks/picture/{name}/kernel" for name in ("q", "down")}
    for name, leaf in leaves.items():
        kept = name in trains or name == "position/table"
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name
        # A frozen kernel that adapters are merged into is rounded before and after.
        wide = np.asarray(leaf, np.float32)
        np.testing.assert_allclose(wide, exact[name], rtol=0 if kept else 2**-7, atol=0 if kept else 1e-3)
        if name in trains:
            np.testing.assert_array_equal(flat(state.ema)[name], exact[name], err_msg=name)


def test_a_checkpoint_holds_the_factors_and_where_the_base_is(root, trained):
    params, config, step = read_params(trained, ema=False)
    leaves = flat(params)
    assert step == 4 and leaves and all(map(is_factor, leaves))
    described = read_description(trained)
    expected = fingerprint(backbone(0)[1])
    assert described["base"] == {"path": f"{root}/transformer", "fingerprint": expected}
    size = sum(file.stat().st_size for file in trained.rglob("checkpoints/4/params/**/*") if file.is_file())
    assert size < 0.5 * (root / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    # Of the last block's text nobody reads what it asks for: only that stays where it began.
    still = [name for name, leaf in leaves.items() if name.endswith("lora_b") and not np.any(leaf)]
    assert still == ["last_block/text/q/lora_b"]


def test_opened_is_the_base_with_the_factors(root, trained):
    base = base_of(root)
    for ema in (True, False):
        params = open_models(trained, ema=ema).backbone()[1]
        same(saved(params), read_params(trained, ema)[0])
        same({name: leaf for name, leaf in flat(params).items() if not is_factor(name)}, base)
    kinds = {"param_dtype": jnp.bfloat16}
    half = flat(open_models(trained).backbone(**kinds)[1])
    assert half["joint_blocks/picture/q/kernel"].dtype == jnp.bfloat16
    assert half["joint_blocks/picture/q/lora_a"].dtype == jnp.float32


def draw(models, out):
    size = ("--resolution", "32", "--steps", "2", "--prompt", "a boat")
    assert main(["sample", "--models", str(models), *size, "--out", str(out)]) == 0
    with Image.open(out / "00000.png") as picture:
        return np.asarray(picture).astype(int)


def test_a_run_is_sampled_and_exported_with_its_adapters(root, trained, tmp_path):
    """The workdir, and the pipeline with the adapters in its weights, draw the same."""
    assert main(["export", "--workdir", str(trained), "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", "--workdir", str(trained), "--out", str(tmp_path / "file"), "--form", "adapter"]) == 0
    assert len(load_file(tmp_path / "file" / FILE)) == 2 * (3 * 4 + 2)
    ours, again = draw(trained, tmp_path / "ours"), draw(tmp_path / "merged", tmp_path / "again")
    assert np.abs(ours - again).max() <= 1


# ---------------------------------------------------------------------------------------------------------- resume


def test_resumed_equals_uninterrupted(root, trained, tmp_path):
    config = config_of(root)
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=2)), tmp_path)
    assert train(config, tmp_path) == (4, 0)
    program, states = make_setup(config, jax.devices()[:1]).program, []
    for place in (tmp_path, trained):
        checkpoints = Checkpoints(place, keep=3)
        states.append(jax.device_get(checkpoints.restore(program.state, config).state))
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_base_that_moved_is_the_same_and_another_is_not(root, trained, tmp_path):
    for place in ("run", "base"):
        shutil.copytree(trained if place == "run" else root / "transformer", tmp_path / place)
    moved = config_of(root, models={"backbone": str(tmp_path / "base")}, training={"steps": 5})
    assert train(moved, tmp_path / "run") == (5, 0)
    prints = [fingerprint(backbone(seed)[1])[:16] for seed in (0, 5)]
    with pytest.raises(UserError, match=f"another base.*{prints[0]}.*other is {prints[1]}"):
        train(config_of(root, backbone="other", training={"steps": 6}), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(config_of(root, backbone="other"))))
    with pytest.raises(UserError, match=f"another base.*{prints[0]}.*other is {prints[1]}"):
        open_models(tmp_path / "run").backbone()


def test_the_fingerprint_of_adapters_is_of_their_base_too(root, trained, tmp_path):
    """And not of where it lies."""
    shutil.copytree(root / "transformer", tmp_path / "moved")
    places = ("", str(tmp_path / "moved"), str(root / "other"))
    here, moved, other = (open_model(BACKBONE, str(trained), "", base=place).fingerprint() for place in places)
    assert here == moved != other


def test_adapters_want_a_base_and_a_run_stays_of_its_kind(root, trained, tmp_path):
    with pytest.raises(UserError, match="models.backbone"):
        make_setup(config_of(root, models={"backbone": "", "backbone_variant": "tiny"}))
    for other in (MINOR, {}):
        with pytest.raises(UserError, match="started with adapter.alpha = 6.0, but the config now says 16.0"):
            train(config_of(root, other), trained)


# ----------------------------------------------------------------------------------------------------------- chain


def test_minor_components_over_the_run_of_a_lora(root, trained, tmp_path):
    config = config_of(root, MINOR, backbone="run")
    assert train(config, tmp_path / "minor") == (4, 0)
    leaves = flat(read_params(tmp_path / "minor", ema=False)[0])
    ranks = {name: leaves[f"joint_blocks/picture/{name}/fixed_a"].shape[-1] for name in ("q", "k", "out")}
    assert ranks == {"q": 2 + 3, "k": 2, "out": 3}
    params = open_models(tmp_path / "minor").backbone()[1]
    kernels = base_of(root)
    assert all(np.array_equal(flat(params)[name], kernel) for name, kernel in kernels.items())
    # And whole training from there is of the merged kernels.
    whole = make_setup(config_of(root, {}, models={"backbone": str(tmp_path / "minor")}), jax.devices()[:1])
    same(whole.params(), merged(params))


# --------------------------------------------------------------------------------------------------------- devices


def begun(root, adapter, axes):
    """(setup, state before the first step) on a mesh of those axes."""
    config = config_of(root, adapter, mesh=dict(zip(("data", "fsdp", "context", "tensor"), axes)))
    setup = make_setup(config, jax.devices()[: int(np.prod(axes))])
    return setup, setup.program.init(jax.random.key(3), setup.params())


ONE, EIGHT = (1, 1, 1, 1), (2, 2, 2, 1)


@pytest.mark.slow
def test_eight_devices_equal_one(root):
    """Factors at the start, loss and float32 gradients, dropout included."""
    found = []
    for axes in (ONE, EIGHT):
        setup, state = begun(root, LORA, axes)
        start = jax.device_get(saved(state.params))
        batch = next(setup.batches)
        setup.batches.close()
        state, metrics = setup.program.step(state, batch, jax.random.key(4))
        found.append((start, *jax.device_get((state.opt_state[0].mu, metrics))))
    (start, expected, reference), (again, gradients, metrics) = found
    same(start, again)
    assert metrics["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    expected, gradients = flat(expected), flat(gradients)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
    assert norm > 0
    for name, gradient in expected.items():
        scale = max(np.linalg.norm(gradient), 1e-3 * norm)
        assert np.linalg.norm(gradients[name] - gradient) < 1e-4 * scale, name


@pytest.mark.heavy
def test_minor_components_are_the_same_on_eight_devices(root):
    """A component is known up to its sign: the products are compared."""
    one, eight = (flat(jax.device_get(begun(root, MINOR, axes)[1].params)) for axes in (ONE, EIGHT))
    for name in [name for name in one if name.endswith("lora_a")]:
        expected, found = (leaves[name] @ leaves[name[:-1] + "b"] for leaves in (one, eight))
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(eight[name], -eight[name.replace("lora", "fixed")])
