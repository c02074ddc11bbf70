"""FLUX.1's original layout, one file such as flux1-dev.safetensors, read under the names of diffusers' folders.

Queries, keys and values lie in one tensor there, in single blocks with the MLP's way up too; the last modulation has
shift and scale the other way round. A `Piece` is what one diffusers tensor is of an original one; nothing is copied
until it is read. backbones.flux's weights table does the rest: what is missing or left over is named by it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lwd_jax.errors import UserError

HEAD = 128  # of every FLUX.1; with other heads the axes of RoPE, which the file does not tell, would be unknown
_PREFIX = "model.diffusion_model."  # of files that other programs have saved


class Piece(NamedTuple):
    """Rows of a tensor, one part after the other. `np.asarray(piece)` reads it.

    Attributes:
      tensor: with shape, dtype and conversion by np.asarray.
      parts: (first, last + 1) of the rows of each part.
    """

    tensor: Any
    parts: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(stop - start for start, stop in self.parts), *self.tensor.shape[1:])

    @property
    def dtype(self):
        return self.tensor.dtype

    def __array__(self, dtype=None, copy=None):
        whole = np.asarray(self.tensor)
        rows = np.concatenate([whole[start:stop] for start, stop in self.parts])
        return rows if dtype is None else rows.astype(dtype)


_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
# Original layer -> diffusers' layers and how many equal parts of its rows each takes, in their order.
_ENDS = {
    "img_in": (("x_embedder", 1),),
    "txt_in": (("context_embedder", 1),),
    "final_layer.linear": (("proj_out", 1),),
    **{
        f"{ours}.{layer}": ((f"time_text_embed.{theirs}.{linear}", 1),)
        for ours, theirs in _EMBEDDERS.items()
        for layer, linear in _LAYERS.items()
    },
}
_DOUBLE = {
    "img_mod.lin": (("norm1.linear", 1),),
    "img_attn.qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    "img_attn.norm.query_norm": (("attn.norm_q", 1),),
    "img_attn.norm.key_norm": (("attn.norm_k", 1),),
    "img_attn.proj": (("attn.to_out.0", 1),),
    "img_mlp.0": (("ff.net.0.proj", 1),),
    "img_mlp.2": (("ff.net.2", 1),),
    "txt_mod.lin": (("norm1_context.linear", 1),),
    "txt_attn.qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
    "txt_attn.norm.query_norm": (("attn.norm_added_q", 1),),
    "txt_attn.norm.key_norm": (("attn.norm_added_k", 1),),
    "txt_attn.proj": (("attn.to_add_out", 1),),
    "txt_mlp.0": (("ff_context.net.0.proj", 1),),
    "txt_mlp.2": (("ff_context.net.2", 1),),
}
_SINGLE = {
    "modulation.lin": (("norm.linear", 1),),
    "linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
    "linear2": (("proj_out", 1),),
    "norm.query_norm": (("attn.norm_q", 1),),
    "norm.key_norm": (("attn.norm_k", 1),),
}
_LAST = "final_layer.adaLN_modulation.1"
_STACKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")


def _pieces(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """What an original tensor is in diffusers: (name, piece); a name that is not known stays."""
    layer, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if layer == _LAST:
        half = tensor.shape[0] // 2
        yield f"norm_out.linear.{kind}", Piece(tensor, ((half, 2 * half), (0, half)))
        return
    where, layers = "", _ENDS
    if found := _BLOCK.fullmatch(layer):
        stack, number, layer = found.groups()
        theirs, layers = _STACKS[stack]
        where = f"{theirs}.{number}."
    if layer not in layers:
        yield name, tensor
        return
    unit, start = tensor.shape[0] // sum(share for _, share in layers[layer]), 0
    for theirs, share in layers[layer]:
        yield f"{where}{theirs}.{kind}", Piece(tensor, ((start, start + share * unit),))
        start += share * unit


def as_diffusers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an original file under diffusers' names; those that it does not know keep theirs."""
    return dict(piece for name, tensor in tensors.items() for piece in _pieces(name.removeprefix(_PREFIX), tensor))


def foreign_config(tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """diffusers' config of an original file, told by the shapes; None where it is no FLUX.

    Raises:
      UserError: its heads are not of 128 channels.
    """
    shapes = {name.removeprefix(_PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()}
    telling = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight")
    norm = shapes.get("double_blocks.0.img_attn.norm.query_norm.scale")
    if norm is None or any(len(shapes.get(name, ())) != 2 for name in telling):
        return None
    if norm != (HEAD,):
        raise UserError(f"The heads of a FLUX in its original layout must have {HEAD} channels, not {norm[0]}.")
    (width, channels), (_, joint), (_, pooled) = (shapes[name] for name in telling)
    numbers = {
        stack: {int(m[2]) for name in shapes if (m := _BLOCK.match(name)) and m[1] == stack} for stack in _STACKS
    }
    return {
        "in_channels": channels,
        "num_layers": len(numbers["double_blocks"]),
        "num_single_layers": len(numbers["single_blocks"]),
        "attention_head_dim": HEAD,
        "num_attention_heads": width // HEAD,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": (16, 56, 56),
    }
