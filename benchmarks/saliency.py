"""How fast is the saliency map with its mask, against the same map through jaxwt, PyWavelets and torch?

All get the same latents in the same run, one after the other in turn, and must agree before anything is printed.

    python benchmarks/saliency.py
    python benchmarks/saliency.py --sizes 64 512 --batch 1 --repeats 50
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import jaxwt
import numpy as np
import pywt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.saliency import wavelet_saliency

FLOOR, EPS = 0.3, 1e-8


@jax.jit
def ours(z, t):
    saliency = wavelet_saliency(z)
    return saliency, supervision_mask(saliency, t, FLOOR)


@jax.jit
def with_jaxwt(z, t):
    """The same map as one writes it with jaxwt and jax.image, jit-compiled."""
    _, details = jaxwt.wavedec2(jnp.moveaxis(z, 3, 1), "haar", level=1)
    energy = sum(jnp.mean(band**2, axis=1) for band in details)[..., None]
    energy = jax.image.resize(energy, (*z.shape[:3], 1), "linear", antialias=False)
    low, high = energy.min((1, 2), keepdims=True), energy.max((1, 2), keepdims=True)
    saliency = (energy - low) / (high - low + EPS)
    return saliency, (saliency + FLOOR >= t[:, None, None, None]).astype(jnp.float32)


@torch.no_grad()
def with_torch(z, t):
    """Four strided views and F.interpolate, on a channels-first latent as torch code has it."""
    a, b, c, d = (z[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    lh, hl, hh = (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2
    energy = (lh**2 + hl**2 + hh**2).mean(1, keepdim=True)
    energy = torch.nn.functional.interpolate(energy, size=z.shape[2:], mode="bilinear", align_corners=False)
    low, high = energy.amin((2, 3), keepdim=True), energy.amax((2, 3), keepdim=True)
    saliency = (energy - low) / (high - low + EPS)
    return saliency, (saliency + FLOOR >= t[:, None, None, None]).float()


@torch.no_grad()
def with_pywavelets(z, t):
    """The transform by PyWavelets, the rest by numpy and torch."""
    _, details = pywt.dwt2(z, "haar", mode="symmetric", axes=(1, 2))
    energy = torch.from_numpy(sum(np.mean(band**2, axis=3) for band in details))[:, None]
    energy = torch.nn.functional.interpolate(energy, size=z.shape[1:3], mode="bilinear", align_corners=False)
    energy = energy.numpy()[:, 0, :, :, None]
    low, high = energy.min((1, 2), keepdims=True), energy.max((1, 2), keepdims=True)
    saliency = (energy - low) / (high - low + EPS)
    return saliency, (saliency + FLOOR >= t[:, None, None, None]).astype(np.float32)


def contenders(z: np.ndarray, t: np.ndarray) -> dict:
    """name -> (run, to an NHWC numpy array)."""
    on_jax = jnp.asarray(z), jnp.asarray(t)
    on_torch = torch.from_numpy(z).movedim(3, 1).contiguous(), torch.from_numpy(t)
    return {
        "lwd_jax": (lambda: jax.block_until_ready(ours(*on_jax)), np.asarray),
        "jaxwt": (lambda: jax.block_until_ready(with_jaxwt(*on_jax)), np.asarray),
        "torch": (lambda: with_torch(*on_torch), lambda x: x.movedim(1, 3).numpy()),
        "PyWavelets": (lambda: with_pywavelets(z, t), np.asarray),
    }


def check(results: dict) -> dict[str, float]:
    """Largest difference of each map from ours; raises if they are not the same map, or masks differ off the step."""
    saliency, mask = results["lwd_jax"]
    differences = {}
    for name, (other, other_mask) in results.items():
        differences[name] = float(np.abs(other - saliency).max())
        differing = float(np.mean(other_mask != mask))
        if differences[name] > 1e-5 or differing > 1e-4:
            raise SystemExit(f"{name} gives another map: off by {differences[name]:.1e}, {differing:.1e} of the mask.")
    return differences


def measure(size: int, args) -> Table:
    random = np.random.default_rng(0)
    z = random.normal(size=(args.batch, size, size, args.channels)).astype(np.float32)
    t = random.uniform(0.3, 1, args.batch).astype(np.float32)
    runs = contenders(z, t)
    differences = check({name: tuple(map(to_numpy, run())) for name, (run, to_numpy) in runs.items()})
    seconds = {name: [] for name in runs}
    for _ in track(range(args.repeats), f"{size} x {size}", transient=True):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    table = Table(title=f"saliency + mask, latents {args.batch} x {size} x {size} x {args.channels}, float32")
    for column in ("", "median ms", "fastest ms", "GB/s read", "time against lwd_jax", "largest difference"):
        table.add_column(column, justify="left" if not column else "right")
    fastest_ours = min(seconds["lwd_jax"])
    for name, times in seconds.items():
        fastest = min(times)  # other programs of the machine only ever add to it
        table.add_row(
            name, f"{statistics.median(times) * 1e3:.2f}", f"{fastest * 1e3:.2f}", f"{z.nbytes / fastest / 1e9:.1f}",
            f"{fastest / fastest_ours:.1f} x", f"{differences[name]:.0e}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="latent sides; 128 is 1024 px at f8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    console = Console()
    console.print(f"jax {jax.__version__} on {jax.devices()[0]}, torch {torch.__version__} on cpu")
    for size in args.sizes:
        console.print(measure(size, args))


if __name__ == "__main__":
    main()
