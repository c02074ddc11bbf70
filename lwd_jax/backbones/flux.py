"""FLUX.1's backbone (black-forest-labs' FLUX.1-dev and -schnell), the one the released method was trained on.

Its first blocks are an MMDiT's (arXiv 2403.03206): picture and text tokens keep weights of their own and meet in
attention. In the others all tokens are one sequence under the same weights, and attention and MLP run side by side.
Positions turn queries and keys (RoPE). Equal to diffusers' FluxTransformer2DModel.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.backbones.flux_original import as_diffusers, foreign_config
from lwd_jax.errors import UserError, did_you_mean
from lwd_jax.nn.attention import Tokens, attention, joint_attention
from lwd_jax.nn.conditioning import Conditioning, inputs
from lwd_jax.nn.layers import ZEROS, Dense, gelu
from lwd_jax.nn.modulation import Embedder, Modulation, gated, modulate
from lwd_jax.nn.patches import patchify, unpatchify
from lwd_jax.nn.positions import Rotation, grid_rotation, rotate, time_features, unturned
from lwd_jax.nn.sharding import axis_size, constrain_tokens, join_tokens, split_tokens
from lwd_jax.nn.stack import adapted, stacked
from lwd_jax.nn.streams import Projections, Stream, padded_text
from lwd_jax.shapes import shaped
from lwd_jax.weights.model import Model, filled
from lwd_jax.weights.table import Row, linear_rows

LATENT_FACTOR = 8  # picture pixels per latent position, of FLUX's autoencoder
TEXT_TOKENS = 512  # of T5
THETA = 10_000.0  # RoPE's base
TRAINED_TOKENS = 4608  # text and a picture of 1024 px, what FLUX.1 was trained with


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, under diffusers' names, but for the channels: those of the latent, not of tokens of 2 x 2 positions.

    diffusers' config knows nothing of `ntk` and `proportional_attention`. They are written to config.json under the key
    "_lwd", which diffusers skips, where they are not 1 and False.
    """

    patch_size: ClassVar[int] = 2  # latent positions along each side of a token
    qk_norm: ClassVar[bool] = True
    latent_factor: ClassVar[int] = LATENT_FACTOR
    text_tokens: ClassVar[int] = TEXT_TOKENS
    noise_levels: ClassVar[str] = "flux"  # a row of sample.schedule.GRIDS
    resolution: ClassVar[int] = 1024  # the side in px of the square pictures it was made for

    in_channels: int = 16
    num_layers: int = 19  # blocks of two streams
    num_single_layers: int = 38  # blocks of one
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True  # whether it is told a guidance scale: dev is, schnell is not
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # channels of a head that turn by index, row and column
    ntk: tuple[float, float] = (1.0, 1.0)  # factors of RoPE's base along rows and columns; URAE takes 10 at 4096 px
    proportional_attention: bool = False  # softmax scale sqrt(log_4608(tokens) / d) instead of 1 / sqrt(d)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers + self.num_single_layers


class Positions(NamedTuple):
    """What attention knows of one sequence of tokens.

    Attributes:
      rotation: of every token.
      real: [B L] bool, the tokens that are no padding; None = all.
    """

    rotation: Rotation
    real: jax.Array | None


def turned(qkv, where: Positions, scale: float) -> Tokens:
    """Queries, keys and values with their positions; `scale` multiplies the logits."""
    q, k, v = qkv
    return Tokens(rotate(q, where.rotation, scale), rotate(k, where.rotation), v, where.real)


class DoubleBlock(nn.Module):
    """Two streams, one attention: figure 2b of arXiv 2403.03206 with rotary positions."""

    config: Config
    logit_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, emb, positions):
        """One block on.

        Args:
          tokens: (picture [B L D], text [B S D]).
          emb: [B D] float32.
          positions: of the two.

        Returns:
          (the same tokens, None).
        """
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (picture, text), (places, order) = tokens, positions
        ours, theirs = Stream(self.config, name="picture", **kinds), Stream(self.config, name="text", **kinds)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = ours.modulation(emb)
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = theirs.modulation(emb)

        asked = turned(ours.qkv(modulate(picture, shift, scale)), places, self.logit_scale)
        words = turned(theirs.qkv(modulate(text, text_shift, text_scale)), order, self.logit_scale)
        seen, told = joint_attention(asked, words)
        picture = gated(picture, gate, ours.result(seen))
        picture = gated(picture, mlp_gate, ours.mlp(modulate(picture, mlp_shift, mlp_scale)))
        text = gated(text, text_gate, theirs.result(told))
        text = gated(text, text_mlp_gate, theirs.mlp(modulate(text, text_mlp_shift, text_mlp_scale)))
        return (constrain_tokens(picture), constrain_tokens(text)), None


