"""The two stages with their real models, small: losses, frozen parameters, eight devices, full sizes by shape."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax import config as configs
from lwd_jax.autoencoders import kl
from lwd_jax.autoencoders.kl import AUTOENCODER
from lwd_jax.backbones.sd3 import BACKBONE, VARIANTS
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.objective.matching import draw_times
from lwd_jax.objective.reconstruction import pool
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.models import Opened, open_trained
from lwd_jax.train.program import autoencoder_stage, build_program, latent_of, trained_paths
from lwd_jax.train.setup import stage_of
from lwd_jax.train.step import accumulated_gradient, picture_keys
from lwd_jax.weights.table import flat

TOKENS = 6
KL = kl.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling=0.7, shift=0.1
)
SD3 = dataclasses.replace(
    VARIANTS["tiny"], num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=4,
    joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=12, qk_norm=True,
)  # fmt: skip


def config(stage, **sections):
    values = {
        "stage": stage,
        "resolution": 32,
        "dtype": "float32",
        "remat": "none",
        "data": {"batch_size": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup": 1, "clip": 0.0},
        "training": {"steps": 4, "ema": 0.9},
    }
    if stage == 1:
        values["reconstruction"] = {"lpips": 0.0, "alpha": 0.25, "beta": 1e-3, "scales": (2,)}
    return configs.load_config(values | sections)


def opened(stage):
    model, sizes = (AUTOENCODER, KL) if stage == 1 else (BACKBONE, SD3)
    return Opened(model, model.build(sizes), None)


@functools.cache
def start(stage):
    """Random parameters on the host; the last projection, zero at the start, is not left so."""
    params = jax.device_get(opened(stage).init(jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: p if np.any(p) else (0.05 * random.normal(size=p.shape)).astype(p.dtype), params)


def stage_for(run):
    stage = stage_of(run, opened(run.stage), KL, TOKENS, None)
    params = start(run.stage)
    return stage._replace(init=lambda key: jax.tree.map(jnp.asarray, params))


def batch_for(run, index=0):
    random = np.random.default_rng(index)
    arrays = {}
    for name, leaf in stage_for(run).batch.items():
        if leaf.dtype == jnp.uint8:
            arrays[name] = random.integers(0, 256, leaf.shape, dtype=np.uint8)
        else:
            arrays[name] = random.normal(size=leaf.shape).astype(np.float32)
    if "std" in arrays:
        arrays["std"] = np.abs(arrays["std"])
    return arrays


def program_for(run, axes=(1, 1, 1, 1)):
    mesh = make_mesh(configs.Mesh(*axes), jax.devices()[: int(np.prod(axes))])
    return build_program(run, mesh, stage_for(run))


@functools.cache
def gradient(run, axes=(1, 1, 1, 1)):
    """(float32 gradient of all parameters, metrics) with the layouts of the program on a mesh."""
    program, stage = program_for(run, axes), stage_for(run)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, (program.state.params, program.batch))
    keys = jax.random.split(jax.random.key(7), run.data.batch_size)

    def compute(params, batch):
        return accumulated_gradient(stage.loss, params, {}, batch, keys, 1)

    sharded = jax.jit(compute, out_shardings=(layouts[0], None))
    mesh = program.state.step.sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as the program's step is
        return jax.device_get(sharded(*jax.device_put((start(run.stage), batch_for(run)), layouts)))


@pytest.mark.slow
@pytest.mark.parametrize("stage, axes", [(1, (2, 2, 2, 1)), (2, (1, 2, 2, 2))], ids=["autoencoder", "backbone"])
def test_eight_devices_equal_one(stage, axes):
    """Loss, metrics and float32 gradients."""
    expected, reference = gradient(config(stage))
    found, metrics = gradient(config(stage), axes)
    assert metrics["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    expected, found = flat(expected), flat(found)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
    for name in expected:
        scale = max(np.linalg.norm(expected[name]), 1e-3 * norm)
        assert np.linalg.norm(expected[name] - found[name]) < 1e-4 * scale, name
    for name, value in reference.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_stage_1_reports_its_terms_and_keeps_the_last_mapping():
    _, metrics = gradient(config(1))
    assert {"loss", "reconstruction", "scale_consistency", "kl", "lpips", "psnr"} <= metrics.keys()
    state = program_for(config(1)).state
    frozen = {name for name in flat(state.params) if name.startswith(("decoder/norm_out/", "decoder/conv_out/"))}
    assert len(frozen) == 4
    for tree in (state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
        assert set(flat(tree)) == set(flat(state.params)) - frozen


@pytest.mark.parametrize("sampled, name", [(True, "reconstruction"), (False, "scale_consistency")])
def test_stage_1_draws_its_latents_and_its_scale_anew_in_every_step(sampled, name):
    """Of one batch: the loss of a sample is another in each step, that of the mean is of one scale or of the other."""
    run = config(1, reconstruction={"lpips": 0.0, "alpha": 0.25, "scales": (2, 4), "sample_posterior": sampled})

    def apply(variables, x, method):
        if method == "encode":
            return kl.Posterior(pool(x, 2), jnp.zeros((len(x), 16, 16, 3)))
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

    loss = jax.jit(autoencoder_stage(run, SimpleNamespace(apply=apply), None, None).loss)
    batch = batch_for(run)
    found = [loss({}, batch, picture_keys(jax.random.key(0), jnp.asarray(step), 4))[1] for step in range(8)]
    assert len({float(metrics[name]) for metrics in found}) == (8 if sampled else 2)


def test_stage_2_trains_all_but_the_position_table():
    gradients, metrics = gradient(config(2))
    assert {"loss", "supervised_fraction", "loss_detail", "loss_smooth", "loss_by_time"} <= metrics.keys()
    trained = set(flat(program_for(config(2)).state.ema))
    assert trained == set(flat(gradients)) - {"position/table"}
    # The text tokens of the last block only feed attention: nobody reads what they ask for.
    still = {name for name, leaf in flat(gradients).items() if name in trained and not np.any(leaf)}
    assert {name.rsplit("/", 2)[0] for name in still} == {"last_block/text"} and all("/q" in name for name in still)


def test_mask_everywhere_is_plain_flow_matching():
    """Against the formula written out: z0 drawn from the cached posterior and scaled, t, noise, squared error."""
    run = config(2, matching={"mask": "everywhere", "shift": 2.0})
    stage, batch, module = stage_for(run), batch_for(run), opened(2).module
    keys = picture_keys(jax.random.key(3), jnp.asarray(5), 4)
    value, metrics = jax.jit(stage.loss)(start(2), batch, keys)

    sample, noise_key, time = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    scale = lambda z: (z - 0.1) * 0.7
    z0 = jax.vmap(lambda *a: latent_of(*a, scale))(sample, batch["mean"], batch["std"])
    noise = jax.vmap(lambda key: jax.random.normal(key, z0.shape[1:]))(noise_key)
    t = jax.vmap(lambda key: draw_times(key, 1, run.matching, 64)[0])(time)
    s = t[:, None, None, None]
    cond = Conditioning(batch["tokens"], batch["token_mask"], batch["pooled"])
    guess = jax.jit(module.apply)({"params": start(2)}, (1 - s) * z0 + s * noise, t, cond)
    assert float(value) == pytest.approx(float(jnp.mean((guess - (noise - z0)) ** 2)), rel=1e-6)
    assert float(metrics["supervised_fraction"]) == 1.0 and len(set(np.asarray(t).tolist())) == 4


def test_the_dynamic_shift_is_of_the_picture_tokens_of_the_bucket():
    """By FLUX's formula, from the times that are drawn without a shift."""

    def times(rule):
        run, given = config(2, matching={"shift_rule": rule}), []

        def apply(variables, z_t, t, cond, rngs):
            given.append(t)
            return z_t

        module = SimpleNamespace(config=SD3, apply=apply)
        stage = stage_of(run, opened(2)._replace(module=module), KL, TOKENS, None)
        batch = batch_for(run) | dict.fromkeys(("mean", "std"), np.ones((4, 16, 96, 4), np.float32))
        stage.loss({}, batch, jax.random.split(jax.random.key(0), 4))
        return np.asarray(given[0], np.float64)

    odds = np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (8 * 48 - 256))
    t = times("none")
    np.testing.assert_allclose(times("dynamic"), odds * t / (1 + (odds - 1) * t), rtol=1e-5)


