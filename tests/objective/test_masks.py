"""Laws: the mask never grows with t; t <= floor supervises everything; the baseline is ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.errors import UserError
from lwd_jax.objective.masks import MASKS, supervision_mask

SALIENCY = np.random.default_rng(0).uniform(size=(3, 9, 7, 1)).astype(np.float32)
SALIENCY[0, 0, 0], SALIENCY[1, 1, 1] = 0, 1
TIMES = np.linspace(0, 1, 101, dtype=np.float32)


def at(t, **options):
    return np.asarray(supervision_mask(SALIENCY, np.full(3, t, np.float32), **options))


@pytest.mark.parametrize("rule", MASKS)
@pytest.mark.parametrize("floor", [0.1, 0.3, 0.77])
def test_shrinks_as_t_grows_and_is_whole_up_to_the_floor(rule, floor):
    masks = np.stack([at(t, rule=rule, floor=floor) for t in TIMES])
    assert masks.dtype == np.float32 and masks.min() >= 0 and masks.max() <= 1
    assert (np.diff(masks, axis=0) <= 0).all()
    assert (masks[TIMES <= np.float32(floor)] == 1).all()
    assert (at(np.float32(floor), rule=rule, floor=floor) == 1).all()
    assert rule == "everywhere" or masks[-1].mean() < masks[0].mean()


def test_time_is_the_paper_s_inequality():
    t = np.array([0.2, 0.6, 1.0], np.float32)
    mask = np.asarray(supervision_mask(SALIENCY, t))
    for i, time in enumerate(t):
        np.testing.assert_array_equal(mask[i], SALIENCY[i] + np.float32(0.3) >= time)
    np.testing.assert_array_equal(at(1.0), SALIENCY >= 0.7)


def test_soft_contains_time_and_tends_to_it():
    for t in (0.4, 0.7, 1.0):
        hard = at(t)
        soft = at(t, rule="soft", softness=0.2)
        assert (soft >= hard).all() and (soft[hard == 1] == 1).all()
        gone = SALIENCY + 0.3 <= t - 0.2
        assert (soft[gone] == 0).all() and ((soft > 0) & (soft < 1)).any()
        np.testing.assert_allclose(at(t, rule="soft", softness=1e-6), hard, atol=1e-3)


def test_soft_step_is_smooth():
    slope = jax.vmap(jax.grad(lambda t: supervision_mask(jnp.zeros((1, 1, 1, 1)), t[None], rule="soft").sum()))
    values = np.asarray(jax.jit(slope)(np.linspace(0.2, 0.5, 301, dtype=np.float32)))
    assert np.isfinite(values).all() and np.abs(np.diff(values)).max() < 3 and values.min() < -20


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no mask rule 'tiem'. Did you mean 'time'"):
        at(0.5, rule="tiem")
    with pytest.raises(UserError, match="softness"):
        at(0.5, rule="soft", softness=0.0)
    with pytest.raises(ValueError, match="axis B of 't'"):
        supervision_mask(SALIENCY, np.ones(2, np.float32))
