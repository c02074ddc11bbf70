"""Scaled dot-product attention behind one function; what computes it is chosen by the platform."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lwd_jax.shapes import shaped

SAVED = "attention"  # the name under which remat policies know attention's output
_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def _xla(q, k, v, mask):
    """Logits and softmax in float32; keeps an L x L matrix per head."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def _cudnn(q, k, v, mask):
    """Fused, never keeps an L x L matrix; half precision and head sizes up to 128 in steps of 8 only."""
    if q.dtype not in _HALF or q.shape[-1] % 8 or q.shape[-1] > 128:
        return _xla(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


# Platform -> kernel; a platform that is not named uses XLA. A TPU kernel is one function and one line here.
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
      [B L N d] in the dtype of q; the softmax accumulates in float32. Named `SAVED` for remat policies.
    """
    kernel = KERNELS.get(platform or jax.default_backend(), _xla)
    return checkpoint_name(kernel(q, k, v, mask), SAVED)
