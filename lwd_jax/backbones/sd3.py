"""SD3's backbone, the MMDiT (Scaling Rectified Flow Transformers, arXiv 2403.03206), and its SD3.5 variants.

Picture and text tokens keep weights of their own and meet in attention. SD3.5 normalises queries and keys (RMS);
SD3.5-medium has a second attention, among picture tokens alone, in its first blocks. Equal to diffusers'
SD3Transformer2DModel.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lwd_jax.errors import UserError
from lwd_jax.nn.attention import Tokens, attention, joint_attention
from lwd_jax.nn.conditioning import Conditioning, inputs
from lwd_jax.nn.layers import ZEROS, Dense
from lwd_jax.nn.modulation import Embedder, Modulation, gated, modulate
from lwd_jax.nn.patches import patchify, unpatchify
from lwd_jax.nn.positions import grid_positions, interpolate_rows, sincos, table_positions, time_features
from lwd_jax.nn.sharding import axis_size, constrain_tokens
from lwd_jax.nn.stack import adapted, in_turn, rematerialised, stacked
from lwd_jax.nn.streams import Projections, Stream, padded_text
from lwd_jax.shapes import shaped
from lwd_jax.weights.layout import SAME, Layout, conv_as_linear
from lwd_jax.weights.model import Model, filled
from lwd_jax.weights.table import Row, linear_rows

LATENT_FACTOR = 8  # picture pixels per latent position, of every autoencoder SD3 is used with
TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, under diffusers' names."""

    guidance_embeds: ClassVar[bool] = False  # it is told no guidance scale
    latent_factor: ClassVar[int] = LATENT_FACTOR
    text_tokens: ClassVar[int] = TEXT_TOKENS
    noise_levels: ClassVar[str] = "sd3"  # a row of sample.schedule.GRIDS

    sample_size: int = 128  # latent side that the position table's unit is made for
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192  # tokens along each side of the position table
    dual_layers: int = 0  # how many of the first blocks have the second attention
    qk_norm: bool = False

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers

    @property
    def resolution(self) -> int:
        """The side in px of the square pictures it was made for."""
        return self.sample_size * LATENT_FACTOR


class Block(nn.Module):
    """Figure 2b of the paper. The text stream of the model's last block only feeds attention."""

    config: Config
    dual: bool = False
    last: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, emb, real):
        """One block on.

        Args:
          tokens: (picture [B L D], text [B S D]).
          emb: [B D] float32.
          real: [B S] bool, the text tokens that are no padding; None = all.

        Returns:
          (the same tokens, None).
        """
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        ours = Stream(self.config, vectors=9 if self.dual else 6, name="picture", **kinds)
        theirs = Stream(self.config, vectors=2 if self.last else 6, last=self.last, name="text", **kinds)
        picture, text = tokens

        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = ours.modulation(emb)
        if self.last:
            text_scale, text_shift = theirs.modulation(emb)  # this order, here and before the last projection
        else:
            text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = theirs.modulation(emb)

        asked = Tokens(*ours.qkv(modulate(picture, shift, scale)))
        words = Tokens(*theirs.qkv(modulate(text, text_shift, text_scale)), real)
        if self.last:  # nothing comes of what the text attends to there: its queries are in checkpoints only
            words = words._replace(q=None)
        seen, told = joint_attention(asked, words)
        before, picture = picture, gated(picture, gate, ours.result(seen))
        if self.dual:
            dual_shift, dual_scale, dual_gate = second
            alone = Projections(self.config, name="dual", **kinds)
            attended_alone = attention(*alone.qkv(modulate(before, dual_shift, dual_scale)))
            picture = gated(picture, dual_gate, alone.result(attended_alone))
        picture = gated(picture, mlp_gate, ours.mlp(modulate(picture, mlp_shift, mlp_scale)))

        if not self.last:
            text = gated(text, text_gate, theirs.result(told))
            text = gated(text, text_mlp_gate, theirs.mlp(modulate(text, text_mlp_shift, text_mlp_scale)))
        return (constrain_tokens(picture), constrain_tokens(text)), None


class Positions(nn.Module):
    """SD3's position table, kept by axis: [0] the columns' entries, [1] the rows'. A checkpoint's own table is used."""

    config: Config

    @nn.compact
    def __call__(self, height: int, width: int):
        config = self.config
        table = self.param("table", lambda key: jnp.asarray(position_table(config)))
        return grid_positions(table, height, width)


