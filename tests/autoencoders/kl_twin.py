"""A random diffusers AutoencoderKL and ours with the same weights."""

import math

import jax
import numpy as np
import pytest

from lwd_jax.autoencoders import kl
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import flat, read


def random_params(config: kl.Config, seed: int = 0):
    """Like init, without compiling it."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = math.prod(leaf.shape[:-1])
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in) + (leaf.ndim == 1)).astype(np.float32)

    return jax.device_put(jax.tree.map(fill, abstract_params(kl.AUTOENCODER, config)))


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def torch_twin(config: kl.Config, seed: int = 0):
    """A random diffusers model, norms and biases moved from their plain starting values, and our parameters of it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    twin = diffusers.AutoencoderKL(**kl.to_foreign(config)).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {name: tensor.detach().numpy() for name, tensor in twin.state_dict().items()}
    return torch, twin, read(kl.rows(config), tensors, abstract_params(kl.AUTOENCODER, config))


def nchw(torch, array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy())


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_gradients_equal(config: kl.Config, ours, twin, bound: float = 1e-4) -> None:
    """Ours against those that torch has left on the parameters of `twin`, each relative to its own length."""
    gradients = {name: parameter.grad.numpy() for name, parameter in twin.named_parameters()}
    theirs = read(kl.rows(config), gradients, abstract_params(kl.AUTOENCODER, config))
    ours, theirs = flat(jax.device_get(ours)), flat(jax.device_get(theirs))
    whole = math.sqrt(sum(float(np.sum(g**2)) for g in theirs.values()))
    assert ours.keys() == theirs.keys()
    for path, gradient in ours.items():
        # A bias before a norm, or of the keys, has gradient zero but for rounding: the whole gradient is the measure.
        error = np.linalg.norm(gradient - theirs[path])
        assert error < bound * max(np.linalg.norm(theirs[path]), 1e-3 * whole), path
