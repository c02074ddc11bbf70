"""Laws: operations are those counted by hand; SD3's formula is what its jaxpr and XLA's cost analysis count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from lwd_jax.adapters import attach
from lwd_jax.adapters.factors import trainable
from lwd_jax.backbones import sd3
from lwd_jax.config import Adapter
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.plan.count import operations
from lwd_jax.plan.flops import TRAINING, sd3_forward
from lwd_jax.train.state import merge, split
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import flat


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_scan_of_products():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    assert operations(scanned, array(3, 5), array(7, 5, 5)).total == 7 * 2 * 3 * 5 * 5


def test_batched_products_and_what_nobody_reads():
    def function(a, b):
        unread = a @ jnp.swapaxes(b, 1, 2) @ b
        return jnp.einsum("bij,bkj->bik", a, b), unread.shape[0]

    assert operations(lambda a, b: function(a, b)[0], array(2, 3, 5), array(2, 4, 5)).total == 2 * 2 * 3 * 4 * 5


def test_a_convolution_and_its_gradients():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = array(2, 8, 8, 3), array(3, 3, 3, 5)
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert operations(convolve, x, kernel).total == forward
    # By the kernel as many; by the input, at every second place of its rows and columns the kernel meets zeros.
    of_kernel = operations(jax.grad(lambda k, x: convolve(x, k).sum()), kernel, x).total
    of_input = operations(jax.grad(lambda x, k: convolve(x, k).sum()), x, kernel).total
    assert of_kernel == forward
    assert of_input == forward


def test_cudnns_attention_and_its_gradients(with_cudnn):
    """Two products forward; five to go back, of which one is computed again."""
    q, k = (jax.ShapeDtypeStruct((2, length, 3, 8), jnp.bfloat16) for length in (6, 10))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    product = 2 * 2 * 3 * 6 * 10 * 8
    assert operations(attend, q, k, k) == (0, 2 * product)
    assert operations(jax.grad(attend, (0, 1, 2)), q, k, k) == (0, 7 * product)


def test_the_largest_branch_of_a_conditional():
    def function(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert operations(function, jax.ShapeDtypeStruct((), jnp.bool_), array(4, 4)).total == 2 * 2 * 4**3


def test_remat_is_counted_again():
    def loss(w, x):
        return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum()

    product = 2 * 3 * 5 * 5
    # Forward 2, once more 2, by w 2, by what is between them 1; without the value nothing is computed twice.
    assert operations(jax.grad(loss), array(5, 5), array(3, 5)).total == (2 + 3) * product
    assert operations(jax.value_and_grad(loss), array(5, 5), array(3, 5)).total == (2 + 2 + 3) * product


def test_a_pallas_kernel_is_counted_for_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def multiply(x, y):
        block = pl.BlockSpec((8, 32), lambda i, j: (i, 0)), pl.BlockSpec((32, 16), lambda i, j: (0, j))
        return pl.pallas_call(
            kernel,
            grid=(4, 2),
            in_specs=list(block),
            out_specs=pl.BlockSpec((8, 16), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((32, 32), jnp.float32),
        )(x, y)

    found = operations(multiply, array(32, 32), array(32, 32))
    assert (found.plain, found.kernels) == (0, 2 * 32**3)


def test_what_every_device_does_is_counted_on_all():
    mesh = Mesh(jax.devices()[:4], "x")

    def function(a, b):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("x"), PartitionSpec()),
                             out_specs=PartitionSpec("x"))(a, b)  # fmt: skip

    assert operations(function, array(8, 3), array(3, 5)).total == 2 * 8 * 3 * 5


# ------------------------------------------------------------------------------------------------------- the backbone

# One block of each kind: a scan over one block is counted once by XLA, and rightly.
PLAIN = dataclasses.replace(
    sd3.VARIANTS["sd3-medium"], num_layers=2, num_attention_heads=4, attention_head_dim=64, sample_size=32,
    joint_attention_dim=192, pooled_projection_dim=64, pos_embed_max_size=32,
)  # fmt: skip
DUAL = dataclasses.replace(PLAIN, num_layers=3, dual_layers=1, qk_norm=True)
TEXT, SIDE = 40, 32


def forward(config):
    module, params = sd3.BACKBONE.build(config), abstract_params(sd3.BACKBONE, config)
    cond = Conditioning(array(1, TEXT, config.joint_attention_dim), None, array(1, config.pooled_projection_dim), None)

    def predict(params, z, t, cond):
        return module.apply({"params": params}, z, t, cond)

    return predict, (params, array(1, SIDE, SIDE, config.in_channels), array(1), cond)


@pytest.mark.parametrize("config", [PLAIN, DUAL], ids=["plain", "dual"])
def test_the_formula_is_what_the_jaxpr_and_xla_count(config):
    predict, arguments = forward(config)
    formula = sd3_forward(config, SIDE, SIDE, TEXT)
    assert operations(predict, *arguments).total == formula
    by_xla = jax.jit(predict).lower(*arguments).cost_analysis()["flops"]
    assert formula < by_xla < 1.05 * formula  # norms, softmax and activations are not in the formula


def test_training_is_three_times_forward():
    predict, arguments = forward(PLAIN)
    gradient = jax.grad(lambda params, *rest: predict(params, *rest).sum())
    counted = operations(gradient, *arguments).total
    assert counted == pytest.approx(TRAINING * sd3_forward(PLAIN, SIDE, SIDE, TEXT), rel=0.02)


def test_training_adapters_asks_for_no_gradient_by_the_frozen_weights():
    """Forward, gradient by what each product reads, and for attention, which reads two, one more."""
    predict, arguments = forward(PLAIN)
    base, *rest = arguments
    params = jax.eval_shape(lambda params, key: attach(params, key, Adapter("lora", 1)), base, jax.random.key(0))
    parts = split(params, frozenset(trainable(flat(params))))
    gradient = jax.grad(lambda trained, frozen, *rest: predict(merge(frozen, trained), *rest).sum())
    counted = operations(gradient, *parts, *rest).total
    picture = (SIDE // 2) ** 2
    both, wide = picture + TEXT, PLAIN.width
    attention = 4 * both * both * wide + 4 * picture * both * wide  # of both blocks; the last one's text asks nothing
    assert counted == pytest.approx(2 * sd3_forward(PLAIN, SIDE, SIDE, TEXT) + attention, rel=0.03)
