"""Laws of the optimizers: each descends, sharded, and decays what it should by rate x decay; schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.optimizer import OPTIMIZERS, decays, learning_rate, make_optimizer
from lwd_jax.train.state import new_state, state_shardings
from lwd_jax.weights.table import flat, nested

RATES = {"adamw": 0.1, "adafactor": 0.1, "lion": 0.05, "prodigy": 1.0, "muon": 0.1, "schedule_free_adamw": 0.2}


def settings(name, **values):
    return configs.Optimizer(**{"name": name, "learning_rate": RATES[name], "warmup": 1, "weight_decay": 0.0, **values})


def parameters(seed=0):
    random = np.random.default_rng(seed)
    shapes = {
        "blocks/q/kernel": (2, 8, 16),
        "blocks/q/bias": (2, 16),
        "blocks/norm/scale": (2, 8),
        "conv_in/kernel": (3, 3, 8, 8),
    }
    return nested({path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


def distance(params, goal):
    return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(goal)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_reduces_a_quadratic_on_a_sharded_state(name):
    optimizer = make_optimizer(settings(name), 100)
    goal = parameters(1)
    start = functools.partial(new_state, trained=frozenset(flat(goal)), optimizer=optimizer, average=False)
    mesh = make_mesh(configs.Mesh(fsdp=4, tensor=2))
    shardings = state_shardings(jax.eval_shape(start, parameters()), mesh)
    state = jax.jit(start, out_shardings=shardings)(parameters())

    def body(carry, _):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(distance)(params, goal), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    places = (shardings.params, shardings.opt_state)
    steps = jax.jit(lambda carry: jax.lax.scan(body, carry, length=60)[0], out_shardings=places)
    params, opt_state = steps((state.params, state.opt_state))
    assert float(distance(params, goal)) < 0.2 * float(distance(parameters(), goal))
    assert params["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 2, 8)
    if name != "adafactor":  # its moments are factored, or small
        moments = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == (2, 8, 16)]
        assert moments and all(leaf.addressable_shards[0].data.shape == (2, 2, 8) for leaf in moments)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_rate_times_decay_on_matrices_alone(name):
    """Decay changes the first step by rate x decay x parameter on kernels, and by nothing elsewhere."""
    params = parameters()
    gradients = jax.tree.map(lambda p: 0.1 * np.sign(p), params)
    moved = []
    for decay in (0.0, 0.25):
        optimizer = make_optimizer(settings(name, weight_decay=decay), 100)
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        moved.append(optax.apply_updates(params, updates))
    rate = RATES[name]
    if name == "prodigy":  # the rate it starts from, with Adam's bias correction
        rate = 1e-6 * (1 - 0.99) ** 0.5 / (1 - 0.9)
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), *moved)
    tolerance = {"rtol": 2e-2, "atol": 3e-7} if name == "prodigy" else {"rtol": 1e-3, "atol": 1e-5}
    for path, leaf in flat(difference).items():
        if path.endswith("kernel"):
            np.testing.assert_allclose(leaf, rate * 0.25 * flat(params)[path], **tolerance)
        else:
            assert not np.any(leaf), path


@pytest.mark.parametrize(
    "path, answer",
    [
        ("joint_blocks/picture/q/kernel", True),
        ("decoder/conv_in/kernel", True),
        ("joint_blocks/picture/q/lora_a", True),
        ("joint_blocks/picture/q/lora_b", True),
        ("joint_blocks/picture/q/bias", False),
        ("joint_blocks/picture/q_norm/scale", False),
        ("norm_out/scale", False),
        ("position/table", False),
    ],
)
def test_what_decays(path, answer):
    assert decays(path) is answer


def test_what_no_decay_rule_names_raises():
    with pytest.raises(UserError, match="mystery"):
        decays("a/mystery")


def rates(schedule, warmup, steps):
    rate = learning_rate(configs.Optimizer(learning_rate=2.0, schedule=schedule, warmup=warmup), steps)
    return np.array([float(rate(count)) for count in range(steps + 1)])


def test_schedules_have_their_closed_forms():
    np.testing.assert_allclose(rates("constant", 4, 8), [0.5, 1, 1.5, 2, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(rates("linear", 4, 8), [0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5, 0])
    cosine = [0.5, 1, 1.5, 2] + [1 + np.cos(np.pi * k / 4) for k in range(5)]
    np.testing.assert_allclose(rates("cosine", 4, 8), cosine, atol=1e-6)
    np.testing.assert_allclose(rates("constant", 0, 2), [2, 2, 2])


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "adamv"}, "Did you mean 'adamw'"),
        ({"schedule": "cosine", "warmup": 100}, "warmup"),
        ({"name": "prodigy"}, "near 1"),
        ({"name": "schedule_free_adamw", "schedule": "cosine", "warmup": 1}, "constant"),
        ({"name": "schedule_free_adamw", "b1": 0.0}, "b1"),
    ],
)
def test_contradictions_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(dataclasses.replace(configs.Optimizer(), **values), 100)
