"""Law: eight devices = one, for both kinds of blocks, with text that has to be padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flux_twin import twin
from jax.sharding import NamedSharding, PartitionSpec

from lwd_jax.backbones import flux
from lwd_jax.config import Mesh
from lwd_jax.nn import sharding
from lwd_jax.nn.sharding import join_tokens, split_tokens
from lwd_jax.parallel import rules
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.parallel.rules import param_shardings

TWIN = twin((8, 12), num_attention_heads=4, num_single_layers=2, proportional_attention=True)
MESHES = {"fsdp": (1, 8, 1, 1), "context": (1, 2, 4, 1), "context and tensor": (1, 2, 2, 2)}


@functools.cache
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: (0.15 * rng.standard_normal(p.shape)).astype(np.float32), TWIN.abstract())


def value(params, given):
    out = TWIN.module(remat="full").apply({"params": params}, *given)
    return jnp.mean(out * given[0]), out


gradient = jax.jit(jax.grad(value, (0, 1), has_aux=True))


@functools.cache
def alone():
    return jax.device_get(gradient(params(), inputs()))


def inputs():
    return TWIN.inputs(batch=8)  # 24 tokens of the picture; 7 of the text, padded over context


@pytest.mark.parametrize(
    "name", [name if name == "context" else pytest.param(name, marks=pytest.mark.heavy) for name in MESHES]
)
def test_eight_devices_equal_one(name, monkeypatch):
    """Output and float32 gradients by parameters and latent."""
    monkeypatch.setattr(rules, "SMALL", 1 << 9)  # so that these small parameters are split too
    mesh = make_mesh(Mesh(*MESHES[name]))
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    layouts = param_shardings(jax.eval_shape(params), mesh), rows
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.device_get(gradient(*map(jax.device_put, (params(), inputs()), layouts)))
    (of_params, of_inputs), out = found
    (expected, wanted), whole = alone()
    np.testing.assert_allclose(out, whole, atol=1e-5 * np.abs(whole).max())
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4), of_params, expected)
    np.testing.assert_allclose(of_inputs[0], wanted[0], atol=1e-5 * np.abs(wanted[0]).max())


def test_a_mutant_does_not_pass_as_equal(monkeypatch):
    """The control: a device that reads the first device's positions."""
    expected = alone()[0][0]["single_blocks"]["q"]["kernel"]  # before anything is changed
    plain = flux.places_of

    def rolled(config, height, width):
        where = plain(config, height, width)
        return where._replace(rotation=jax.tree.map(lambda x: jnp.roll(x, 6, axis=1), where.rotation))

    monkeypatch.setattr(flux, "places_of", rolled)
    (of_params, _), _ = jax.device_get(jax.jit(jax.grad(value, (0, 1), has_aux=True))(params(), inputs()))
    found = of_params["single_blocks"]["q"]["kernel"]
    assert np.linalg.norm(found - expected) > 1e-3 * np.linalg.norm(expected)


def test_joined_tokens_stay_on_their_devices():
    """Of every device its share of each kind, without a collective; split again they are what they were."""
    mesh = make_mesh(Mesh(data=1, fsdp=2, context=4))
    text, picture = (np.arange(2 * n * 3, dtype=np.float32).reshape(2, n, 3) for n in (8, 12))
    layout = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, "context"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        joined = jax.jit(join_tokens, out_shardings=layout)
        given = jax.device_put((text, picture), layout)
        compiled = joined.lower(*given).compile().as_text()
        back = jax.jit(lambda x: split_tokens(x, 8, 12))(joined(*given))
    assert not any(word in compiled for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    jax.tree.map(np.testing.assert_array_equal, back, (text, picture))
    np.testing.assert_array_equal(join_tokens(text, picture), np.concatenate([text, picture], axis=1))
