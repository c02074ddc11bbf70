"""The table of optimizers and schedules; which parameters decay and which are frozen.

Every optimizer is optax's, given one schedule and one decay mask. Decoupled weight decay (AdamW, Loshchilov and Hutter
2019, Algorithm 2) means the same for all of them: learning rate x weight_decay x parameter.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwd_jax import config as configs
from lwd_jax.errors import UserError, choose
from lwd_jax.parallel.rules import path_string

SCHEDULE_FREE = "schedule_free_adamw"

# Path pattern -> does weight decay apply; first match wins. Norms, biases and the position table are not weights of a
# matrix product: pulling them to zero is no regulariser.
DECAY = (
    (r"(^|/)(bias|scale)$", False),
    (r"(^|/)(norm[^/]*|[^/]*_norm)/[^/]+$", False),
    (r"(^|/)[^/]*(position|pos_embed)[^/]*(/[^/]+)?$", False),
    (r"(^|/)kernel$", True),
    (r"(^|/)lora_[ab]$", True),
)


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter.

    Raises:
      UserError: no row of DECAY names it.
    """
    for pattern, answer in DECAY:
        if re.search(pattern, path):
            return answer
    raise UserError(f"No decay rule names the parameter '{path}'; add a row to lwd_jax/train/optimizer.py.")


def decay_mask(tree: Any) -> Any:
    """`decays` for every leaf of a (masked) parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_string(path)), tree)


# ---------------------------------------------------------------------------------------------------- schedules

SCHEDULES = {  # remaining share of the learning rate at a share p in [0, 1] of the steps after the warm-up
    "constant": lambda p: jnp.ones_like(p),
    "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "linear": lambda p: 1 - p,
}


def learning_rate(config: configs.Optimizer, steps: int) -> Callable:
    """The schedule: count of taken steps -> learning rate (float32).

    Step k of the warm-up (k = 0, 1, ..) uses (k + 1) / warmup of the rate, so that no step is lost; then the named
    decay runs to 0 at `steps`.

    Raises:
      UserError: an unknown schedule, or a decay that would begin after the last step.
    """
    decay = choose(SCHEDULES, config.schedule, "schedule")
    if config.schedule != "constant" and config.warmup >= steps:
        raise UserError(
            f"optimizer.warmup is {config.warmup}, but the {config.schedule} schedule ends at training.steps {steps}."
        )

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))
        share = jnp.clip((count - config.warmup) / max(steps - config.warmup, 1), 0.0, 1.0)
        return config.learning_rate * warm * decay(share)

    return schedule


# --------------------------------------------------------------------------------------------------- optimizers


def _adamw(rate, config):
    return optax.adamw(
        rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )


def _adafactor(rate, config):
    # No momentum: its memory is what Adafactor saves. The rate is absolute, so that it means what it does for AdamW.
    # optax adds the decay after the learning rate: hand it the product.
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=lambda count: config.weight_decay * rate(count),
        weight_decay_mask=decay_mask,
    )


def _lion(rate, config):
    return optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)


def _prodigy(rate, config):
    """optax's Prodigy decays every parameter; here its own decay is 0 and the masked one is added beside it."""
    if config.learning_rate < 0.01:
        raise UserError(
            "Prodigy finds the step size itself: optimizer.learning_rate is a factor near 1, not "
            f"{config.learning_rate}."
        )
    prodigy = optax.contrib.prodigy(rate, betas=(config.b1, config.b2), eps=config.eps, safeguard_warmup=True)

    def update(gradients, state, params, **_):
        updates, new = prodigy.update(gradients, state, params)
        step = state.estim_lr * rate(state.count) * config.weight_decay
        decay = jax.tree.map(lambda p, masked: step * p if masked else jnp.zeros_like(p), params, decay_mask(params))
        return jax.tree.map(jnp.subtract, updates, decay), new

    return optax.GradientTransformation(prodigy.init, update)


def _muon_axes(params):
    """Matrices [.., in, out] and convolutions [kh, kw, in, out]; leading axes are layers; all else goes to Adam."""

    def axes(path, leaf):
        path = path_string(path)
        if not decays(path):
            return None
        rank = leaf.ndim
        inner = (rank - 4, rank - 3, rank - 2) if re.search(r"conv[^/]*/kernel$", path) else (rank - 2,)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inner, output_axis=(rank - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; optax's own


def _muon(rate, config):
    # consistent_rms .2 gives updates of AdamW's size, so that one learning rate serves both (arXiv 2502.16982, eq. 4).
    return optax.contrib.muon(
        rate,
        # A row for each iteration: of one for all optax writes the loop out, five times as many products to compile.
        ns_coeffs=(_NEWTON_SCHULZ,) * 5,
        beta=config.b1,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,
    )


def _schedule_free_adamw(rate, config):
    """AdamW without momentum inside, Polyak averaging outside (arXiv 2405.15682, eq. 1-3)."""
    if config.schedule != "constant":
        raise UserError(f"{SCHEDULE_FREE} needs optimizer.schedule 'constant', but it is '{config.schedule}'.")
    if not 0 < config.b1 < 1:
        raise UserError(f"{SCHEDULE_FREE} needs optimizer.b1 in (0, 1), but it is {config.b1}.")
    base = optax.chain(
        optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate),
    )
    # optax counts the averaging's steps from 1 and the base's from 0.
    return optax.contrib.schedule_free(base, lambda count: rate(count - 1), b1=config.b1)


OPTIMIZERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "muon": _muon,
    SCHEDULE_FREE: _schedule_free_adamw,
}


def make_optimizer(config: configs.Optimizer, steps: int) -> optax.GradientTransformation:
    """The optimizer of the config, over the trainable parameters in float32; clipping is the step's.

    Raises:
      UserError: an unknown name, or settings that contradict the optimizer.
    """
    return choose(OPTIMIZERS, config.name, "optimizer")(learning_rate(config, steps), config)


# ------------------------------------------------------------------------------------------------------- freezing


def trainable_paths(paths, config: configs.Optimizer, always_frozen: tuple[str, ...]) -> frozenset[str]:
    """The paths that train: all, less those a pattern of `freeze` or `always_frozen` is found in; if `train_only` is
    given, only those one of its patterns is found in.

    Raises:
      UserError: a malformed pattern, one that names no parameter, or nothing left to train.
    """
    paths = list(paths)

    def named(pattern: str, field: str) -> set[str]:
        try:
            found = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise UserError(f"'{pattern}' of {field} is not a regular expression: {error}.") from error
        if not found:
            raise UserError(f"'{pattern}' of {field} names no parameter of this model.")
        return found

    trained = set(paths)
    if config.train_only:
        trained = set().union(*(named(pattern, "optimizer.train_only") for pattern in config.train_only))
    for pattern in config.freeze:
        trained -= named(pattern, "optimizer.freeze")
    for pattern in always_frozen:
        trained -= {path for path in paths if re.search(pattern, path)}
    if not trained:
        raise UserError("optimizer.freeze and optimizer.train_only leave no parameter to train.")
    return frozenset(trained)
