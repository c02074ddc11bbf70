"""Scaled dot-product attention behind one function; what computes it is chosen by the platform."""

import contextlib

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lwd_jax.nn.layers import precision_of
from lwd_jax.shapes import shaped

SAVED = "attention"  # the name under which remat policies know attention's output
_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def _xla(q, k, v, mask):
    """Logits and softmax in float32; keeps an L x L matrix per head. The output is named `SAVED`."""
    # jax.nn's function takes no precision; what is set while it is traced holds for its gradients too.
    full = precision_of(q.dtype) is not None
    with jax.default_matmul_precision("highest") if full else contextlib.nullcontext():
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return checkpoint_name(attended, SAVED)


def _cudnn(q, k, v, mask):
    """Fused, never keeps an L x L matrix; half precision and head sizes up to 128 in steps of 8 only.

    The output has no name: the remat policy keeps all that the fused primitive returns, the output among it, and would
    keep a named copy beside it.
    """
    fits = q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    # cuDNN takes a mask as a bias, and refuses to train with one where a length is odd.
    odd = mask is not None and (q.shape[1] % 2 or k.shape[1] % 2)
    if not fits or odd:
        return _xla(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


# Platform -> kernel; a platform that is not named uses XLA. A TPU kernel is one function and one line here. A kernel
# names what its backward pass needs `SAVED`, or the policy of nn.stack knows its primitive.
KERNELS = {"gpu": _cudnn}


@shaped("q: B L N d, k: B S N d, v: B S N d -> B L N d")
def attention(q, k, v, *, mask=None, platform: str | None = None):
    """softmax(q k^T / sqrt(d)) v per head.

    Args:
      q: [B L N d] queries.
      k, v: [B S N d] keys and values.
      mask: bool, broadcastable to [B N L S]; True = attend. None = attend to everything.
      platform: "cpu", "gpu" or "tpu"; None = the default backend when this is traced.

    Returns:
      [B L N d] in the dtype of q; the softmax accumulates in float32. Float32 operands are multiplied in full
      precision. Remat policies know the result, see `KERNELS`.
    """
    kernel = KERNELS.get(platform or jax.default_backend(), _xla)
    return kernel(q, k, v, mask)
