"""Laws: the noise levels are those of the diffusers schedulers, to the bit."""

import numpy as np
import pytest

from lwd_jax.errors import UserError
from lwd_jax.sample.schedule import sigmas


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


def test_ends_at_noise_and_data_and_falls():
    levels = sigmas(28, 3.0)
    assert levels[0] == 1 and levels[-1] == 0 and levels.dtype == np.float32
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("steps,shift,word", [(0, 3.0, "step"), (4, 0.0, "shift"), (4, float("nan"), "shift")])
def test_refuses_what_has_no_meaning(steps, shift, word):
    with pytest.raises(UserError, match=word):
        sigmas(steps, shift)
