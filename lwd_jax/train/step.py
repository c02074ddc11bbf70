"""The one training step, for any loss `(params, batch, keys) -> (scalar, metrics)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwd_jax import config as configs
from lwd_jax.nn.platform import platform
from lwd_jax.train.operands import of_masters
from lwd_jax.train.optimizer import SCHEDULE_FREE, learning_rate, make_optimizer
from lwd_jax.train.state import State, float32, merge, split

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict]]

SUMMED = "_by_time"  # metrics whose names end so are sums (over pictures); all others are means


def picture_keys(key: jax.Array, step: jax.Array, pictures: int) -> jax.Array:
    """[B] keys, one per picture of the batch: fold_in(key, step), then one per position.

    What stage 2 draws for a picture depends on the seed, the step and its position, and on nothing else: not on the
    mesh, nor on the number of accumulation steps. Stage 1 draws its scale and its samples by the first key of the
    pictures that are processed together: with accumulation, a scale for each part.
    """
    return jax.random.split(jax.random.fold_in(key, step), pictures)


def add_metrics(total: dict, part: dict, weight: float) -> dict:
    """`total` + one part of the batch: sums are added, means are added with their weight."""
    return {name: total[name] + (part[name] if name.endswith(SUMMED) else weight * part[name]) for name in total}


def accumulated_gradient(loss: Loss, trainable: Any, params: Any, batch: Any, keys: jax.Array, parts: int):
    """Gradient by `trainable`, which joins or replaces `params`, and metrics of the whole batch, computed in `parts`
    parts one after the other.

    The parts are interleaved (part i takes pictures i, i + parts, ..), so that a batch split over devices stays where
    it lies.

    Returns:
      (gradient, metrics); both are means over the batch, metrics named SUMMED sums. The gradient of one part has the
      dtypes of `trainable`, that of several is summed in float32.
    """

    def of_part(trainable, batch, keys):
        value, metrics = loss(merge(params, trainable), batch, keys)
        return value, {**metrics, "loss": value}

    gradient = jax.grad(of_part, has_aux=True)
    if parts == 1:
        return gradient(trainable, batch, keys)

    interleaved = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), (batch, keys)
    )
    shapes = jax.eval_shape(gradient, trainable, *jax.tree.map(lambda x: x[0], interleaved))[1]

    def body(total, part):
        gradients, metrics = gradient(trainable, *part)
        with jax.named_scope("accumulate"):
            gradients = jax.tree.map(lambda t, g: t + g.astype(jnp.float32) / parts, total[0], gradients)
            return (gradients, add_metrics(total[1], metrics, 1 / parts)), None

    zeros = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable),
        jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes),
    )
    return jax.lax.scan(body, zeros, interleaved)[0]


def clip(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients scaled to a global norm of at most `limit`; 0 = as they are (Pascanu et al. 2013, Algorithm 1)."""
    if limit == 0:
        return gradients
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: g * scale, gradients)


def _average(config: configs.Config, old: Any, trainable: Any, opt_state: Any) -> Any:
    if config.optimizer.name == SCHEDULE_FREE:
        return optax.contrib.schedule_free_eval_params(opt_state, trainable)
    # As a difference: in float32 decay and 1 - decay add up to 1 + 2.6e-8 (of 0.9998), and the average would be a
    # 7,500th too large in the end.
    rate = 1 - config.training.ema
    return jax.tree.map(lambda a, p: a + rate * (p - a), old, trainable)


def keeps_average(config: configs.Config) -> bool:
    """Whether the state has an average: an EMA, or schedule-free AdamW's own."""
    return config.training.ema > 0 or config.optimizer.name == SCHEDULE_FREE


def _where(finite: jax.Array, update: Callable, old: Any, *given: Any) -> Any:
    """`update(old, *given)`, or `old` where the step is not finite; whatever of it XLA updates in place.

    A GPU does it by a select, which goes into the one kernel of each parameter; it would copy all that comes out of a
    conditional: 30 GB for SD3-medium. TPUs and CPUs update in a conditional's place, and would copy for a select.
    """
    if platform() == "gpu":
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(old, *given), old)
    return jax.lax.cond(finite, update, lambda old, *_: old, old, *given)


def make_step(trained: frozenset[str], config: configs.Config, operands: Callable) -> Callable:
    """`(loss, state, batch, key) -> (state, metrics)`; to be jitted with the state donated.

    The loss is differentiated with respect to `operands(what trains)`, see `Stage`; everything after is float32.

    A step whose loss or gradient norm is not finite leaves the state as it was, but for the counters. The schedule of
    the learning rate counts the steps that were taken.

    Metrics: the loss's own, `loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and `streak` (counters).
    """
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    rate = learning_rate(config.optimizer, config.training.steps)

    def update(old, gradients, norm):
        trainable, opt_state, average = old
        with jax.named_scope("clip"):
            gradients = clip(float32(gradients), norm, config.optimizer.clip)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        with jax.named_scope("ema"):
            average = _average(config, average, trainable, opt_state) if keeps_average(config) else {}
        return trainable, opt_state, average

    def step(loss: Loss, state: State, batch: Any, key: jax.Array) -> tuple[State, dict]:
        pictures = jax.tree.leaves(batch)[0].shape[0]
        keys = picture_keys(key, state.step, pictures)
        trainable, frozen = split(state.params, trained)
        with jax.named_scope("gradient"):
            gradients, metrics = accumulated_gradient(
                loss, operands(trainable), state.params, batch, keys, config.optimizer.accumulate
            )
            gradients = of_masters(gradients)
        with jax.named_scope("norm"):
            norm = optax.global_norm(float32(gradients))
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        kept = _where(finite, update, (trainable, state.opt_state, state.ema), gradients, norm)
        skipped = state.skipped + ~finite
        streak = jnp.where(finite, 0, state.streak + 1)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": rate(state.step - state.skipped),
            "skipped": skipped,
            "streak": streak,
        }
        return State(state.step + 1, merge(frozen, kept[0]), kept[1], kept[2], skipped, streak), metrics

    return step
