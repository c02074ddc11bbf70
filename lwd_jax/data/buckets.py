"""Aspect buckets: the few sizes that pictures are trained at.

Pictures are scaled by one factor and cropped, never squeezed.
"""

import numpy as np

from lwd_jax.errors import UserError

# Width over height. A fixed list, so that the number of programs to compile does not grow with the resolution.
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)


def multiple(resolution: int) -> int:
    """What the sides of a bucket divide by, px: 64, or 32 below 512 px.

    32 = 8 (autoencoder) x 4 (the largest pooling of stage 1's scale consistency).
    """
    return 64 if resolution >= 512 else 32


def check_resolution(resolution: int, keep_aspect: bool) -> None:
    """Raises UserError if a resolution does not divide: by `multiple` with buckets, by 16 for squares."""
    divisor = multiple(resolution) if keep_aspect else 16
    if resolution < divisor or resolution % divisor:
        kind = "aspect buckets" if keep_aspect else "squares"
        raise UserError(f"A resolution of {resolution} px does not divide by {divisor}, as {kind} of that size must.")


def sizes(resolution: int, keep_aspect: bool) -> list[tuple[int, int]]:
    """The (height, width) of all buckets, px, of about resolution^2 area, from tall to wide; or the one square."""
    check_resolution(resolution, keep_aspect)
    if not keep_aspect:
        return [(resolution, resolution)]
    unit = multiple(resolution)
    found = []
    for aspect in ASPECTS:
        sides = (resolution / aspect**0.5, resolution * aspect**0.5)
        size = tuple(max(unit, unit * round(side / unit)) for side in sides)
        if size not in found:
            found.append(size)
    return found


def assign(
    heights, widths, resolution: int, keep_aspect: bool, minimum: int = 1
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The bucket of each picture: the nearest in log aspect.

    Args:
      heights, widths: [N] px.
      minimum: buckets of fewer pictures are dissolved into their nearest neighbour, smallest first, so that a few odd
        pictures do not fill whole batches again and again.

    Returns:
      bucket_of [N] int, numbers into the second value; the sizes (height, width) of all buckets.
    """
    table = sizes(resolution, keep_aspect)
    aspects = np.log([width / height for height, width in table])
    wanted = np.log(np.asarray(widths, np.float64) / np.asarray(heights, np.float64))
    bucket_of = np.argmin(np.abs(wanted[:, None] - aspects[None]), axis=1)
    counts = np.bincount(bucket_of, minlength=len(table))
    while np.count_nonzero(counts) > 1 and counts[counts > 0].min() < minimum:
        small = int(np.argmin(np.where(counts > 0, counts, counts.max() + 1)))
        others = np.flatnonzero(counts * (np.arange(len(table)) != small))
        nearest = others[np.argmin(np.abs(aspects[others] - aspects[small]))]
        bucket_of[bucket_of == small] = nearest
        counts[nearest] += counts[small]
        counts[small] = 0
    return bucket_of, table


def magnification(height: int, width: int, size: tuple[int, int]) -> float:
    """The scale at which a picture just covers a bucket; above 1 it is enlarged."""
    return max(size[0] / height, size[1] / width)
