"""Laws of rematerialisation: it changes memory and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import AS_USERS

from lwd_jax.backbones import sd3
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.nn.stack import REMAT
from lwd_jax.weights.model import abstract_params

CONFIG = sd3.Config(
    sample_size=32, num_layers=3, attention_head_dim=64, num_attention_heads=1,
    joint_attention_dim=32, pooled_projection_dim=16, pos_embed_max_size=32, qk_norm=True,
)  # fmt: skip
CASES = {  # sizes, and latent positions of a side
    "64 px": (CONFIG, 8),
    "128 px, both kinds of blocks": (dataclasses.replace(CONFIG, num_layers=5, dual_layers=2), 16),
    "256 px": (CONFIG, 32),
}


@functools.cache
def params(config):
    """Random everywhere: a model as it is initialised has no gradient but in its last projection."""
    rng, abstract = np.random.default_rng(0), abstract_params(sd3.BACKBONE, config)
    return jax.tree.map(lambda p: (rng.standard_normal(p.shape) / np.sqrt(64)).astype(np.float32), abstract)


@functools.cache
def arguments(case):
    """What the loss of a case is taken at, its parameters first."""
    config, side = CASES[case]
    rng = np.random.default_rng(side)
    z_t, target = rng.standard_normal((2, 1, side, side, 16)).astype(np.float32)
    tokens, pooled = rng.standard_normal((1, 9, 32)), rng.standard_normal((1, 16))
    cond = Conditioning(tokens.astype("f4"), pooled=pooled.astype("f4"))
    return params(config), z_t, np.array([0.4], np.float32), cond, target


def loss_of(remat, config=CONFIG):
    module = sd3.SD3(config, remat=remat)
    return lambda params, z_t, t, cond, target: jnp.mean((module.apply({"params": params}, z_t, t, cond) - target) ** 2)


@functools.cache
def compiled(remat, case):
    lowered = jax.jit(jax.value_and_grad(loss_of(remat, CASES[case][0]))).lower(*arguments(case))
    return lowered.compile(None if remat == "none" else AS_USERS)


@functools.cache
def slope(case):
    """(direction, d loss / d direction) by central differences, no derivative involved.

    The loss is evaluated in float32 at points 2 |step| apart, far enough for its rounding (1e-7) to be below 1 %.
    """
    loss = jax.jit(loss_of("none", CASES[case][0]))
    here, *others = arguments(case)
    direction = jax.device_get(compiled("none", case)(here, *others)[1])  # NumPy's: every operation of JAX is compiled
    length = float(np.sqrt(sum(np.sum(d * d) for d in jax.tree.leaves(direction))))
    direction = jax.tree.map(lambda d: d / length, direction)
    there, back = (float(loss(jax.tree.map(lambda p, d: p + s * d, here, direction), *others)) for s in (0.01, -0.01))
    return direction, (there - back) / 0.02


def relative(a, b) -> float:
    square = sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return float(np.sqrt(square / sum(np.sum(y**2) for y in jax.tree.leaves(b))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case.startswith("128 px") else pytest.param(case, marks=pytest.mark.heavy) for case in CASES]
)
@pytest.mark.parametrize("remat", ["attention", "full"])
def test_gradients_under_jit_at_local_batch_1(remat, case):
    """No remat and finite differences agree with every policy. (A jitted remat on XLA:CPU was once seen wrong by 192 %
    at 128 px and local batch 1 alone, so the law is held at each of these sizes.)"""
    value, gradient = jax.device_get(compiled(remat, case)(*arguments(case)))
    plain_value, plain = jax.device_get(compiled("none", case)(*arguments(case)))
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    assert relative(gradient, plain) <= 1e-5
    direction, expected = slope(case)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(np.vdot(g, d)), gradient, direction)))
    np.testing.assert_allclose(along, expected, rtol=0.02)


def test_policies_save_memory():
    case = "128 px, both kinds of blocks"
    used = {remat: compiled(remat, case).memory_analysis().temp_size_in_bytes for remat in REMAT}
    assert max(used["full"], used["attention"]) < used["none"] / 2, used


def test_attention_policy_saves_what_cudnns_backward_needs():
    """The fused kernel's log-sum-exp is no named value: its primitive must be known to the policy by its name."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    forward, backward = fused._dot_product_attention_fwd_p_wrapper, fused._dot_product_attention_bwd_p_wrapper
    assert REMAT["attention"](forward) and not REMAT["attention"](backward)


def test_unknown_policy_is_named():
    with pytest.raises(UserError, match="'attention'"):
        jax.eval_shape(loss_of("attentoin"), *arguments("64 px"))
