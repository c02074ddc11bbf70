"""The convolutional autoencoder with a Gaussian posterior of latent diffusion (Rombach et al., arXiv 2112.10752).

The one that SD3, FLUX and SDXL use, with 4 or 16 latent channels; diffusers calls it AutoencoderKL. Pictures and
latents are [B H W C]; the latent's side is the picture's divided by 8. Convolutions and matrix products run in `dtype`;
norm statistics, the softmax, the posterior and the decoded picture are float32: the last convolutions keep the
accumulators of their products.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.autoencoders.bands import Affine, Conv, row_moments
from lwd_jax.errors import UserError
from lwd_jax.nn.attention import attention, blockwise, by_platform, splash
from lwd_jax.nn.layers import parameter, precision_of
from lwd_jax.nn.platform import platform
from lwd_jax.nn.sharding import axis_size
from lwd_jax.shapes import Array, shaped
from lwd_jax.weights.layout import CONV, LINEAR
from lwd_jax.weights.model import Model, filled
from lwd_jax.weights.table import Row

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Config:
    """Sizes, named as diffusers names them, but for `scaling` and `shift`: latents in use are (z - shift) * scaling."""

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    in_channels: int = 3
    out_channels: int = 3
    scaling: float = 1.5305
    shift: float = 0.0609
    sample_size: int | tuple[int, int] = 1024  # px; kept for diffusers
    force_upcast: bool = True  # kept for diffusers: its float16 pipelines decode in float32

    @property
    def factor(self) -> int:
        """Picture pixels per latent position, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


VARIANTS = {
    "sd3": Config(),
    "flux": Config(scaling=0.3611, shift=0.1159),
    "sdxl": Config(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling=0.13025, shift=0.0),
    "tiny": Config(
        block_out_channels=(8, 16, 32, 64),  # few at full size, where a CPU spends its time
        layers_per_block=1,
        norm_num_groups=1,  # groups of few channels would take each picture's colours away
        scaling=0.25,  # what brings latents trained with `configs/quickstart_stage1.py` to about unit variance
        shift=0.0,
        sample_size=128,
    ),
}


class Posterior(NamedTuple):
    """q(z | x), a diagonal Gaussian over unscaled latents, float32."""

    mean: Array  # [B h w C]
    logvar: Array  # [B h w C], clipped to LOGVAR_RANGE


def scale(config: Config, z: Array) -> Array:
    """Unscaled latent -> latent in use."""
    return (z - config.shift) * config.scaling


def unscale(config: Config, z: Array) -> Array:
    """The inverse of `scale`."""
    return z / config.scaling + config.shift


