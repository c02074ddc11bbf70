"""The times at which a flow is evaluated, from noise (1) to data (0)."""

from typing import Any

import numpy as np

from lwd_jax.config import Sampling
from lwd_jax.errors import UserError
from lwd_jax.objective.paths import SHIFT_RULES

TRAIN_TIMES = 1000  # the grid that diffusers' schedulers derive their end points from


def _shift(s, shift):
    return shift * s / (1 + (shift - 1) * s)


def _check(steps: int, shift: float) -> None:
    if steps < 1:
        raise UserError(f"Sampling needs at least 1 step, but {steps} was given.")
    if not shift > 0:
        raise UserError(f"The shift must be positive, but it is {shift}.")


def sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels of diffusers' FlowMatchEulerDiscreteScheduler (and of its Heun sibling before it doubles them).

    The static shift s' = k s / (1 + (k - 1) s) (SD3, arXiv 2403.03206, equation 23) enters twice: the smallest level of
    the training grid, 1/1000, is shifted first and ends a linear grid, and that whole grid is shifted again. Released
    SD3 weights are sampled so; the precisions (float32, then float64, then float32) are kept too, to agree to the bit.

    Args:
      steps: solver steps, at least 1.
      shift: k > 0; 3.0 for SD3.

    Returns:
      [steps + 1] float32, falling, first 1, last 0.

    Raises:
      UserError: no steps, or a shift that is not positive.
    """
    _check(steps, shift)
    ends = np.asarray([1, 1 / TRAIN_TIMES], np.float32)
    high, low = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    grid = np.linspace(float(high) * TRAIN_TIMES, float(low) * TRAIN_TIMES, steps) / TRAIN_TIMES
    return np.append(_shift(grid, shift), 0).astype(np.float32)


def flux_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels of diffusers' FluxPipeline: a linear grid from 1 to 1 / steps, shifted once.

    Args, Returns, Raises: as `sigmas`; the shift is exp(mu) where it is dynamic.
    """
    _check(steps, shift)
    return np.append(_shift(np.linspace(1, 1 / steps, steps).astype(np.float32), shift), 0).astype(np.float32)


GRIDS = {"sd3": sigmas, "flux": flux_sigmas}  # what the backbones' Config.noise_levels name


def noise_levels(sampling: Sampling, sizes: Any, height: int, width: int) -> np.ndarray:
    """[steps + 1] noise levels that a picture is sampled at, as the pipeline of its backbone does it.

    Args:
      sampling: steps, shift_rule and shift.
      sizes: Config of the backbone.
      height, width: of the latent; a dynamic shift depends on it.

    Raises:
      UserError: a dynamic shift for a backbone that is not FLUX.
    """
    if sampling.shift_rule == "dynamic" and sizes.noise_levels != "flux":
        raise UserError("sampling.shift_rule 'dynamic' is FLUX's; this backbone is sampled with 'static'.")
    tokens = height * width // sizes.patch_size**2
    return GRIDS[sizes.noise_levels](sampling.steps, SHIFT_RULES[sampling.shift_rule](sampling, tokens))