class SingleBlock(Projections):
    """One stream, attention and MLP side by side (arXiv 2302.05442): `down` is the way out of both, attention first."""

    last: bool = True  # no way out of the attention alone
    logit_scale: float = 1.0

    def setup(self):
        super().setup()
        width = self.config.width
        self.modulation = Modulation(3 * width, dtype=self.dtype, param_dtype=self.param_dtype)
        self.up, self.down = self.dense(4 * width), self.dense(width)

    def __call__(self, tokens, emb, positions):
        """(tokens [B L D], emb [B D] float32, their positions) -> (tokens [B L D], None)."""
        shift, scale, gate = self.modulation(emb)
        x = modulate(tokens, shift, scale)
        asked = turned(self.qkv(x), positions, self.logit_scale)
        attended = attention(asked.q, asked.k, asked.v, real=asked.real).reshape(tokens.shape)
        both = self.down(attended, gelu(self.up(x)))
        return constrain_tokens(gated(tokens, gate, both)), None


class FLUX(nn.Module):
    """FLUX.1. See `__call__`.

    Attributes:
      config: sizes.
      dtype: of matrix products and activations.
      param_dtype: of the parameters.
      remat: a name of nn.stack.REMAT, applied to every block.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    @shaped("z_t: B h w C, t: B -> B h w C")
    def __call__(self, z_t, t, cond: Conditioning):
        """The velocity noise - z0 at z_t.

        Args:
          z_t: [B h w C] noisy latent; h and w even, any proportions.
          t: [B] time in [0, 1].
          cond: tokens [B L joint_attention_dim], pooled [B pooled_projection_dim] and, with guidance_embeds, guidance
            [B]. The mask is not read: FLUX was trained, and its pipelines sample, with attention to padding tokens.

        Returns:
          [B h w C] float32.

        Raises:
          ValueError: an odd size; no pooled text; no guidance, or guidance for a model that is told none.
        """
        config, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches, (height, width) = patchify(z_t, config.patch_size, channels_first=True)
        length = patches.shape[1] + cond.tokens.shape[1]
        of_blocks = kinds | {"logit_scale": logit_scale(config, length)}

        picture = constrain_tokens(Dense(config.width, name="patch_proj", **kinds)(patches))
        text, real = padded_text(Dense(config.width, name="text_proj", **kinds)(cond.tokens), axis_size("context"))
        text = constrain_tokens(text)
        places = places_of(config, height, width)
        order = Positions(unturned(text.shape[1], config.attention_head_dim), real)
        emb = embedding(config, self.param_dtype, t, cond)

        stack = functools.partial(stacked, remat=self.remat, adapters=adapted(self))
        double = stack(DoubleBlock, config.num_layers)(config, name="double_blocks", **of_blocks)
        (picture, text), _ = double((picture, text), emb, (places, order))
        single = stack(SingleBlock, config.num_single_layers)(config, name="single_blocks", **of_blocks)
        tokens = constrain_tokens(join_tokens(text, picture))
        tokens, _ = single(tokens, emb, joined_positions(order, places, batch=len(picture)))
        _, picture = split_tokens(tokens, text.shape[1], picture.shape[1])

        scale, shift = Modulation(2 * config.width, name="final_modulation", **kinds)(emb)
        size = config.patch_size**2 * config.in_channels
        final = Dense(size, out_dtype=jnp.float32, kernel_init=ZEROS, name="final_proj", **kinds)
        tokens = final(modulate(constrain_tokens(picture), shift, scale))
        return unpatchify(tokens, height, width, config.patch_size, channels_first=True)


def embedding(config: Config, param_dtype, t, cond: Conditioning):
    """[B D] float32 that every modulation is computed from: of time, guidance and pooled text. Within a module."""
    if cond.pooled is None:
        raise ValueError("FLUX needs the pooled text vector, but cond.pooled is None.")
    if (cond.guidance is None) == config.guidance_embeds:
        kind, given = ("is told", "is None") if config.guidance_embeds else ("is not told", "is given")
        raise ValueError(f"This FLUX {kind} a guidance scale, but cond.guidance {given}.")
    emb = Embedder(config.width, param_dtype, name="time")(time_features(t))
    if config.guidance_embeds:
        emb = emb + Embedder(config.width, param_dtype, name="guidance")(time_features(cond.guidance))
    return emb + Embedder(config.width, param_dtype, name="pooled")(cond.pooled.astype(jnp.float32))


def places_of(config: Config, height: int, width: int) -> Positions:
    """Of a picture of height x width tokens."""
    thetas = (THETA, *(THETA * factor for factor in config.ntk))
    return Positions(grid_rotation(height, width, config.axes_dims_rope, thetas), None)


def joined_positions(*kinds: Positions, batch: int) -> Positions:
    """Of the tokens that `join_tokens` joins."""
    rotation = Rotation(*(join_tokens(*tables) for tables in zip(*(kind.rotation for kind in kinds))))
    if all(kind.real is None for kind in kinds):
        return Positions(rotation, None)
    shapes = [(batch, kind.rotation.cos.shape[1]) for kind in kinds]
    whole = [jnp.ones(shape, bool) if kind.real is None else kind.real for kind, shape in zip(kinds, shapes)]
    return Positions(rotation, join_tokens(*whole))


def logit_scale(config: Config, tokens: int) -> float:
    """What proportional attention multiplies the logits q k^T / sqrt(d) with: sqrt(log_4608(tokens)).

    1.074 at 2048 px and 1.147 at 4096 px. Reference: arXiv 2306.08645, section 3.
    """
    return math.sqrt(math.log(tokens, TRAINED_TOKENS)) if config.proportional_attention else 1.0


# ------------------------------------------------------------------------------------------------------ variants

_DEV = Config()
VARIANTS = {
    "flux-dev": _DEV,
    "flux-schnell": dataclasses.replace(_DEV, guidance_embeds=False),
    # For the quickstart on a CPU: 3.7 M parameters, dev's structure.
    "flux-tiny": dataclasses.replace(
        _DEV,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    ),
}


# ------------------------------------------------------------------------------------------------------- weights

_ENDS = {
    "x_embedder": "patch_proj",
    "context_embedder": "text_proj",
    "time_text_embed.timestep_embedder.linear_1": "time/up",
    "time_text_embed.timestep_embedder.linear_2": "time/down",
    "time_text_embed.text_embedder.linear_1": "pooled/up",
    "time_text_embed.text_embedder.linear_2": "pooled/down",
    "norm_out.linear": "final_modulation",
    "proj_out": "final_proj",
}
_GUIDANCE = {
    "time_text_embed.guidance_embedder.linear_1": "guidance/up",
    "time_text_embed.guidance_embedder.linear_2": "guidance/down",
}
_DOUBLE = {
    "norm1.linear": "picture/modulation",
    "attn.to_q": "picture/q",
    "attn.to_k": "picture/k",
    "attn.to_v": "picture/v",
    "attn.to_out.0": "picture/out",
    "ff.net.0.proj": "picture/up",
    "ff.net.2": "picture/down",
    "norm1_context.linear": "text/modulation",
    "attn.add_q_proj": "text/q",
    "attn.add_k_proj": "text/k",
    "attn.add_v_proj": "text/v",
    "attn.to_add_out": "text/out",
    "ff_context.net.0.proj": "text/up",
    "ff_context.net.2": "text/down",
}
_DOUBLE_NORMS = {
    "attn.norm_q": "picture/q_norm",
    "attn.norm_k": "picture/k_norm",
    "attn.norm_added_q": "text/q_norm",
    "attn.norm_added_k": "text/k_norm",
}
_SINGLE = {
    "norm.linear": "modulation",
    "attn.to_q": "q",
    "attn.to_k": "k",
    "attn.to_v": "v",
    "proj_mlp": "up",
    "proj_out": "down",
}
_SINGLE_NORMS = {"attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}


def _block_rows(theirs: str, ours: str, count: int, layers: dict[str, str], norms: dict[str, str]) -> list[Row]:
    """One stack of `count` blocks."""
    rows = []
    for name, path in layers.items():
        rows += linear_rows(f"{theirs}.{{i}}.{name}", f"{ours}/{path}", 0, count)
    for name, path in norms.items():
        rows.append(Row(f"{theirs}.{{i}}.{name}.weight", f"{ours}/{path}/scale", count=count))
    return rows


def weights(config: Config) -> list[Row]:
    """The weights table: every tensor of diffusers' FluxTransformer2DModel and the parameter it is."""
    ends = _ENDS | (_GUIDANCE if config.guidance_embeds else {})
    return [
        *(row for name, path in ends.items() for row in linear_rows(name, path)),
        *_block_rows("transformer_blocks", "double_blocks", config.num_layers, _DOUBLE, _DOUBLE_NORMS),
        *_block_rows("single_transformer_blocks", "single_blocks", config.num_single_layers, _SINGLE, _SINGLE_NORMS),
    ]