def group_moments(x: Array, groups: int) -> tuple[Array, Array]:
    """Mean and variance over (H, W, the channels of a group): [B H W C] -> two of [B groups], float32.

    They are taken over each row and channel first, then combined (Chan et al., 1983), in one pass over the picture: a
    running float32 sum over all 16 million pixels of a 5K photograph would lose its last digits.
    """
    batch, height, _, channels = x.shape
    means, variances = (part.reshape(batch, height, groups, channels // groups) for part in row_moments(x))
    mean = means.mean((1, 3))
    return mean, (variances + jnp.square(means - mean[:, None, :, None])).mean((1, 3))


def _affine(x: Array, gain: Array, bias: Array) -> tuple[Affine, tuple[Array, ...]]:
    """`group_affine`, and what its gradient is made of."""
    mean, variance = (moment[:, :, None] for moment in group_moments(x, len(gain)))
    inverse = jax.lax.rsqrt(variance + NORM_EPS)
    factor = gain * inverse
    offset = bias - mean * factor
    per_channel = (len(x), 1, 1, x.shape[-1])
    return Affine(factor.reshape(per_channel), offset.reshape(per_channel)), (x, gain, mean, inverse)


@jax.custom_vjp
def group_affine(x: Array, gain: Array, bias: Array) -> Affine:
    """Group normalisation of x [B H W C] as the map that does it; gain and bias [groups, channels of one], float32."""
    return _affine(x, gain, bias)[0]


def _affine_backward(kept: tuple[Array, ...], gradients: Affine):
    # By hand, for all rows at once: d mean / dx = 1 / n, d variance / dx = 2 (x - mean) / n. JAX would go through the
    # rows' moments, and keep a float32 copy of x for it.
    x, gain, mean, inverse = kept
    of_factor, of_offset = (gradient.reshape(len(x), *gain.shape) for gradient in gradients)
    n = x.size // mean.size
    of_factor -= mean * of_offset
    of_variance = -0.5 * inverse**3 * (gain * of_factor).sum(-1, keepdims=True)
    of_mean = -inverse * (gain * of_offset).sum(-1, keepdims=True)
    moments, per_channel = (mean, of_mean, of_variance), gradients.offset.shape
    mean, of_mean, of_variance = (jnp.broadcast_to(each, of_offset.shape).reshape(per_channel) for each in moments)
    of_x = (of_mean + 2 * of_variance * (x.astype(jnp.float32) - mean)) / n
    return of_x.astype(x.dtype), (inverse * of_factor).sum(0), of_offset.sum(0)


group_affine.defvjp(_affine, _affine_backward)


class GroupNorm(nn.Module):
    """Group normalisation over (H, W, the channels of a group), as the map that does it; a float32 island."""

    groups: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    @shaped("x: B H W C")
    def __call__(self, x: Array) -> Affine:
        channels = x.shape[-1]
        gain = parameter(self, "scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,), self.param_dtype)
        gain, bias = (part.astype(jnp.float32).reshape(self.groups, -1) for part in (gain, bias))
        return group_affine(x, gain, bias)


class ResnetBlock(nn.Module):
    """norm, silu, convolution, twice; added to the input. The norm and silu run inside the convolution, see `bands`."""

    features: int
    groups: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm1 = GroupNorm(self.groups, self.param_dtype, name="norm1")(x)
        h = Conv(self.features, **kinds, name="conv1")(x, activate=norm1)
        norm2 = GroupNorm(self.groups, self.param_dtype, name="norm2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, **kinds, name="conv_shortcut")(x)
        return Conv(self.features, **kinds, name="conv2")(h, activate=norm2, plus=x)


class Attention(nn.Module):
    """norm, then one head of self-attention over all positions; added to the input."""

    groups: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape

        def dense(name):
            precision = precision_of(self.dtype)
            return nn.Dense(channels, dtype=self.dtype, param_dtype=self.param_dtype, precision=precision, name=name)

        norm = GroupNorm(self.groups, self.param_dtype, name="norm")(x)
        h = norm(x).astype(self.dtype).reshape(batch, height * width, channels)
        h = _one_head(*(dense(name)(h) for name in "qkv"))
        return x + dense("out")(h).reshape(x.shape)


def _one_head(q: Array, k: Array, v: Array) -> Array:
    """Attention [B N D]; over a mesh every device asks for its own positions, where they divide."""
    q, k, v = (x[:, :, None] for x in (q, k, v))
    if q.shape[1] % axis_size("context"):
        return blockwise(q, k, v, None)[:, :, 0]
    return attention(q, k, v, kernel=by_platform({"tpu": splash}))[:, :, 0]  # cuDNN's kernels take narrower heads


class _Half(nn.Module):
    """What encoder and decoder share: sizes, dtypes and the blocks under the remat policy.

    remat: "full" makes the inside of every block again in the backward pass; "attention" does so but for the attention,
    whose output and log-sum-exp are kept; "none" keeps everything.
    """

    config: Config
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str

    def conv(self, features: int, name: str, **kwargs) -> Conv:
        return Conv(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **kwargs)

    def resnet(self, features: int, name: str) -> nn.Module:
        cls = ResnetBlock if self.remat == "none" else nn.remat(ResnetBlock)
        return cls(features, self.config.norm_num_groups, self.dtype, self.param_dtype, name=name)

    def resnets(self, h: Array, features: int, names: list[str]) -> Array:
        """Equal blocks, one after the other: `features` in and out.

        Rematerialised, they are one scanned body, which compiles in half of the time. Their parameters keep their own
        names. Not on a CPU, whose convolutions lose their threads in a loop.
        """
        if len(names) < 2 or self.remat == "none" or platform() == "cpu" or self.is_initializing():
            for name in names:
                h = self.resnet(features, name)(h)
            return h
        block = ResnetBlock(features, self.config.norm_num_groups, self.dtype, self.param_dtype, parent=None)
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.variables["params"][name] for name in names))

        @jax.checkpoint
        def body(h, params):
            return block.apply({"params": params}, h), None

        return jax.lax.scan(body, h, stack)[0]

    def attention(self, name: str) -> nn.Module:
        cls = nn.remat(Attention) if self.remat == "full" else Attention
        return cls(self.config.norm_num_groups, self.dtype, self.param_dtype, name=name)

    def head(self, h: Array, features: int) -> Array:
        norm = GroupNorm(self.config.norm_num_groups, self.param_dtype, name="norm_out")(h)
        return self.conv(features, "conv_out", out_dtype=jnp.float32)(h, activate=norm)


class Encoder(_Half):
    """Picture -> mean and log-variance, side by side on the channel axis."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = self.config.block_out_channels
        h = self.conv(widths[0], "conv_in")(x)
        for level, width in enumerate(widths):
            names = [f"down_{level}_resnet_{layer}" for layer in range(self.config.layers_per_block)]
            if h.shape[-1] != width:
                h = self.resnet(width, names.pop(0))(h)
            if level < len(widths) - 1:
                h = self.resnets(h, width, names)
                h = self.conv(width, f"down_{level}_conv", stride=2, padding=((0, 1), (0, 1)))(h)
        h = self.resnets(h, width, [*names, "mid_resnet_0"])
        h = self.resnets(self.attention("mid_attention")(h), width, ["mid_resnet_1"])
        return self.head(h, 2 * self.config.latent_channels)


def _doubled(x: Array) -> Array:
    """Every position becomes 2 x 2 of itself."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Decoder(_Half):
    """Latent -> picture."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        widths = self.config.block_out_channels[::-1]
        h = self.resnets(self.conv(widths[0], "conv_in")(z), widths[0], ["mid_resnet_0"])
        h = self.attention("mid_attention")(h)
        names = ["mid_resnet_1"]
        for level, width in enumerate(widths):
            names += [f"up_{level}_resnet_{layer}" for layer in range(self.config.layers_per_block + 1)]
            if h.shape[-1] != width:
                h = self.resnet(width, names.pop(0))(h)
            h, names = self.resnets(h, width, names), []
            if level < len(widths) - 1:
                h = self.conv(width, f"up_{level}_conv")(_doubled(h))
        return self.head(h, self.config.out_channels)


class AutoencoderKL(nn.Module):
    """encode: picture -> Posterior; decode: unscaled latent -> picture. Calling it does both, through the mean.

    Attributes:
      config: sizes.
      dtype: of convolutions, matrix products and activations.
      param_dtype: of the parameters.
      remat: "none", "attention" or "full", see `_Half`.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        if self.remat not in ("none", "attention", "full"):
            raise UserError(f"There is no remat policy '{self.remat}'. Known: attention, full, none.")
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(self.config, remat=self.remat, **kinds)
        self.decoder = Decoder(self.config, remat=self.remat, **kinds)
        if self.config.use_quant_conv:
            # The posterior is float32: so are the products of its last step, which are few.
            self.quant_conv = Conv(2 * self.config.latent_channels, size=1, param_dtype=self.param_dtype)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = Conv(self.config.latent_channels, size=1, **kinds)

    @shaped("x: B H W C")
    def encode(self, x: Array) -> Posterior:
        """[B H W 3] in [-1, 1] -> Posterior over [B H/8 W/8 C].

        Raises:
          UserError: the picture's size is not a multiple of the factor.
        """
        factor = self.config.factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise UserError(
                f"A picture of {x.shape[2]} x {x.shape[1]} px does not divide by the autoencoder's factor {factor}."
            )
        moments = self.encoder(x)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    @shaped("z: B h w C")
    def decode(self, z: Array) -> Array:
        """Unscaled latent [B h w C] -> [B 8h 8w 3] float32, not clipped."""
        return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x).mean)


