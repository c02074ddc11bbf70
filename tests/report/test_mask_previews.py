"""Law: the masks that are shown are those that a run trains with."""

import jax
import numpy as np
import pytest

from lwd_jax.config import Matching
from lwd_jax.objective.matching import matching_loss
from lwd_jax.report.previews import masks_over_time


@pytest.mark.parametrize("settings", [{}, {"source": "noisy"}, {"mask": "soft", "softness": 0.2, "floor": 0.1}])
def test_masks_that_are_shown_are_trained_with(settings):
    """The supervised share at each time, by the loss itself on the same noise, in latents of uneven detail."""
    matching = Matching(**settings)
    rng = np.random.default_rng(0)
    z = (rng.standard_normal((2, 12, 10, 4)) * np.linspace(0.05, 2, 10)[:, None]).astype(np.float32)
    noise = jax.random.normal(jax.random.key(0), z.shape)
    times = (0.2, 0.5, 0.8)
    _, masks = masks_over_time(z, matching, times)
    for number, t in enumerate(times):
        _, metrics = matching_loss(lambda z_t, t, _: z_t, z, None, np.full(2, t), noise, matching)
        np.testing.assert_allclose(masks[:, number].mean(), metrics["supervised_fraction"], rtol=1e-6)