# ------------------------------------------------------------------------------------------------- diffusers' config

# diffusers' own defaults, for what an older config.json does not say.
_DIFFUSERS_DEFAULTS = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
_OURS = "_lwd"  # the key of what diffusers' config cannot say
_OUR_FIELDS = ("ntk", "proportional_attention")
_SAME_NAMES = tuple(
    field.name for field in dataclasses.fields(Config) if field.name not in ("in_channels", *_OUR_FIELDS)
)


def from_foreign(foreign: Mapping[str, Any]) -> Config:
    """The Config of a diffusers config.json.

    Raises:
      UserError: a field that is unknown, or a value that is not supported.
    """
    full = filled(foreign, _DIFFUSERS_DEFAULTS, "FluxTransformer2DModel")
    channels, packed = full["in_channels"], Config.patch_size**2
    if full["patch_size"] != 1 or channels % packed or full["out_channels"] not in (None, channels):
        raise UserError(
            f"FLUX's tokens must be {packed} latent positions, in and out alike, but patch_size is "
            f"{full['patch_size']}, in_channels {channels} and out_channels {full['out_channels']}."
        )
    axes, width = tuple(full["axes_dims_rope"]), full["attention_head_dim"]
    if len(axes) != 3 or any(size % 2 for size in axes) or sum(axes) != width:
        raise UserError(f"axes_dims_rope must be three even sizes that sum to {width}, but they are {list(axes)}.")
    sizes = {name: full[name] for name in _SAME_NAMES} | {"axes_dims_rope": axes}
    ours = dict(foreign.get(_OURS, {}))
    if name := next((name for name in ours if name not in _OUR_FIELDS), ""):
        raise UserError(f"There is no '{name}' under {_OURS} in a FLUX config.json.{did_you_mean(name, _OUR_FIELDS)}")
    if "ntk" in ours:
        ours["ntk"] = tuple(map(float, ours["ntk"]))
    return Config(in_channels=channels // packed, **sizes, **ours)


def to_foreign(config: Config) -> dict[str, Any]:
    """The inverse of `from_foreign`, every field written out."""
    same = {name: getattr(config, name) for name in _SAME_NAMES} | {"axes_dims_rope": list(config.axes_dims_rope)}
    channels = config.in_channels * config.patch_size**2
    ours = {name: getattr(config, name) for name in _OUR_FIELDS if getattr(config, name) != getattr(Config, name)}
    extra = {_OURS: ours | ({"ntk": list(config.ntk)} if "ntk" in ours else {})} if ours else {}
    return {"patch_size": 1, "in_channels": channels, "out_channels": channels} | same | extra


# ---------------------------------------------------------------------------------------------------------- model


def original(tensors: Mapping[str, Any]) -> tuple[Config, Mapping[str, Any]] | None:
    """(config, tensors under diffusers' names) of a file in the original layout; None: it is another."""
    foreign = foreign_config(tensors)
    return None if foreign is None else (from_foreign(foreign), as_diffusers(tensors))


BACKBONE = Model(
    class_name="FluxTransformer2DModel",
    variants=VARIANTS,
    build=FLUX,
    rows=weights,
    from_foreign=from_foreign,
    to_foreign=to_foreign,
    inputs=inputs,
    original=original,
)