def _pair(foreign: str, ours: str, kernel: str = "kernel", **kwargs) -> list[Row]:
    return [Row(f"{foreign}.weight", f"{ours}/{kernel}", **kwargs), Row(f"{foreign}.bias", f"{ours}/bias")]


def _conv_rows(foreign: str, ours: str) -> list[Row]:
    return _pair(foreign, ours, layout=CONV)


def _resnet_rows(foreign: str, ours: str, shortcut: bool) -> list[Row]:
    rows = _pair(f"{foreign}.norm1", f"{ours}/norm1", "scale") + _conv_rows(f"{foreign}.conv1", f"{ours}/conv1")
    rows += _pair(f"{foreign}.norm2", f"{ours}/norm2", "scale") + _conv_rows(f"{foreign}.conv2", f"{ours}/conv2")
    return rows + (_conv_rows(f"{foreign}.conv_shortcut", f"{ours}/conv_shortcut") if shortcut else [])


# ours -> diffusers' name, and the name that diffusers up to 0.17 wrote and some checkpoints still have.
_ATTENTION = {"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"), "out": ("to_out.0", "proj_attn")}


def _mid_rows(foreign: str, ours: str) -> list[Row]:
    attention = f"{foreign}.mid_block.attentions.0"
    rows = _pair(f"{attention}.group_norm", f"{ours}/mid_attention/norm", "scale")
    for name, (new, old) in _ATTENTION.items():
        path = f"{ours}/mid_attention/{name}"
        rows.append(Row(f"{attention}.{new}.weight", f"{path}/kernel", LINEAR, older=f"{attention}.{old}.weight"))
        rows.append(Row(f"{attention}.{new}.bias", f"{path}/bias", older=f"{attention}.{old}.bias"))
    for i in range(2):
        rows += _resnet_rows(f"{foreign}.mid_block.resnets.{i}", f"{ours}/mid_resnet_{i}", shortcut=False)
    return rows


