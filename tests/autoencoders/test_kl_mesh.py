"""Laws: a picture whose rows lie over devices is encoded, decoded and trained on as on one device, and of its feature
maps nothing moves but the rows beside the cuts and the attention's keys and values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from kl_twin import random_params, relative

from lwd_jax import config as configs
from lwd_jax.autoencoders import kl
from lwd_jax.autoencoders.bands import Affine, Limits, Step, convolve
from lwd_jax.data import buckets
from lwd_jax.nn.sharding import BATCH_AXES
from lwd_jax.objective.reconstruction import reconstruction_loss
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.parallel.rules import param_shardings
from lwd_jax.plan.hlo import Module
from lwd_jax.plan.traffic import traffic_of

CONFIG = kl.Config(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
HEIGHT, WIDTH = 64, 24
MESHES = {"context": (1, 1, 8, 1), "all": (2, 1, 2, 2)}


def over(mesh, function):
    """`function`, traced for a mesh."""

    def traced(*operands):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*operands)

    return traced


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("limits", [Limits(), Limits(0, 1 << 10)], ids=["whole", "bands"])
@pytest.mark.parametrize(
    "stride, padding, size, height",
    [(1, (1, 1), 3, 32), (2, (0, 1), 3, 48), (1, (0, 0), 1, 24), (1, (1, 1), 3, 30), (2, (0, 1), 3, 24)],
)
def test_a_convolution_over_devices(axes, limits, stride, padding, size, height):
    """Value and gradients; also of heights that do not divide, and of bands that do not."""
    mesh, rng = make_mesh(configs.Mesh(*axes)), np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    activate = Affine(normal(4, 1, 1, 3), normal(4, 1, 1, 3))
    plus = normal(4, height // stride, 10 // stride, 6)
    operands = normal(4, height, 10, 3), normal(size, size, 3, 6), normal(6), activate, plus

    def loss(operands, limits=Limits()):
        y = convolve(Step(stride, (padding, padding)), *operands, limits=limits)
        return jnp.sum(jnp.sin(y)), y

    wanted = jax.jit(jax.grad(loss, has_aux=True))(operands)
    split = jax.jit(over(mesh, jax.grad(functools.partial(loss, limits=limits), has_aux=True)))
    found = split(jax.device_put(operands, NamedSharding(mesh, PartitionSpec())))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("axes", [(1, 2, 1, 1), (1, 1, 2, 1)], ids=["fsdp", "context"])
def test_a_convolution_in_bfloat16_trains_on_a_mesh_of_cpus(axes):
    """XLA ended the process over the sum of the kernel's gradient; here it is summed in float32."""
    mesh, rng = make_mesh(configs.Mesh(*axes), jax.devices()[:2]), np.random.default_rng(0)
    shapes = {"x": (2, 16, 8, 4), "kernel": (3, 3, 4, 4)}
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes.values())

    def loss(kernel, x):
        y = convolve(Step(1, ((1, 1), (1, 1))), x, kernel, jnp.zeros(4, x.dtype))
        return jnp.square(y.astype(jnp.float32)).mean()

    wanted = jax.jit(jax.grad(loss))(kernel.astype(jnp.float32), x.astype(jnp.float32))
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
    placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())), jax.device_put(x, rows)
    found = jax.jit(over(mesh, jax.grad(loss)))(*placed)
    assert found.dtype == kernel.dtype and relative(found.astype(jnp.float32), wanted) < 2**-7


@pytest.mark.parametrize("axes", [(1, 2, 4, 1), (1, 1, 8, 1)], ids=str)
@pytest.mark.parametrize("height", [12, 20, 44])
def test_a_convolution_of_pooled_rows_that_do_not_divide(axes, height):
    """Rows 6, 10, 22 over 4 or 8 devices, halved from rows that lay over them: stage 1's pooled pictures. Left to the
    compiler, the gradient of the kernel was twice what it is.
    """
    mesh, rng = make_mesh(configs.Mesh(*axes)), np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, kernel, bias = normal(2, height, 8, 4), normal(3, 3, 4, 4), normal(4)

    def loss(kernel, x):
        pooled = jnp.sin(x).reshape(2, height // 2, 2, 4, 2, 4).mean((2, 4))
        y = convolve(Step(1, ((1, 1), (1, 1))), pooled, kernel, bias, plus=pooled)
        return (jnp.sin(y) * jnp.arange(height // 2)[:, None, None]).sum()

    wanted = jax.jit(jax.grad(loss, (0, 1)))(kernel, x)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context" if height % axes[2] == 0 else None))
    placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())), jax.device_put(x, rows)
    found = jax.jit(over(mesh, jax.grad(loss, (0, 1))))(*placed)
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) < 1e-6


# Of the aspect buckets at 1024 px, those whose rows after 8 of the autoencoder and 4 of pooling do not lie over 4.
UNEVEN = [height for height, _ in buckets.sizes(1024, True) if height % (8 * 4 * 4)]


