"""Picture files in, 8-bit sRGB pixels out.

`standardise` is for `lwd prepare`: it checks a file and brings it to the one form that datasets hold. `decode` is for
training: it scales and crops a standard picture to its bucket. `from_uint8` makes of pixels what models see.
"""

import hashlib
import io
import struct
import threading
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    ]
)
PIXEL_LIMIT = 200_000_000  # larger pictures are refused as bombs; a 150-megapixel camera still passes
SMALLEST_SIDE = 16  # px

# What Pillow raises on files that are not what they claim to be.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ORIENTATION = 0x0112  # EXIF tag
_OPENING = threading.Lock()  # Pillow's limit and Python's warnings are the process's


class Rejected(Exception):
    """A picture that does not enter a dataset; the message is the reason."""


class Standard(NamedTuple):
    """A picture as datasets hold it: an upright, opaque, 8-bit RGB picture in sRGB, encoded as JPEG or PNG."""

    data: bytes
    height: int
    width: int
    pixels: str  # SHA-256 of size and pixels: equal for one picture in two files
    reencoded: bool  # False: `data` is the file as it was


def standardise(data: bytes) -> Standard:
    """The standard form of a picture file: the file itself if it has it already, else a PNG (lossless).

    EXIF orientation is applied, colour profiles are converted to sRGB, transparency is laid on white, 16-bit grey is
    scaled to 8 bit, of several frames the first is taken.

    Raises:
      Rejected: a file that cannot be read, is too small, too large (a bomb), or holds floating-point pixels.
    """
    try:
        image = _open(data)
        if min(image.size) < SMALLEST_SIDE:
            raise Rejected(f"too small ({image.width} x {image.height} px)")
        image.load()
        keep = _is_standard(image)
        rgb = image if keep else _to_rgb(image)
    except BOMBS as bomb:
        raise Rejected(f"a picture bomb: more than {PIXEL_LIMIT // 10**6} megapixels") from bomb
    except UNREADABLE as error:
        reason = " ".join(str(error).replace(repr(io.BytesIO), "").split()) or type(error).__name__
        raise Rejected(f"cannot be read: {reason.split('<')[0].strip()}") from error
    if not keep:
        stream = io.BytesIO()
        rgb.save(stream, "PNG")
        data = stream.getvalue()
    pixels = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    return Standard(data, rgb.height, rgb.width, pixels, not keep)


def _open(data: bytes) -> Image.Image:
    # Pillow has no limit per call, and only warns below twice its limit. It looks when it opens, not when it decodes.
    with _OPENING, warnings.catch_warnings():
        usual = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _is_standard(image: Image.Image) -> bool:
    return (
        image.format in ("JPEG", "MPO", "PNG")
        and image.mode == "RGB"
        and "transparency" not in image.info
        and image.getexif().get(_ORIENTATION, 1) == 1
        and _foreign_profile(image) is None
    )


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The picture's colour profile if it has a readable one that is not sRGB."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = ImageCms.getProfileDescription(profile)
    except (OSError, ImageCms.PyCMSError):
        return None  # nothing can be converted; the pixels are taken as sRGB
    return None if "srgb" in name.lower() else profile


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = _foreign_profile(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise Rejected("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("P", "PA", "1") or "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=alpha)
        image = white
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Rejected("pixels of more than 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    if profile is not None:
        try:
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError:
            pass  # a profile of other channels than the picture's: the pixels are taken as sRGB
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A standard picture scaled by one factor until it just covers `size`, and cropped to it.

    The filter is Pillow's Lanczos on sRGB values (not linear light), as diffusion models are trained with. A JPEG at
    least four times too large is first reduced by powers of two in the DCT domain, to no less than twice the size, for
    speed.

    Args:
      data: the encoded picture.
      size: (height, width), px.
      place: (vertical, horizontal) position of the crop in [0, 1]; 0.5 = centre.

    Returns:
      [height width 3] uint8.
    """
    height, width = size
    image = _open(data)
    scale = max(height / image.height, width / image.width)
    extent = image.size  # in pixels of the (reduced) picture, not rounded
    if scale <= 0.25:
        drafted = image.draft("RGB", (int(2 * scale * image.width) + 1, int(2 * scale * image.height) + 1))
        extent = drafted[1][2:] if drafted else image.size
    scale = max(height / extent[1], width / extent[0])
    spare = (extent[1] - height / scale, extent[0] - width / scale)
    top, left = (max(0.0, space * at) for space, at in zip(spare, place))
    right, bottom = min(left + width / scale, image.width), min(top + height / scale, image.height)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))


def from_uint8(pixels):
    """Pixels as models take them; sample.generate.to_uint8 is its inverse.

    Args:
      pixels: uint8 array of any shape, [B H W 3] as a rule: of NumPy, or of JAX and then inside a jitted function too.

    Returns:
      The same kind of array, float32, of the same shape: 0 is -1, 255 is 1.
    """
    return pixels.astype(np.float32) / 127.5 - 1
