"""Latents as rows of tokens, each of which is a square of positions."""


def patchify(z, size: int, *, channels_first: bool = False):
    """[B h w C] -> ([B h/size w/size (size size C)] as a row of tokens, (h/size, w/size)).

    Args:
      z: a latent.
      size: positions along each side of a token.
      channels_first: a token's numbers are ordered (C size size), as FLUX's are.

    Raises:
      ValueError: h or w does not divide.
    """
    batch, h, w, channels = z.shape
    if h % size or w % size:
        raise ValueError(f"A latent of {h} x {w} does not divide into patches of {size} x {size}.")
    z = z.reshape(batch, h // size, size, w // size, size, channels)
    z = z.transpose((0, 1, 3, 5, 2, 4) if channels_first else (0, 1, 3, 2, 4, 5))
    return z.reshape(batch, (h // size) * (w // size), -1), (h // size, w // size)


def unpatchify(tokens, height: int, width: int, size: int, *, channels_first: bool = False):
    """The inverse of `patchify` for a grid of height x width tokens."""
    batch = tokens.shape[0]
    inside = (-1, size, size) if channels_first else (size, size, -1)
    z = tokens.reshape(batch, height, width, *inside)
    z = z.transpose((0, 1, 4, 2, 5, 3) if channels_first else (0, 1, 3, 2, 4, 5))
    return z.reshape(batch, height * size, width * size, -1)