@pytest.mark.slow
@pytest.mark.parametrize("height", [min(UNEVEN)])
def test_stage_1_of_real_buckets_that_do_not_divide(height):
    """Loss and gradients of an f8 autoencoder on pictures of a bucket's height, narrow here; pooled by 4."""
    mesh = make_mesh(configs.Mesh(1, 2, 4, 1))
    config = dataclasses.replace(CONFIG, block_out_channels=(8, 8, 8, 8))
    module, params = kl.AutoencoderKL(config), jax.device_get(random_params(config))
    x = np.random.default_rng(2).uniform(-1, 1, (2, height, 64, 3)).astype(np.float32)
    rule = configs.Reconstruction(alpha=1.0, scales=(4,), lpips=0.0, sample_posterior=False)

    def loss(params, x):
        encode, decode = (
            functools.partial(module.apply, {"params": params}, method=name) for name in ("encode", "decode")
        )
        return reconstruction_loss(encode, decode, x, jax.random.key(0), rule, None)[0].mean()

    wanted = jax.jit(jax.value_and_grad(loss))(params, x)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
    placed = jax.device_put(params, param_shardings(params, mesh)), jax.device_put(x, rows)
    found = jax.device_get(jax.jit(over(mesh, jax.value_and_grad(loss)))(*placed))
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(wanted[1])))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-4 * max(np.linalg.norm(theirs), 1e-3 * norm), path


def halo_bytes(function) -> int:
    """What a device sends for one picture on the way forward, in float32: a row up and one down for every 3 x 3
    convolution, one for those that halve. By hand, from what the architecture is.
    """
    widths, layers, width = CONFIG.block_out_channels, CONFIG.layers_per_block, WIDTH
    before, total = widths[0], 2 * width * CONFIG.in_channels
    if function is decode:
        widths, layers, width = widths[::-1], layers + 1, WIDTH // CONFIG.factor
        before, total = widths[0], 2 * width * (CONFIG.latent_channels + 4 * widths[0])
    for level, channels in enumerate(widths):
        total += sum(2 * width * (first + channels) for first in [before] + [channels] * (layers - 1))
        before = channels
        if level < len(widths) - 1:
            width = 2 * width if function is decode else width // 2
            total += 2 * width * channels  # two rows of the doubled picture; one of that which will be halved
    return 4 * (total + 2 * width * before * (1 if function is decode else 5))


@functools.cache
def params():
    return jax.device_get(random_params(CONFIG))


def encode(params, x):
    return kl.AutoencoderKL(CONFIG).apply({"params": params}, x, method="encode").mean


def decode(params, z):
    return kl.AutoencoderKL(CONFIG).apply({"params": params}, z, method="decode")


def gradient(params, x):
    module = kl.AutoencoderKL(CONFIG, remat="full")
    return jax.grad(lambda params: jnp.mean(jnp.square(module.apply({"params": params}, x) - x)))(params)


def operand(function):
    shape = (HEIGHT, WIDTH, 3) if function is not decode else (HEIGHT // 2, WIDTH // 2, CONFIG.latent_channels)
    return np.random.default_rng(1).uniform(-1, 1, (4, *shape)).astype(np.float32)


def compiled(function, axes):
    """(the program over a mesh, its operands there, bytes that a device sends by kind and axes)."""
    mesh = make_mesh(configs.Mesh(*axes))
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
    kernels = param_shardings(params(), mesh)
    operands = jax.device_put((params(), operand(function)), (kernels, rows))
    program = jax.jit(over(mesh, function), out_shardings=kernels if function is gradient else rows)
    program = program.lower(*operands).compile()
    traffic = traffic_of(Module(program.as_text()), dict(mesh.shape))
    return program, operands, {(row.kind, row.axes): row.sent for row in traffic}


@pytest.mark.parametrize("function", [encode, decode])
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(function, axes):
    """Of gradients train/test_stages.py says so."""
    program, operands, _ = compiled(function, axes)
    assert relative(program(*operands), jax.jit(function)(params(), operand(function))) < 1e-5


@pytest.mark.parametrize("function", [encode, decode, gradient])
def test_nothing_moves_but_the_rows_beside_the_cuts_and_the_attention(function):
    """What the compiled program says. Rematerialised, halos go around forward, again, and on the way back."""
    (_, operands, sent), parts = compiled(function, MESHES["context"]), 8
    halves, batch = (encode, decode) if function is gradient else (function,), len(operands[1])
    halo = batch * sum(map(halo_bytes, halves))
    keys = operand(decode)[..., :1].size * CONFIG.block_out_channels[-1] * 4 * 2 * (parts - 1) // parts  # and values
    assert {axes for _, axes in sent} == {"context"}
    permuted, gathered, summed = (sent[name, "context"] for name in ("collective-permute", "all-gather", "all-reduce"))
    if function is not gradient:
        assert permuted == halo
        assert keys <= gathered < 1.03 * keys and summed < 0.02 * keys  # the rest is moments of groups
        assert "reduce-scatter" not in {kind for kind, _ in sent}
        return
    assert halo < permuted <= 3 * halo
    assert 2 * 2 * keys <= gathered < 1.03 * 2 * 2 * keys  # of both halves, forward and again
    assert sent["reduce-scatter", "context"] == 2 * keys
    assert summed < 1.1 * 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(operands[0]))
