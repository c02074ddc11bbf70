"""A field that is said to have no effect has none; where nothing is said it has one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.config import _READ_WITH, load_config, without_effect
from lwd_jax.objective.masks import MASKS, supervision_mask
from lwd_jax.objective.matching import draw_times
from lwd_jax.objective.paths import SHIFT_RULES, TIME_SAMPLERS
from lwd_jax.train.optimizer import OPTIMIZERS, make_optimizer
from lwd_jax.train.step import _average

# Every switch's values, and another value than the default of every field that is read with some of them.
SWITCHES = {
    "matching.mask": MASKS,
    "matching.time_sampler": TIME_SAMPLERS,
    "matching.shift_rule": SHIFT_RULES,
    "sampling.shift_rule": ("static", "dynamic"),
    "optimizer.name": OPTIMIZERS,
}
OTHERS = {
    "matching.floor": 0.4,
    "matching.softness": 0.3,
    "matching.logit_mean": 0.5,
    "matching.logit_std": 0.7,
    "matching.mode_scale": 0.5,
    "matching.shift": 2.0,
    "sampling.shift": 2.0,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.6,
    "optimizer.eps": 0.1,
    "training.ema": 0.5,
}


def config_of(**fields):
    values = {"optimizer": {"learning_rate": 1.0, "warmup": 0}}  # Prodigy takes no other
    for dotted, value in fields.items():
        section, name = dotted.split(".")
        values.setdefault(section, {})[name] = value
    return load_config(values)


def computed(config):
    """What these fields go into: mask, times, the sampler's shift, and parameters and average after three steps."""
    key = jax.random.key(0)
    saliency, t = jax.random.uniform(key, (8, 5, 3, 1)), jnp.linspace(0, 1, 8)
    matching = config.matching
    yield supervision_mask(saliency, t, matching.floor, matching.mask, matching.softness)
    yield draw_times(key, 8, matching, 1024)
    yield SHIFT_RULES[config.sampling.shift_rule](config.sampling, 1024)
    # The matrix is Muon's, the bias Adam's.
    params = {"layer": {"kernel": jnp.arange(12.0).reshape(4, 3) / 9, "bias": jnp.arange(3.0)}}
    optimizer = make_optimizer(config.optimizer, 10)
    state, average = optimizer.init(params), params
    for step in range(3):
        gradients = jax.tree.map(lambda p: jnp.sin(3 * p + step), params)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        average = _average(config, average, params, state)
    yield params
    yield average


def same(old, new):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, map(tuple, (old, new)))))


def test_every_switch_and_field_is_here():
    assert SWITCHES.keys() == {switch for switch, _, _ in _READ_WITH}
    assert OTHERS.keys() == {name for _, _, names in _READ_WITH for name in names}
    assert all(set(values) < set(SWITCHES[switch]) for switch, values, _ in _READ_WITH)


CASES = [
    (switch, value, name)
    for switch, _, names in _READ_WITH
    for value, name in itertools.product(SWITCHES[switch], names)
]


@pytest.mark.parametrize("switch, value, name", CASES)
def test_a_field_is_told_of_exactly_where_nothing_reads_it(switch, value, name):
    plain, changed = config_of(**{switch: value}), config_of(**{switch: value, name: OTHERS[name]})
    assert without_effect(plain) == []
    told = without_effect(changed)
    assert told == ([f"Config '{name}' has no effect with {switch} '{value}'."] if told else [])
    assert bool(told) == same(computed(plain), computed(changed))
