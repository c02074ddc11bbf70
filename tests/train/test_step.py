"""Laws of the step, on a small stage: devices, accumulation, freezing, averages, skipped steps, donation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_stage import toy_batch, toy_config, toy_params, toy_stage

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.nn.platform import for_platform
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.train.program import Stage, build_program
from lwd_jax.train.state import eval_params
from lwd_jax.train.step import clip
from lwd_jax.weights.table import flat, nested

ONE = jax.devices()[:1]
CONFIG = toy_config()
MESHES = {
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "data 2 fsdp 2 tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 4 context 2": {"fsdp": 4, "context": 2},
}


@functools.cache
def program_on(mesh, config, **stage):
    return build_program(config, mesh, toy_stage(config.data.batch_size, **stage))


def one_device(config, **stage):
    return program_on(make_mesh(configs.Mesh(), ONE), config, **stage)


def place(program, batch):
    return jax.device_put(batch, {name: leaf.sharding for name, leaf in program.batch.items()})


def take(program, steps=1, make=toy_batch, state=None, size=8):
    """(state, metrics of the last step)."""
    state = program.init(jax.random.key(0)) if state is None else state
    for _ in range(steps):
        state, metrics = program.step(state, place(program, make(int(state.step), size)), jax.random.key(1))
    return state, metrics


def largest_difference(first, second):
    """Largest absolute difference over a tree, relative to the largest magnitude of each leaf."""
    first, second = (flat(jax.device_get(tree)) for tree in (first, second))
    return max(np.abs(first[name] - second[name]).max() / max(np.abs(first[name]).max(), 1e-6) for name in first)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_equal_one(axes):
    """Loss, gradient norm, updates and moments; the first moment with b1 = .9 is a tenth of the float32 gradient."""
    alone, reference = take(one_device(CONFIG))
    state, metrics = take(program_on(make_mesh(configs.Mesh(**axes)), CONFIG))
    assert float(metrics["loss"]) == pytest.approx(float(reference["loss"]), rel=1e-6)
    assert largest_difference(alone.opt_state[0].mu, state.opt_state[0].mu) < 1e-5
    big = {name: np.abs(leaf) > 1e-5 for name, leaf in flat(jax.device_get(alone.opt_state[0].mu)).items()}
    # Where Adam's first step is not the sign of rounding noise.
    for name, leaf in flat(jax.device_get(alone.params)).items():
        np.testing.assert_allclose(leaf[big[name]], flat(jax.device_get(state.params))[name][big[name]], atol=1e-5)


def test_a_mutant_does_not_pass_as_equal():
    """The control: mixing a row of the pictures moves the loss little and the gradient much."""
    alone, _ = take(one_device(CONFIG))
    wrong, _ = take(program_on(make_mesh(configs.Mesh(data=8, fsdp=1)), CONFIG, mutant=True))
    assert largest_difference(alone.opt_state[0].mu, wrong.opt_state[0].mu) > 1e-3


def test_large_parameters_and_their_moments_are_split():
    state, _ = take(program_on(make_mesh(configs.Mesh(data=2, fsdp=2, tensor=2)), CONFIG))
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
        assert tree["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 8, 8)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_accumulation_equals_one_large_batch(fsdp):
    mesh = make_mesh(configs.Mesh(fsdp=fsdp), jax.devices()[:fsdp])
    whole, reference = take(one_device(CONFIG))
    parts, metrics = take(program_on(mesh, toy_config(optimizer={"accumulate": 4})))
    assert largest_difference(whole.opt_state[0].mu, parts.opt_state[0].mu) < 1e-5
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(reference[name]), rel=1e-5)
    assert float(metrics["count_by_time"].sum()) == 8
    assert float(metrics["loss_by_time"].sum()) == pytest.approx(float(reference["loss_by_time"].sum()), rel=1e-5)


def test_accumulation_must_divide():
    with pytest.raises(UserError, match="data x fsdp = 8"):
        program_on(make_mesh(configs.Mesh()), toy_config(optimizer={"accumulate": 2}))


def test_height_must_divide_over_context():
    with pytest.raises(UserError, match="mesh.context = 3"):
        program_on(make_mesh(configs.Mesh(fsdp=2, context=3), jax.devices()[:6]), toy_config())


def test_frozen_parameters_stay_and_cost_nothing():
    config = toy_config(optimizer={"freeze": (r"blocks/norm/", r"/q/")})
    program = one_device(config, frozen=(r"^conv_out/",))
    before = jax.device_get(program.init(jax.random.key(0)).params)
    state, _ = take(program, 3)
    frozen = {"blocks/q/kernel", "blocks/norm/scale", "blocks/norm/bias", "conv_out/kernel"}
    for name, leaf in flat(jax.device_get(state.params)).items():
        assert np.array_equal(leaf, flat(before)[name]) == (name in frozen), name
    for tree in (state.ema, state.opt_state[0].mu, state.opt_state[0].nu):
        assert not frozen & set(flat(tree))
        assert set(flat(tree)) | frozen == set(flat(before))


def test_train_only():
    state = one_device(toy_config(optimizer={"train_only": (r"/(q|k)/", "conv_in"), "freeze": (r"in/bias",)})).state
    expected = {"blocks/q/kernel", "blocks/k/kernel", "conv_in/kernel"}
    assert set(flat(state.opt_state[0].mu)) == set(flat(state.ema)) == expected


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"freeze": ("blokcs",)}, "blokcs.*names no parameter"),
        ({"freeze": ("(",)}, "regular expression"),
        ({"freeze": ("",)}, "no parameter to train"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        one_device(toy_config(optimizer=settings))


def test_average_has_its_closed_form():
    program = one_device(CONFIG)  # training.ema = .9
    state = program.init(jax.random.key(0))
    history = [jax.device_get(state.params)]
    for _ in range(4):
        state, _ = take(program, 1, state=state)
        history.append(jax.device_get(state.params))
    expected = jax.tree.map(lambda *p: 0.9**4 * p[0] + sum(0.1 * 0.9 ** (4 - i) * p[i] for i in range(1, 5)), *history)
    assert largest_difference(expected, state.ema) < 1e-6
    assert largest_difference(expected, eval_params(state)) < 1e-6


def test_average_of_what_stays_is_what_stays():
    """Bit for bit: in float32 .9998 and 1 - .9998 add up to more than 1, and an average by them grows."""
    program = one_device(toy_config(training={"ema": 0.9998}, optimizer={"learning_rate": 1e-30}))
    state = program.init(jax.random.key(0))
    start = jax.device_get(state.params)
    state, _ = take(program, 40, state=state)
    assert largest_difference(start, state.params) == largest_difference(start, state.ema) == 0


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_average_of_schedule_free_is_its_own(ema):
    program = one_device(toy_config(optimizer={"name": "schedule_free_adamw"}, training={"ema": ema}))
    state, _ = take(program, 3)
    expected = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    assert largest_difference(expected, eval_params(state)) < 1e-6
    assert largest_difference(state.params, eval_params(state)) > 1e-4


def test_what_trains_is_float32_and_what_is_frozen_keeps_its_dtype():
    """A bfloat16 weight does not move at the learning rates in use, nor a bfloat16 average at .9998."""
    frozen = (r"^conv_out/",)
    program = build_program(CONFIG, make_mesh(configs.Mesh(), jax.devices()[:1]), toy_stage(frozen=frozen))
    given = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), toy_params())
    state = program.init(jax.random.key(0), given)
    for tree in (state.params, state.ema, state.opt_state, eval_params(state)):
        kinds = {path: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf.ndim}
        assert {kind for path, kind in kinds.items() if "conv_out" not in str(path)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params["conv_out"])} == {jnp.dtype("bfloat16")}


def test_no_average():
    state = one_device(toy_config(training={"ema": 0.0})).init(jax.random.key(0))
    assert state.ema == {}
    assert largest_difference(eval_params(state), state.params) == 0


def poisoned(index, size):
    """The batch of a step; those of steps 1 and 2 have a NaN."""
    batch = toy_batch(index, size)
    if index in (1, 2):
        batch["weight"][3] = np.nan
    return batch


def test_a_non_finite_step_is_skipped_and_counted():
    program = one_device(CONFIG)
    good, _ = take(program, 1)
    kept = jax.device_get((good.params, good.opt_state, good.ema))
    bad, metrics = take(program, 2, poisoned, good)
    assert not np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == int(metrics["streak"]) == 2
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get((bad.params, bad.opt_state, bad.ema)))
    assert int(bad.step) == 3
    after, metrics = take(program, 1, poisoned, bad)
    assert np.isfinite(metrics["loss"]) and int(after.skipped) == 2 and int(after.streak) == 0
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(kept[0]), jax.tree.leaves(jax.device_get(after.params))))


def test_a_gpu_takes_and_skips_the_same_steps():
    """Bit for bit. It selects, where other platforms branch: no conditional holds a parameter (it would be copied)."""
    found = {}
    for name in ("gpu", "cpu"):
        with for_platform(name):
            program = build_program(CONFIG, make_mesh(configs.Mesh(), ONE), toy_stage())
            state = program.init(jax.random.key(0))
            text = program.step.lower(state, place(program, toy_batch(0, 8)), jax.random.key(1)).as_text()
            found[name] = [*take(program, 3, poisoned), text.count("stablehlo.case")]
    assert int(found["gpu"][0].skipped) == 2
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(found[name][:2]) for name in ("gpu", "cpu")))
    assert (found["gpu"][2], found["cpu"][2]) == (0, 1)


def test_a_non_finite_gradient_alone_is_skipped():
    """sqrt at 0: a finite loss with an infinite gradient."""
    stage = toy_stage()
    odd = stage._replace(loss=lambda p, b, k: (jnp.sqrt(jnp.sum(jnp.square(p["blocks"]["norm"]["bias"] * 0))), {}))
    program = build_program(toy_config(), make_mesh(configs.Mesh(), ONE), odd)
    state, metrics = take(program)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and int(state.skipped) == 1


def test_the_state_is_donated():
    program = one_device(CONFIG)
    before = program.init(jax.random.key(0))
    leaves = jax.tree.leaves((before.params, before.opt_state, before.ema))
    state, _ = take(program, 1, state=before)
    assert all(leaf.is_deleted() for leaf in leaves)
    compiled = program.step.lower(program.state, program.batch, jax.random.key(0)).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_clipping_is_by_the_global_norm():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    norm = optax.global_norm(gradients)
    assert float(optax.global_norm(clip(gradients, norm, 1.0))) == pytest.approx(1.0)
    assert largest_difference(gradients, clip(gradients, norm, 6.0)) == 0
    assert largest_difference(gradients, clip(gradients, norm, 0.0)) == 0


def test_randomness_depends_on_seed_and_step_alone():
    program = one_device(CONFIG)
    batch = place(program, toy_batch(0))

    def loss(seed, step):
        state = program.init(jax.random.key(0))._replace(step=jnp.asarray(step, jnp.int32))
        return float(program.step(state, batch, jax.random.key(seed))[1]["loss"])

    assert loss(1, 5) == loss(1, 5)
    assert len({loss(1, 5), loss(2, 5), loss(1, 6)}) == 3


@pytest.mark.parametrize("average", [0.0, 0.9], ids=["plain", "average"])
def test_no_copy_is_made_of_what_is_updated(average):
    """Beside the state, which is updated in place, a step whose activations are small holds its gradients and, while it
    makes them, one array of a weight's size."""
    weights = {f"{i}/kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(4)}

    def loss(params, batch, keys):
        y = batch["x"]
        for weight in flat(params).values():
            y = jnp.tanh(y @ weight)
        return jnp.square(y).mean(), {}

    stage = Stage(
        lambda key: nested({path: jnp.zeros(leaf.shape) for path, leaf in weights.items()}),
        loss,
        {"x": jax.ShapeDtypeStruct((1, 512), jnp.float32)},
        (),
    )
    config = toy_config(data={"batch_size": 1}, training={"ema": average}, optimizer={"name": "adamw", "clip": 1.0})
    program = build_program(config, make_mesh(configs.Mesh(), ONE), stage)
    compiled = program.step.lower(program.state, program.batch, jax.random.key(0)).compile()
    one = 4 * 512 * 512
    assert compiled.memory_analysis().temp_size_in_bytes < (len(weights) + 1.1) * one
