"""Laws of what a step reports: the rate that was used, the norm of the whole gradient whatever its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_stage import toy_config

from lwd_jax import config as configs
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.program import Stage, build_program

SIZE = 4096


def linear_program(dtype, **optimizer):
    """(program, its first state) of a loss whose gradient is the batch, computed in `dtype`; the weights begin at 0."""

    def loss(params, batch, keys):
        return (params["kernel"] * batch["x"][0].astype(dtype)).sum().astype(jnp.float32), {}

    stage = Stage(
        lambda key: {"kernel": jnp.zeros(SIZE)},
        loss,
        {"x": jax.ShapeDtypeStruct((1, SIZE), jnp.float32)},
        (),
        operands=lambda trainable: jax.tree.map(lambda leaf: leaf.astype(dtype), trainable),
    )
    config = toy_config(data={"batch_size": 1}, training={"ema": 0.0}, optimizer={"weight_decay": 0.0} | optimizer)
    program = build_program(config, make_mesh(configs.Mesh(), jax.devices()[:1]), stage)
    return program, program.init(jax.random.key(0))


def test_the_norm_of_gradients_in_bfloat16_is_summed_in_float32():
    """In bfloat16 a sum of squares stops growing after a few hundred of them."""
    program, state = linear_program(jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    metrics = program.step(state, {"x": x}, jax.random.key(0))[1]
    gradient = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


def test_the_rate_of_every_step_is_the_one_that_was_used():
    """Lion moves every weight by it. A step that is skipped does not count in the warm-up."""
    program, state = linear_program(jnp.float32, name="lion", learning_rate=0.1, warmup=5)
    rates, moved, before = [], [], np.zeros(SIZE)
    for step in range(4):
        x = np.full((1, SIZE), np.nan if step == 1 else 1.0, np.float32)
        state, metrics = program.step(state, {"x": x}, jax.random.key(0))
        now = np.asarray(state.params["kernel"], np.float64)
        rates.append(float(metrics["learning_rate"]))
        moved.append(np.abs(now - before).max())
        before = now
    assert moved == pytest.approx([0.02, 0, 0.04, 0.06])
    assert rates == pytest.approx([0.02, 0.04, 0.04, 0.06])
