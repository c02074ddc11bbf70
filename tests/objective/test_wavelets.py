"""Laws: Haar inverts and keeps energy; it, and every other wavelet, equals PyWavelets and jaxwt."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxwt
import numpy as np
import pytest
import pywt
from hypothesis import given, settings
from hypothesis import strategies as st

from lwd_jax.errors import UserError
from lwd_jax.objective.wavelets import Subbands, detail_energy, haar, inverse_haar, resize_bilinear

SIZES = [(8, 8), (7, 10), (5, 9), (1, 4), (2, 1)]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_pywavelets(z, wavelet="haar", levels=1):
    """[(approximation), (lh, hl, hh) coarsest, ..., finest], each NHWC, float64."""
    return pywt.wavedec2(np.asarray(z, np.float64), wavelet, mode="symmetric", level=levels, axes=(1, 2))


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_haar_inverts(batch, h, w, channels, seed):
    z = normal(seed, batch, h, w, channels)
    back = inverse_haar(haar(z), (h, w))
    assert back.shape == z.shape
    np.testing.assert_allclose(back, z, atol=2e-6)


def test_haar_keeps_energy():
    z = normal(0, 3, 16, 24, 5)
    kept = sum(np.sum(np.asarray(band, np.float64) ** 2) for band in haar(z))
    np.testing.assert_allclose(kept, np.sum(np.float64(z) ** 2), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_haar_equals_pywavelets_in_float32(size, dtype):
    z = (normal(1, 2, *size, 3) * 4).astype(dtype)
    ours = haar(z)
    ll, details = by_pywavelets(np.asarray(z, np.float64))
    for band, expected in zip(ours, (ll, *details)):
        assert band.dtype == jnp.float32
        np.testing.assert_allclose(band, expected, atol=4e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 9)])
def test_haar_equals_jaxwt(size):
    z = normal(2, 2, *size, 3)
    ll, details = jax.jit(lambda z: jaxwt.wavedec2(z, "haar", level=1))(np.moveaxis(z, 3, 1))
    for band, expected in zip(haar(z), (ll, *details)):
        np.testing.assert_allclose(np.moveaxis(np.asarray(band), 3, 1), expected, atol=4e-6)


def test_haar_is_differentiable_by_its_inverse():
    """An orthonormal transform's transpose is its inverse."""
    z, bands = normal(3, 2, 6, 4, 3), Subbands(*normal(4, 4, 2, 3, 2, 3))
    pulled_back = jax.jit(lambda z, bands: jax.vjp(haar, z)[1](bands)[0])(z, bands)
    np.testing.assert_allclose(pulled_back, inverse_haar(bands), atol=1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db1", "db2", "db4", "sym5", "bior4.4", "coif1"])
@pytest.mark.parametrize("size", [(32, 32), (33, 46)])
def test_single_level_energy_equals_pywavelets(wavelet, size):
    z = normal(5, 2, *size, 5)
    _, details = by_pywavelets(z, wavelet)
    energy = sum(np.mean(band**2, axis=3, keepdims=True) for band in details)
    start = round((pywt.Wavelet(wavelet).dec_len / 2 - 1) / 2)  # the coefficients centred on the mirrored border
    h, w = (-(-side // 2) for side in size)
    expected = energy[:, start : start + h, start : start + w]
    np.testing.assert_allclose(detail_energy(z, wavelet), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [(32, 48), (37, 26)])
def test_more_levels_are_averaged_on_the_finest_grid(size):
    torch = pytest.importorskip("torch")
    z = normal(6, 2, *size, 5)
    finest = tuple(-(-side // 2) for side in size)
    total = 0
    for details in by_pywavelets(z, "haar", 3)[1:]:
        energy = torch.tensor(sum(np.mean(band**2, axis=3) for band in details))[:, None]
        total += torch.nn.functional.interpolate(energy, size=finest, mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(np.asarray(detail_energy(z, "haar", 3))[..., 0], total / 3, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("wavelet", ["haar", "sym8", "bior4.4"])
@pytest.mark.parametrize("levels", [1, 2])
def test_energy_stays_where_the_detail_is(wavelet, levels):
    """Lines of dots near both borders and in the middle are found within a cell of their place, by filters that are
    nearly symmetric. (The grid of a long filter is wider than the latent: stretched over it, it is off by many cells.)
    """
    for place in (9, 30, 54):
        z = np.zeros((1, 64, 64, 1), np.float32)
        z[:, place, ::3] = normal(7, 22, 1)
        across = np.asarray(detail_energy(z, wavelet, levels)).sum(axis=(0, 2, 3))
        centre = (across * (2 * np.arange(32) + 0.5)).sum() / across.sum()
        assert abs(centre - place) < 1 + 2**levels / 2, (place, centre)


@pytest.mark.parametrize("before", [(5, 6), (8, 3)])
@pytest.mark.parametrize("after", [(10, 12), (16, 6), (9, 11), (5, 6), (7, 3)])
def test_resize_equals_torch(before, after):
    torch = pytest.importorskip("torch")
    x = normal(8, 2, *before, 3)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x).movedim(3, 1), size=after, mode="bilinear", align_corners=False
    )
    made = jax.jit(resize_bilinear, static_argnums=1)(x, after)
    np.testing.assert_allclose(made, expected.movedim(1, 3), atol=1e-6)


def test_mistakes_are_named():
    z = normal(9, 1, 16, 16, 2)
    with pytest.raises(UserError, match="There is no discrete wavelet 'db4x'. Did you mean 'db4'"):
        detail_energy(z, "db4x")
    with pytest.raises(UserError, match="no 5 wavelet levels"):
        detail_energy(z, levels=5)
    with pytest.raises(UserError, match="no 0 wavelet levels"):
        detail_energy(z, levels=0)
    with pytest.raises(ValueError, match="'z' should have axes"):
        haar(z[0])


ALONE = """
import sys
import numpy as np

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"absl", "etils", "flax", "fsspec", "grain", "huggingface_hub", "jaxwt",
                "ml_collections", "optax", "orbax", "PIL", "pywt", "rich", "safetensors", "tensorflow_datasets", "torch"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import lwd_jax
z = np.random.default_rng(0).standard_normal((1, 4, 4, 2))
assert lwd_jax.haar(z)[0].shape == (1, 2, 2, 2)
print(lwd_jax.supervision_mask(lwd_jax.wavelet_saliency(z), np.ones(1)).shape)
"""


def test_the_face_depends_on_jax_alone():
    """Whatever else this package needs is as if it were not installed."""
    told = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert told.stdout.strip() == "(1, 4, 4, 1)", told.stderr
