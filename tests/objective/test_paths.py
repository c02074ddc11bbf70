"""Times equal diffusers in distribution, weightings and shifts in value; the path's derivative is the velocity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lwd_jax.config import Matching
from lwd_jax.data import buckets
from lwd_jax.errors import UserError
from lwd_jax.objective import paths
from lwd_jax.objective.matching import draw_times

MANY = 20_000


def draws(seed=0, **options):
    config = Matching(**{"shift_rule": "none"} | options)
    t = np.asarray(jax.jit(draw_times, static_argnums=(1, 2, 3))(jax.random.key(seed), MANY, config, 4096))
    assert t.shape == (MANY,) and t.dtype == np.float32
    assert 0 <= t.min() and t.max() <= 1
    return t.astype(np.float64)


def agree(sample, law):
    return stats.kstest(sample, law).pvalue > 1e-3


def test_path_runs_from_data_to_noise_at_the_velocity():
    z0, noise = np.random.default_rng(0).standard_normal((2, 2, 4, 3, 5)).astype(np.float32)
    zeros, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
    np.testing.assert_array_equal(jax.jit(paths.noised)(z0, noise, zeros), z0)
    np.testing.assert_array_equal(jax.jit(paths.noised)(z0, noise, ones), noise)
    t = np.array([0.3, 0.8], np.float32)
    _, moved = jax.jit(lambda t: jax.jvp(lambda t: paths.noised(z0, noise, t), (t,), (ones,)))(t)
    np.testing.assert_allclose(moved, paths.velocity(z0, noise), atol=1e-6)


@pytest.mark.parametrize(
    "sampler, options",
    [
        ("uniform", {}),
        ("logit_normal", {}),
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.6}),
        ("mode", {}),
        ("mode", {"mode_scale": -0.5}),
    ],
)
def test_samplers_equal_diffusers(sampler, options):
    torch = pytest.importorskip("torch")
    training_utils = pytest.importorskip("diffusers.training_utils")
    torch.manual_seed(0)
    values = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | options
    u = training_utils.compute_density_for_timestep_sampling(sampler, MANY, **values).double().numpy()
    ours = draws(time_sampler=sampler, **options)
    assert agree(ours, u)
    if options.get("logit_mean"):
        assert not agree(ours, 1 - u)


def test_scripts_of_diffusers_train_at_one_minus_u():
    """Their table of noise levels falls, so a mean m given to them is -m here, shift included."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = diffusers.training_utils.compute_density_for_timestep_sampling("logit_normal", MANY, 0.7, 1.0, None)
    theirs = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()].double().numpy()
    asked = {"time_sampler": "logit_normal", "shift_rule": "static", "shift": 3.0}
    assert agree(draws(1, logit_mean=-0.7, **asked), theirs)
    assert not agree(draws(1, logit_mean=0.7, **asked), theirs)


def test_cosmap_has_its_density():
    def cumulative(t):  # integral of 2 / (pi (1 - 2 t + 2 t^2))
        return 2 / np.pi * np.arctan2(t, 1 - t)

    assert agree(draws(time_sampler="cosmap"), cumulative)
    t = np.linspace(0.01, 0.99, 50)
    slope = (cumulative(t + 1e-5) - cumulative(t - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, paths.WEIGHTINGS["cosmap"](t), rtol=1e-5)


def test_draws_are_fixed_by_their_key():
    assert (draws(3) == draws(3)).all() and (draws(3) != draws(4)).any()


@pytest.mark.parametrize("name", paths.WEIGHTINGS)
def test_weightings_equal_diffusers(name):
    torch = pytest.importorskip("torch")
    training_utils = pytest.importorskip("diffusers.training_utils")
    t = np.linspace(1e-3, 1, 97, dtype=np.float32)  # the smallest of diffusers' grid
    expected = training_utils.compute_loss_weighting_for_sd3(name, torch.tensor(t))
    np.testing.assert_allclose(jax.jit(paths.WEIGHTINGS[name])(t), expected, rtol=1e-6)


def test_weightings_are_finite_at_both_ends():
    for weighting in paths.WEIGHTINGS.values():
        assert np.isfinite(jax.jit(weighting)(np.array([0, 1], np.float32))).all()


def test_shifts():
    assert paths.shift_time(0.5, 3.0) == 0.75
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(paths.shift_time(t, 1.0), t)
    np.testing.assert_allclose(paths.shift_time(paths.shift_time(t, 3.0), 1 / 3), t, atol=1e-6)
    assert paths.dynamic_shift(4096) == pytest.approx(3.16, abs=5e-3)
    assert paths.dynamic_shift(16384) == pytest.approx(25.3, abs=5e-2)
    assert paths.dynamic_shift(65536) == pytest.approx(1.0e5, rel=5e-2)
    assert paths.dynamic_shift(256) == pytest.approx(np.exp(0.5))


def test_a_dynamic_shift_beyond_1024_px_warns_once_of_a_size(caplog):
    paths.dynamic_shift.cache_clear()
    assert max(height * width for height, width in buckets.sizes(1024, True)) // 256 <= 5120
    assert [paths.dynamic_shift(tokens) > 1 for tokens in (4096, 5120)] and not caplog.records
    for _ in range(2):
        paths.dynamic_shift(16384)
    (line,) = caplog.messages
    assert "25.28 for 16384 tokens" in line
    at_half = paths.shift_time(0.5, paths.dynamic_shift(16384))
    assert f"moves half of all times above {float(at_half):.4f}:" in line


@pytest.mark.parametrize("rule, shift", [("none", 1.0), ("static", 3.0), ("dynamic", 3.158)])
def test_shift_follows_the_sampler(rule, shift):
    plain, shifted = draws(time_sampler="uniform"), draws(time_sampler="uniform", shift_rule=rule)
    np.testing.assert_allclose(shifted, shift * plain / (1 + (shift - 1) * plain), atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no time sampler 'logitnormal'. Did you mean 'logit_normal'"):
        draws(time_sampler="logitnormal")
    with pytest.raises(UserError, match="matching.mode_scale"):
        draws(time_sampler="mode", mode_scale=2.5)