def _half_rows(config: Config, half: str, direction: str, sampler: str) -> list[Row]:
    """half: encoder or decoder, direction: down or up, sampler: diffusers' name of what changes the size."""
    widths = config.block_out_channels if half == "encoder" else config.block_out_channels[::-1]
    layers = config.layers_per_block + (half == "decoder")
    rows = _conv_rows(f"{half}.conv_in", f"{half}/conv_in") + _mid_rows(half, half)
    before = widths[0]
    for level, width in enumerate(widths):
        foreign, ours = f"{half}.{direction}_blocks.{level}", f"{half}/{direction}_{level}"
        for layer in range(layers):
            rows += _resnet_rows(f"{foreign}.resnets.{layer}", f"{ours}_resnet_{layer}", shortcut=before != width)
            before = width
        if level < len(widths) - 1:
            rows += _conv_rows(f"{foreign}.{sampler}.0.conv", f"{ours}_conv")
    rows += _pair(f"{half}.conv_norm_out", f"{half}/norm_out", "scale")
    return rows + _conv_rows(f"{half}.conv_out", f"{half}/conv_out")


def rows(config: Config) -> list[Row]:
    """The weights table against diffusers' AutoencoderKL."""
    table = _half_rows(config, "encoder", "down", "downsamplers") + _half_rows(config, "decoder", "up", "upsamplers")
    for name, there in (("quant_conv", config.use_quant_conv), ("post_quant_conv", config.use_post_quant_conv)):
        table += _conv_rows(name, name) if there else []
    return table


# Config field -> diffusers' name and its default there (what a config.json that lacks it means).
_FIELDS: dict[str, tuple[str, Any]] = {
    "latent_channels": ("latent_channels", 4),
    "block_out_channels": ("block_out_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_num_groups", 32),
    "use_quant_conv": ("use_quant_conv", True),
    "use_post_quant_conv": ("use_post_quant_conv", True),
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "scaling": ("scaling_factor", 0.18215),
    "shift": ("shift_factor", None),
    "sample_size": ("sample_size", 32),
    "force_upcast": ("force_upcast", True),
}


def _fixed(levels: int) -> dict[str, Any]:
    """What diffusers lets vary and this module does not."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
    }


def from_foreign(foreign: dict[str, Any]) -> Config:
    """diffusers' config.json -> Config.

    Raises:
      UserError: a field that is unknown, or a value that this module does not build.
    """
    fields = dict(_FIELDS.values())
    fixed = _fixed(len(foreign.get("block_out_channels", fields["block_out_channels"])))
    full = filled(foreign, fields | fixed, "AutoencoderKL")
    for name, wanted in fixed.items():
        value = full[name]
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            raise UserError(f"This AutoencoderKL has {name} {value!r}, but only {wanted!r} is supported.")
    values = {ours: full[name] for ours, (name, _) in _FIELDS.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Config(**values | {"shift": values["shift"] or 0.0})


def to_foreign(config: Config) -> dict[str, Any]:
    """The full diffusers config."""
    # A shift of 0 is written as one: the pipelines of SD3 and FLUX add it, and cannot add null.
    values = {name: getattr(config, ours) for ours, (name, _) in _FIELDS.items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return values | _fixed(len(config.block_out_channels))


def inputs(config: Config, resolution: int, batch: int) -> tuple[jax.ShapeDtypeStruct]:
    """The argument of `AutoencoderKL.__call__`: a picture."""
    return (jax.ShapeDtypeStruct((batch, resolution, resolution, config.in_channels), jnp.float32),)


AUTOENCODER = Model("AutoencoderKL", VARIANTS, AutoencoderKL, rows, from_foreign, to_foreign, inputs)
