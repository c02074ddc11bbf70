"""Laws: guidance as in diffusers' pipeline in one batch; noise belongs to the picture; uint8 as in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.sample.generate import generate, groups, guided, initial_noise, make_sampler, to_uint8
from lwd_jax.sample.schedule import sigmas


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def velocity(z, t, cond):
    pull = jnp.einsum("bld,bp->b", cond.tokens, cond.pooled)[:, None, None, None]
    return jnp.tanh(z * pull) + t[:, None, None, None]


def conditioning(seed, batch):
    return Conditioning(tokens=normal(seed, batch, 3, 4), pooled=normal(seed + 1, batch, 2))


def test_guidance_is_two_predictions_in_one_batch():
    z, cond, null = normal(0, 2, 3, 5, 4), conditioning(1, 2), conditioning(3, 2)
    batches = []

    def predict(z, t, cond):
        batches.append(z.shape)
        return velocity(z, t, cond)

    t = jnp.float32(0.4)
    v = guided(predict, cond, null, 4.5)(z, t)
    v_null, v_cond = (velocity(z, jnp.full(2, t), c) for c in (null, cond))
    np.testing.assert_allclose(v, v_null + 4.5 * (v_cond - v_null), rtol=1e-5, atol=1e-5)
    assert batches == [(4, 3, 5, 4)]


def test_without_a_null_conditioning_there_is_no_guidance():
    z, cond = normal(0, 2, 3, 5, 4), conditioning(1, 2)
    levels = sigmas(3, 3.0)
    plain = generate(velocity, z, cond, None, 7.0, levels)
    same = generate(velocity, z, cond, cond, 7.0, levels)
    np.testing.assert_allclose(plain, same, rtol=1e-5, atol=1e-5)
    assert plain.shape == z.shape and plain.dtype == jnp.float32


def test_a_masked_conditioning_goes_through_too():
    cond, null = (c._replace(mask=np.ones((2, 3), np.float32)) for c in (conditioning(1, 2), conditioning(5, 2)))
    z0 = generate(velocity, normal(0, 2, 3, 5, 4), cond, null, 2.0, sigmas(2, 3.0), "heun")
    assert np.isfinite(np.asarray(z0)).all()


def test_unknown_solver_is_named():
    with pytest.raises(UserError, match="Did you mean 'euler'"):
        make_sampler(None, "eulr")


def test_noise_belongs_to_the_picture():
    together = initial_noise(7, range(5), (4, 6, 3))
    alone = initial_noise(7, [3], (4, 6, 3))
    np.testing.assert_array_equal(together[3], alone[0])
    assert np.unique(np.asarray(together[:, 0, 0, 0])).size == 5
    assert not np.array_equal(together, initial_noise(8, range(5), (4, 6, 3)))
    many = np.asarray(initial_noise(0, range(4), (48, 64, 4)))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02 and together.dtype == jnp.float32


def test_uint8_equals_the_diffusers_image_processor():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    halves = (np.arange(256, dtype=np.float32) + 0.5) / 127.5 - 1
    x = np.concatenate([np.linspace(-1.3, 1.3, 4001, dtype=np.float32), halves])
    x = np.broadcast_to(x[None, None, :, None], (1, 2, x.size, 3))
    processor = diffusers.image_processor.VaeImageProcessor()
    theirs = np.asarray(processor.postprocess(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), output_type="pil")[0])
    np.testing.assert_array_equal(jax.jit(to_uint8)(x)[0], theirs)


@pytest.mark.parametrize("together", [1, 2, 4, 5, 9])
def test_groups_change_nothing_and_bound_the_batch(together):
    z0, made = normal(2, 5, 3, 2, 3), []
    for rows, new in groups(len(z0), together):
        assert len(rows) == together
        made.append(to_uint8(z0[rows] * 0.5)[:new])
    np.testing.assert_array_equal(np.concatenate(made), to_uint8(z0 * 0.5))
