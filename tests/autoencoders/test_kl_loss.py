"""Law: the whole stage-1 loss through the autoencoder, gradients included, is that of diffusers' model in torch."""

import jax
import jax.numpy as jnp
import numpy as np
from kl_twin import assert_gradients_equal, nchw, torch_twin

from lwd_jax.autoencoders import kl
from lwd_jax.config import Reconstruction
from lwd_jax.objective.reconstruction import reconstruction_loss

SIZES = kl.Config(4, (8, 16), 1, 4, use_quant_conv=True, use_post_quant_conv=True)
TERMS = Reconstruction(alpha=0.25, beta=0.02, lpips=0.3, scales=(2,), sample_posterior=True)
FAST = {"xla_backend_optimization_level": 0}


def features(x, kernel):
    """Stands for LPIPS, which has a law of its own: one layer of a network, its features of unit length."""
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    y = jax.nn.relu(y)
    return y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True) + 1e-2)


def by_torch(torch, twin, x, kernel, noise):
    """Every term written again, channels first."""
    functional = torch.nn.functional
    x, noise = nchw(torch, x), nchw(torch, noise)
    posterior = twin.encode(x).latent_dist
    z = posterior.mean + posterior.std * noise
    decoded = twin.decode(z).sample
    pooled = twin.decode(functional.avg_pool2d(z, 2)).sample

    def unit(x):
        y = torch.relu(functional.conv2d(x, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())))
        return y / torch.sqrt((y**2).sum(1, keepdim=True) + 1e-2)

    normal, prior = torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    terms = {
        "reconstruction": ((decoded - x) ** 2).mean(),
        "scale_consistency": ((pooled - functional.avg_pool2d(x, 2)) ** 2).mean(),
        "kl": torch.distributions.kl_divergence(normal, prior).mean(),
        "lpips": ((unit(decoded) - unit(x)) ** 2).sum(1).mean(),
    }
    weights = {"reconstruction": 1, "scale_consistency": TERMS.alpha, "kl": TERMS.beta, "lpips": TERMS.lpips}
    return sum(weights[name] * term for name, term in terms.items()), terms


def test_loss_and_gradients_equal_diffusers_and_torch():
    torch, twin, params = torch_twin(SIZES)
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    kernel = (rng.standard_normal((3, 3, 3, 6)) / 4).astype(np.float32)
    key = jax.random.key(5)
    noise = jax.random.normal(jax.random.split(key)[0], (2, 8, 12, 4))  # the posterior's, as the loss draws it
    expected, terms = by_torch(torch, twin, x, kernel, noise)
    expected.backward()

    def loss(params):
        def method(name):
            return lambda x: kl.AutoencoderKL(SIZES, remat="full").apply({"params": params}, x, method=name)

        def perceptual(x, y):
            return jnp.sum((features(x, kernel) - features(y, kernel)) ** 2, axis=-1).mean((1, 2))

        per_sample, metrics = reconstruction_loss(method("encode"), method("decode"), x, key, TERMS, perceptual)
        return per_sample.mean(), metrics

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    (value, metrics), gradients = compiled(params)
    for name, term in terms.items():
        assert term > 1e-3
        np.testing.assert_allclose(metrics[name], term.item(), rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_gradients_equal(SIZES, gradients, twin)
