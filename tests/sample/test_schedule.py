"""Laws: the noise levels are those of the diffusers schedulers and pipelines; with a static shift, to the bit."""

import numpy as np
import pytest

from lwd_jax.backbones import flux, sd3
from lwd_jax.config import Sampling
from lwd_jax.errors import UserError
from lwd_jax.sample.schedule import flux_sigmas, noise_levels, sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, 1.7])
@pytest.mark.parametrize("steps", [1, 2, 3, 28, 50])
def test_equals_diffusers(steps, shift):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(sigmas(steps, shift), scheduler.sigmas.numpy())
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    heun.set_timesteps(steps)
    ours = sigmas(steps, shift)
    np.testing.assert_array_equal(np.concatenate([ours[:1], np.repeat(ours[1:-1], 2), ours[-1:]]), heun.sigmas.numpy())


@pytest.mark.parametrize("rule", ["static", "dynamic"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flux_equals_its_pipeline(steps, rule):
    """The levels that FluxPipeline hands to its scheduler, of 1024 x 768 px."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=rule == "dynamic")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(64 * 48))
    ours = noise_levels(Sampling(steps=steps, shift_rule=rule), flux.VARIANTS["flux-dev"], 128, 96)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=0 if rule == "static" else 1.2e-7)


def test_the_backbone_says_which_grid():
    np.testing.assert_array_equal(noise_levels(Sampling(), sd3.VARIANTS["tiny"], 8, 8), sigmas(28, 3.0))
    np.testing.assert_array_equal(noise_levels(Sampling(), flux.VARIANTS["flux-tiny"], 8, 8), flux_sigmas(28, 3.0))
    assert not np.array_equal(sigmas(28, 3.0), flux_sigmas(28, 3.0))


def test_a_dynamic_shift_is_flux_own():
    with pytest.raises(UserError, match="is FLUX's"):
        noise_levels(Sampling(shift_rule="dynamic"), sd3.VARIANTS["tiny"], 8, 8)


def test_ends_at_noise_and_data_and_falls():
    levels = sigmas(28, 3.0)
    assert levels[0] == 1 and levels[-1] == 0 and levels.dtype == np.float32
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("steps,shift,word", [(0, 3.0, "step"), (4, 0.0, "shift"), (4, float("nan"), "shift")])
def test_refuses_what_has_no_meaning(steps, shift, word):
    with pytest.raises(UserError, match=word):
        sigmas(steps, shift)