def position_table(config: Config) -> np.ndarray:
    """[2 S D/2] float32: the table of a new model. Entry i stands at i (sample_size / patch_size) / S."""
    size = config.pos_embed_max_size
    unit = np.float32(size / (config.sample_size // config.patch_size))
    axis = sincos(np.arange(size, dtype=np.float32) / unit, config.width // 2)
    return np.stack([axis, axis])


class SD3(nn.Module):
    """The MMDiT. See `__call__`.

    Attributes:
      config: sizes.
      dtype: of matrix products and activations.
      param_dtype: of the parameters (the position table is float32 always).
      remat: a name of nn.stack.REMAT, applied to every block.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    @shaped("z_t: B h w C, t: B -> B h w _")
    def __call__(self, z_t, t, cond: Conditioning):
        """The velocity noise - z0 at z_t.

        Args:
          z_t: [B h w C] noisy latent; h and w in steps of patch_size, any proportions.
          t: [B] time in [0, 1].
          cond: tokens [B L joint_attention_dim] and pooled [B pooled_projection_dim]. The mask is not read: SD3 was
            trained, and its pipelines sample, with attention to padding tokens.

        Returns:
          [B h w C] float32.

        Raises:
          ValueError: a size that does not divide; no pooled text.
        """
        config, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if cond.pooled is None:
            raise ValueError("SD3 needs the pooled text vector, but cond.pooled is None.")
        patches, (height, width) = patchify(z_t, config.patch_size)

        table = Positions(config, name="position")(height, width)
        picture = Dense(config.width, name="patch_proj", out_dtype=jnp.float32, **kinds)(patches)
        picture = (picture + table.reshape(1, height * width, config.width)).astype(self.dtype)
        text = Dense(config.width, name="text_proj", **kinds)(cond.tokens)
        text, real = padded_text(text, axis_size("context"))
        emb = Embedder(config.width, self.param_dtype, name="time")(time_features(t))
        emb = emb + Embedder(config.width, self.param_dtype, name="pooled")(cond.pooled.astype(jnp.float32))

        tokens = constrain_tokens(picture), constrain_tokens(text)
        for name, count, dual in groups(config):
            stack = stacked(Block, count, self.remat, adapters=adapted(self))
            tokens, _ = stack(config, dual=dual, name=name, **kinds)(tokens, emb, real)
        last = rematerialised(Block, self.remat)(config, last=True, name="last_block", **kinds)
        (picture, _), _ = in_turn(last)(tokens, emb, real)

        scale, shift = Modulation(2 * config.width, name="final_modulation", **kinds)(emb)
        size = config.patch_size**2 * config.out_channels
        final = Dense(size, out_dtype=jnp.float32, kernel_init=ZEROS, name="final_proj", **kinds)
        return unpatchify(final(modulate(picture, shift, scale)), height, width, config.patch_size)


def groups(config: Config) -> list[tuple[str, int, bool]]:
    """(name, count, dual) of the runs of equal blocks before the last one."""
    joint = config.num_layers - 1 - config.dual_layers
    runs = [("dual_blocks", config.dual_layers, True), ("joint_blocks", joint, False)]
    return [run for run in runs if run[1]]


# ------------------------------------------------------------------------------------------------------ variants

_MEDIUM = Config()
VARIANTS = {
    "sd3-medium": _MEDIUM,
    "sd3.5-medium": dataclasses.replace(_MEDIUM, pos_embed_max_size=384, dual_layers=13, qk_norm=True),
    "sd3.5-large": dataclasses.replace(_MEDIUM, num_layers=38, num_attention_heads=38, qk_norm=True),
    # For the quickstart on a CPU: 3.6 M parameters, the medium's structure.
    "tiny": dataclasses.replace(
        _MEDIUM,
        sample_size=32,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=32,
    ),
}


# ------------------------------------------------------------------------------------------------------- weights

_TOLERANCE = 1e-3  # a sine stored in half precision is off by up to 2^-12, in bfloat16 by 2^-9


def _by_axis(table: np.ndarray) -> np.ndarray:
    """[1 S^2 2D], row by row -> [2 S D].

    Raises:
      UserError: half of the channels do not depend on the column alone, or the others on the row alone.
    """
    size = math.isqrt(table.shape[1])
    grid = table.reshape(size, size, -1)
    half = grid.shape[-1] // 2
    columns, rows = grid[0, :, :half], grid[:, 0, half:]
    for i in range(size):
        apart = max(np.abs(grid[i, :, :half] - columns).max(), np.abs(grid[:, i, half:] - rows).max())
        if apart > _TOLERANCE:
            raise UserError("The position table 'pos_embed.pos_embed' is not one part per column and one per row.")
    return np.stack([columns, rows])


def _by_place(axes: np.ndarray) -> np.ndarray:
    """The inverse of `_by_axis`."""
    _, size, half = axes.shape
    columns = np.broadcast_to(axes[0][None], (size, size, half))
    rows = np.broadcast_to(axes[1][:, None], (size, size, half))
    return np.concatenate([columns, rows], axis=-1).reshape(1, size * size, 2 * half)


POSITIONS = Layout("position table by axis: (1, S S, 2 D) -> (2, S, D)", _by_axis, _by_place)


def _attention_rows(config: Config, theirs: str, ours: str, names: tuple[str, ...], norms: str, where) -> list[Row]:
    rows = []
    for name, letter in zip(names, ("q", "k", "v", "out")):
        rows += linear_rows(f"{theirs}.{name}", f"{ours}/{letter}", *where)
    for letter in "qk" if config.qk_norm else "":
        rows.append(Row(f"{theirs}.{norms}_{letter}.weight", f"{ours}/{letter}_norm/scale", SAME, *where))
    return rows


def _block_rows(config: Config, ours: str, start: int, count: int, dual: bool = False) -> list[Row]:
    """One group of blocks; count 0 is the last block alone."""
    last, where = not count, (start, count)
    theirs = f"transformer_blocks.{'{i}' if count else start}"
    picture, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    rows = _attention_rows(config, f"{theirs}.attn", f"{ours}/picture", picture, "norm", where)
    rows += _attention_rows(config, f"{theirs}.attn", f"{ours}/text", text[:3] if last else text, "norm_added", where)
    if dual:
        rows += _attention_rows(config, f"{theirs}.attn2", f"{ours}/dual", picture, "norm", where)
    names = {"norm1.linear": "picture/modulation", "norm1_context.linear": "text/modulation"}
    names |= {"ff.net.0.proj": "picture/up", "ff.net.2": "picture/down"}
    if not last:
        names |= {"ff_context.net.0.proj": "text/up", "ff_context.net.2": "text/down"}
    return rows + [
        row for name, path in names.items() for row in linear_rows(f"{theirs}.{name}", f"{ours}/{path}", *where)
    ]


def weights(config: Config) -> list[Row]:
    """The weights table: every tensor of diffusers' SD3Transformer2DModel and the parameter it is."""
    patch = config.patch_size
    rows = [
        Row("pos_embed.pos_embed", "position/table", POSITIONS),
        Row("pos_embed.proj.weight", "patch_proj/kernel", conv_as_linear(patch, patch)),
        Row("pos_embed.proj.bias", "patch_proj/bias"),
        *linear_rows("time_text_embed.timestep_embedder.linear_1", "time/up"),
        *linear_rows("time_text_embed.timestep_embedder.linear_2", "time/down"),
        *linear_rows("time_text_embed.text_embedder.linear_1", "pooled/up"),
        *linear_rows("time_text_embed.text_embedder.linear_2", "pooled/down"),
        *linear_rows("context_embedder", "text_proj"),
    ]
    start = 0
    for name, count, dual in groups(config):
        rows += _block_rows(config, name, start, count, dual)
        start += count
    rows += _block_rows(config, "last_block", start, 0)
    return rows + linear_rows("norm_out.linear", "final_modulation") + linear_rows("proj_out", "final_proj")


# ------------------------------------------------------------------------------------------------- diffusers' config

_SAME_NAMES = tuple(field.name for field in dataclasses.fields(Config) if field.name not in ("dual_layers", "qk_norm"))
# diffusers' own defaults, for what an older config.json does not say.
_DIFFUSERS_DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def from_foreign(foreign: Mapping[str, Any]) -> Config:
    """The Config of a diffusers config.json.

    Raises:
      UserError: a field that is unknown, or a value that is not supported.
    """
    full = filled(foreign, _DIFFUSERS_DEFAULTS, "SD3Transformer2DModel")
    dual = tuple(full["dual_attention_layers"])
    if dual != tuple(range(len(dual))) or len(dual) >= full["num_layers"]:
        raise UserError(f"dual_attention_layers must be the first layers and not the last, but they are {list(dual)}.")
    if full["qk_norm"] not in (None, "rms_norm"):
        raise UserError(f"qk_norm must be null or 'rms_norm', but it is '{full['qk_norm']}'.")
    if full["out_channels"] is None:
        full["out_channels"] = full["in_channels"]
    config = Config(
        dual_layers=len(dual), qk_norm=full["qk_norm"] is not None, **{name: full[name] for name in _SAME_NAMES}
    )
    if full["caption_projection_dim"] != config.width:
        raise UserError(
            f"caption_projection_dim is {full['caption_projection_dim']}, but the blocks are {config.width} wide "
            f"({config.num_attention_heads} heads of {config.attention_head_dim})."
        )
    return config


def to_foreign(config: Config) -> dict[str, Any]:
    """The inverse of `from_foreign`, every field written out."""
    return {name: getattr(config, name) for name in _SAME_NAMES} | {
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(range(config.dual_layers)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


# ---------------------------------------------------------------------------------------------------------- model


def extended(config: Config, params, resolution: int) -> tuple[Config, Any]:
    """(config, params) whose position table is long enough for pictures of `resolution` px.

    A table that ends before is interpolated whenever this model runs, but diffusers can only crop it. So the rows
    that a square picture of this side takes (see `grid_positions`) become the table: at this size both give the same
    output, while other sizes are crops of the new table. A table that is long enough stays as it is.
    """
    side = resolution // (LATENT_FACTOR * config.patch_size)
    if side <= config.pos_embed_max_size:
        return config, params
    positions = table_positions(side, side, config.pos_embed_max_size)
    table = jnp.stack([interpolate_rows(axis, positions) for axis in params["position"]["table"]])
    return dataclasses.replace(config, pos_embed_max_size=side), params | {"position": {"table": table}}


BACKBONE = Model(
    class_name="SD3Transformer2DModel",
    variants=VARIANTS,
    build=SD3,
    rows=weights,
    from_foreign=from_foreign,
    to_foreign=to_foreign,
    inputs=inputs,
    extended=extended,
)
