"""Peak memory and time of encoding a 5312 x 2988 photograph with the full-size SD3 autoencoder on a CPU.

    python benchmarks/encode_memory.py [--picture FILE] [--size 5312x2988] [--dtype bfloat16]

Weights are random: memory and time do not depend on them. Without a picture, photographs from scikit-image are tiled to
the size. Sides are cropped to multiples of 8. "Planned" is what the compiler asks for; "peak" is the most memory that
the process ever held, Python and JAX included. The target is a peak below 16 GiB.
"""

import argparse
import os
import resource
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import skimage.data  # noqa: E402
from PIL import Image  # noqa: E402

from lwd_jax.autoencoders import kl  # noqa: E402
from lwd_jax.data.pictures import from_uint8  # noqa: E402
from lwd_jax.weights.model import init_params  # noqa: E402

GIB = 2**30
TARGET = 16  # GiB


def tiled(width: int, height: int) -> np.ndarray:
    """Photographs side by side: [height width 3] uint8."""
    tiles = [skimage.data.astronaut(), skimage.data.coffee()[:, :512], skimage.data.chelsea()[:, :451]]
    tiles = [np.asarray(Image.fromarray(tile).resize((512, 512))) for tile in tiles]
    down, across = -(-height // 512), -(-width // 512)
    rows = [np.concatenate([tiles[(i + j) % len(tiles)] for j in range(across)], axis=1) for i in range(down)]
    return np.concatenate(rows)[:height, :width]


def picture(path: str, size: str, factor: int) -> np.ndarray:
    """[1 H W 3] float32 in [-1, 1], sides cropped to multiples of the factor."""
    if path:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    else:
        pixels = tiled(*map(int, size.split("x")))
    height, width = (side - side % factor for side in pixels.shape[:2])
    return from_uint8(pixels[None, :height, :width])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="")
    parser.add_argument("--size", default="5312x2988", help="of the tiled photographs, where no picture is given")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()

    config = kl.VARIANTS["sd3"]
    x = picture(args.picture, args.size, config.factor)
    params = init_params(kl.AUTOENCODER, config, jax.random.key(0))
    module = kl.AutoencoderKL(config, dtype=jnp.dtype(args.dtype))
    start = time.perf_counter()
    encode = jax.jit(lambda params, x: module.apply({"params": params}, x, method="encode"))
    encode = encode.lower(params, x).compile()
    compiled = time.perf_counter()
    memory = encode.memory_analysis()
    planned = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    print(f"picture          {x.shape[2]} x {x.shape[1]} px, {args.dtype}")
    print(f"compiled in      {compiled - start:8.1f} s")
    print(f"planned memory   {planned / GIB:8.2f} GiB", flush=True)
    posterior = jax.block_until_ready(encode(params, x))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"encoded in       {time.perf_counter() - compiled:8.1f} s on {os.cpu_count()} cores")
    print(f"latent           {tuple(posterior.mean.shape)}, finite: {bool(jnp.isfinite(posterior.mean).all())}")
    print(f"peak memory      {peak / GIB:8.2f} GiB, target {TARGET}: {'met' if peak < TARGET * GIB else 'NOT met'}")


if __name__ == "__main__":
    main()