def test_a_latent_is_a_scaled_sample_of_its_posterior():
    keys = jax.random.split(jax.random.key(0), 20_000)
    mean, std = jnp.array([[[1.0, -2.0]]]), jnp.array([[[0.5, 0.0]]])
    z0 = jax.vmap(lambda key: latent_of(key, mean, std, functools.partial(kl.scale, KL)))(keys)[:, 0, 0]
    np.testing.assert_allclose(z0.mean(0), (np.array([1.0, -2.0]) - 0.1) * 0.7, atol=0.01)
    np.testing.assert_allclose(z0.std(0), [0.35, 0.0], atol=0.01)


def test_stage_1_freezes_3715_parameters_at_full_size():
    run = configs.load_config({"stage": 1, "resolution": 512})
    model = open_trained(run)
    stage = autoencoder_stage(run, model.module, model.init, None)
    sizes = {path: leaf.size for path, leaf in flat(model.abstract()).items()}
    trained = trained_paths(stage, run, model.abstract())
    assert sum(sizes.values()) == 83_819_683
    assert sum(size for path, size in sizes.items() if path not in trained) == 3_715


@pytest.mark.parametrize("stage, variant", [(1, "sd3"), (1, "sdxl"), (2, "sd3-medium"), (2, "sd3.5-large")])
def test_full_size_state_is_split_over_the_mesh(stage, variant):
    """Master weights, moments and average: no device holds much more than its share."""
    field = "autoencoder" if stage == 1 else "backbone"
    run = configs.load_config({"stage": stage, "models": {f"{field}_variant": variant}})
    if stage == 1:
        run = dataclasses.replace(run, reconstruction=dataclasses.replace(run.reconstruction, lpips=0.0))
    mesh = make_mesh(configs.Mesh(fsdp=4, tensor=2))
    program = build_program(run, mesh, stage_of(run, open_trained(run), kl.VARIANTS["sd3"], 333, None))
    leaves = jax.tree.leaves(program.state)
    whole = sum(leaf.size for leaf in leaves)
    share = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
    assert share < 1.03 * whole / 8
    count = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    assert 3.99 * count < whole <= 4 * count + 10


def test_channels_of_another_autoencoder_are_refused():
    run = config(2)
    with pytest.raises(UserError, match="4 channels.*16"):
        stage_of(run, opened(2), kl.Config(), TOKENS, None)


def test_bfloat16_compute_keeps_float32_state():
    run = config(1, dtype="bfloat16", models={"autoencoder_variant": "tiny"})
    module = open_trained(run).module
    assert module.dtype == jnp.bfloat16 and module.param_dtype == jnp.float32
