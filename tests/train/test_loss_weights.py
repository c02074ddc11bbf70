"""A loss with weights of its own hands them to the compiled step: 59 MB of LPIPS must not become constants of it."""

import jax
import jax.numpy as jnp
import numpy as np
from toy_stage import toy_batch, toy_config, toy_params, toy_stage

from lwd_jax import config as configs
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.program import build_program
from lwd_jax.train.step import picture_keys

WEIGHTS = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)


def weighted(weights, params, batch, keys):
    value, metrics = toy_stage().loss(params, batch, keys)
    return value + jnp.sum(weights) * jnp.mean(params["conv_out"]["kernel"]), metrics


def test_weights_of_a_loss_are_arguments():
    stage = toy_stage()._replace(loss=jax.tree_util.Partial(weighted, jnp.asarray(WEIGHTS)))
    program = build_program(toy_config(), make_mesh(configs.Mesh(fsdp=2), jax.devices()[:2]), stage)
    lowered = program.step.lower(program.state, program.batch, jax.random.key(0))
    assert len(lowered.as_text()) < WEIGHTS.nbytes  # as a constant they alone would be two characters a byte
    batch = jax.device_put(toy_batch(0), {name: leaf.sharding for name, leaf in program.batch.items()})
    _, metrics = program.step(program.init(jax.random.key(0)), batch, jax.random.key(0))
    params = toy_params()
    plain, _ = jax.jit(toy_stage().loss)(params, toy_batch(0), picture_keys(jax.random.key(0), jnp.asarray(0), 8))
    np.testing.assert_allclose(metrics["loss"], plain + WEIGHTS.sum() * params["conv_out"]["kernel"].mean(), rtol=1e-4)
