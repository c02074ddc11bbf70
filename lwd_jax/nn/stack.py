"""Stacks of equal blocks: one scanned body with stacked parameters, under a named rematerialisation policy."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn
from flax import traverse_util
from jax import checkpoint_policies

from lwd_jax.errors import choose
from lwd_jax.nn.attention import SAVED
from lwd_jax.nn.layers import FIXED, SCALE
from lwd_jax.nn.platform import platform


def _is_fused_attention(primitive, *_, **__) -> bool:
    # cuDNN's forward returns the output and the log-sum-exp that its backward needs: both are saved as they leave it. A
    # name on the output alone would have the whole forward run again for the other.
    return primitive.name.startswith("dot_product_attention_fwd")


# Name -> what the backward pass finds saved of a block's inside; None = everything (no rematerialisation).
REMAT = {
    "none": None,
    "attention": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.save_only_these_names(SAVED), _is_fused_attention
    ),
    "full": checkpoint_policies.nothing_saveable,
}


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """`block` under the policy of that name.

    Raises:
      UserError: no such policy.
    """
    policy = choose(REMAT, remat, "remat policy")
    # A prototype's jitted remat once had wrong gradients on XLA:CPU (jax 0.10.2; 64 tokens, local batch 1, float32;
    # eager was right). Its trigger is not known, and it was not seen in these stacks: on jax 0.10.2 every parameter's
    # gradient agreed with no remat to 2e-7 (widths 64, 128 and 1536, 16 to 256 picture tokens, batch 1 and 2). The
    # barrier against common subexpressions stays on; tests/backbones/test_sd3_remat.py holds the law at those sizes.
    return block if policy is None else nn.remat(block, policy=policy)


def adapted(module: nn.Module) -> bool:
    """Whether there are adapters beside any of the kernels of a module that is being called."""
    return any(path[-1] in (SCALE, *FIXED) for path in traverse_util.flatten_dict(module.variables.get("params", {})))


def stacked(block: type[nn.Module], count: int, remat: str, *, adapters: bool) -> type[nn.Module]:
    """`count` blocks run one after the other: (carry, *shared) -> (carry, None), every parameter with a leading axis.

    The parameters are initialised block by block, each from its own key. `adapters`: the kernels are frozen.
    """
    body = rematerialised(block, remat)
    # From a loop XLA:CPU copies every block's weights out of the stacks, and its gradients into them: unrolled, a step
    # of SD3-medium's width takes 8 % less time. With rematerialisation the loop stays, or the memory it is to save is
    # not saved: unrolled, all of SD3-medium at 256 px takes 5 % more. Nor
    # with frozen kernels: unrolled, both passes share one copy of each, which is held all the time in between.
    unroll = count if platform() == "cpu" and REMAT[remat] is None and not adapters else 1
    return nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=count,
        unroll=unroll,
    )


def in_turn(block: nn.Module) -> Callable:
    """`block`, called so that its whole backward pass is over before that of what came before it begins.

    The gradients of a block's weights are needed last of all, and XLA may put their products off: their operands, all
    of a block's inside, would be held all through the backward pass of the stack before it. With adapters the weights
    have no gradients, and nothing is put off.
    """
    if adapted(block):
        return block

    def call(module, *given):
        return module(*given)

    def forward(module, *given):
        return nn.vjp(call, module, *given)

    def backward(pullback, cotangent):
        leaves, tree = jax.tree.flatten(pullback(cotangent))
        held = jax.lax.optimization_barrier([leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0])
        return tree.unflatten(leaf if leaf.dtype == jax.dtypes.float0 else held.pop(0) for leaf in leaves)

    return functools.partial(nn.custom_vjp(call, forward, backward), block)
