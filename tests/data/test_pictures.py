"""Laws of pictures: the standard form, isotropic scaling, and what is refused."""

import io
import sys
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

from lwd_jax.data import pictures
from lwd_jax.data.pictures import Rejected, decode, from_uint8, standardise
from lwd_jax.sample.generate import to_uint8


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_standard_pictures_keep_their_bytes(kind):
    data = encoded(Image.fromarray(noise(31, 47)), kind)
    standard = standardise(data)
    assert standard.data == data and not standard.reencoded
    assert (standard.height, standard.width) == (31, 47)


def test_lossless_reencoding_of_other_formats():
    values = noise(33, 20)
    for kind in ("BMP", "TIFF"):
        standard = standardise(encoded(Image.fromarray(values), kind))
        assert standard.reencoded and (pixels(standard.data) == values).all()
    assert standard.pixels == standardise(encoded(Image.fromarray(values), "PNG")).pixels


def test_the_same_bytes_in_another_shape_are_another_picture():
    values = noise(20, 30)
    wide, tall = (standardise(encoded(Image.fromarray(each))) for each in (values, values.reshape(30, 20, 3)))
    assert wide.pixels != tall.pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    values = noise(24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    standard = standardise(encoded(Image.fromarray(values), "PNG", exif=exif))
    # What a viewer shows, written out by the EXIF 2.3 definition (row 0, column 0 at: ...).
    turned = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(values, 1),
    }[orientation]
    assert (standard.height, standard.width) == turned.shape[:2]
    assert (pixels(standard.data) == turned).all()
    assert standard.reencoded == (orientation != 1)


def test_transparency_is_laid_on_white():
    values = noise(20, 20, 4)
    expected = values[..., :3] * (values[..., 3:] / 255) + 255 * (1 - values[..., 3:] / 255)
    got = pixels(standardise(encoded(Image.fromarray(values, "RGBA"))).data)
    assert np.abs(got - expected).max() <= 1
    grey = noise(20, 20, 2)
    got = pixels(standardise(encoded(Image.fromarray(grey, "LA"))).data)
    expected = grey[..., :1] * (grey[..., 1:] / 255) + 255 * (1 - grey[..., 1:] / 255)
    assert np.abs(got - expected).max() <= 1


def test_transparent_colour_of_palette_and_rgb_pictures():
    image = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 200).reshape(20, 20), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    got = pixels(standardise(encoded(image, transparency=0)).data)
    assert (got[:10] == 255).all() and (got[10:] == (40, 50, 60)).all()
    rgb = Image.new("RGB", (20, 20), (1, 2, 3))
    assert (pixels(standardise(encoded(rgb, transparency=(1, 2, 3))).data) == 255).all()


def test_grey_of_eight_and_sixteen_bits():
    values = noise(17, 23, 1)
    assert (pixels(standardise(encoded(Image.fromarray(values), "JPEG", quality=100)).data).std(-1) == 0).all()
    deep = np.random.default_rng(1).integers(0, 65536, (17, 23)).astype(np.uint16)
    got = pixels(standardise(encoded(Image.fromarray(deep))).data)
    assert (got == np.round(deep / 257)[..., None]).all()


def test_colour_profiles_become_srgb():
    # A profile whose red and blue primaries trade places, made by littleCMS of sRGB's own bytes.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = noise(20, 24)
    kept = standardise(encoded(Image.fromarray(values), "PNG", icc_profile=srgb))
    assert not kept.reencoded
    swapped = bytearray(srgb.replace(b"s\0R\0G\0B", b"o\0t\0h\0e").replace(b"sRGB", b"othe"))
    tags = {bytes(swapped[at : at + 4]): at for at in range(132, 132 + 12 * 20, 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    swapped[red + 4 : red + 12], swapped[blue + 4 : blue + 12] = (
        swapped[blue + 4 : blue + 12],
        swapped[red + 4 : red + 12],
    )
    standard = standardise(encoded(Image.fromarray(values), "PNG", icc_profile=bytes(swapped)))
    assert standard.reencoded
    assert np.abs(pixels(standard.data).astype(int) - values[..., ::-1]).max() <= 2


def test_cmyk_becomes_rgb():
    standard = standardise(encoded(Image.new("CMYK", (20, 30), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels(standard.data).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"not a picture", "cannot be read"),
        (encoded(Image.fromarray(noise(64, 64)))[:3000], "cannot be read"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:900], "cannot be read"),
        (encoded(Image.fromarray(noise(15, 64))), "too small"),
        (encoded(Image.fromarray(np.zeros((32, 32), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_rejected_with_a_reason(data, reason):
    with pytest.raises(Rejected, match=reason) as caught:
        standardise(data)
    assert "0x" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [15_000, 40_000])  # between Pillow's limit and twice it, and beyond
def test_bombs_are_rejected_before_they_are_decoded(side, monkeypatch):
    png = bytearray(encoded(Image.new("RGB", (64, 64))))
    png[16:24] = side.to_bytes(4, "big") * 2  # the header claims another size
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Rejected, match="bomb"):
        standardise(bytes(png))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(300, 500), (2000, 1203), (97, 61)])  # the second is reduced while it is read
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_scaling_is_isotropic(kind, shape, size):
    """A drawn circle stays a circle: its extents down and across agree."""
    height, width = shape
    image = Image.new("RGB", (width, height))
    # The crop keeps the centre; the circle fits in what is left of the shorter side.
    radius = 0.35 * min(size) / max(size[0] / height, size[1] / width)
    box = [width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius]
    ImageDraw.Draw(image).ellipse(box, fill=(255, 255, 255))
    got = decode(encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {})), size)
    assert got.shape == (*size, 3) and got.dtype == np.uint8
    bright = got[..., 1] / 255
    down, across = bright[:, size[1] // 2].sum(), bright[size[0] // 2].sum()
    assert abs(down - across) < 0.02 * across + 0.5
    rows, columns = np.mgrid[: size[0], : size[1]]
    assert abs((rows * bright).sum() / bright.sum() - (size[0] - 1) / 2) < 0.3
    assert abs((columns * bright).sum() / bright.sum() - (size[1] - 1) / 2) < 0.3


def test_crop_places_move_over_the_whole_spare_length():
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    data = encoded(Image.fromarray(ramp))
    left, middle, right = (decode(data, (64, 64), (0.5, place)) for place in (0.0, 0.5, 1.0))
    assert (left == ramp[:, :64]).all() and (middle == ramp[:, 96:160]).all() and (right == ramp[:, 192:]).all()


def test_dct_reduction_agrees_with_full_decoding():
    y, x = np.mgrid[:1600, :2404]
    smooth = np.stack([127 + 100 * np.sin(x / 90), 127 + 100 * np.cos(y / 70), 127 + 90 * np.sin((x + y) / 110)], -1)
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=98)
    fast = decode(data, (96, 160)).astype(int)
    slow = decode(encoded(Image.open(io.BytesIO(data)).convert("RGB")), (96, 160)).astype(int)
    assert np.abs(fast - slow).mean() < 1.0 and np.abs(fast - slow).max() < 12


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_scaling_is_lanczos_of_the_whole_picture(place):
    """Up to the finest detail that the size can hold; the sides do not divide by what the DCT reduces them by."""
    waves = np.fft.rfft2(np.random.default_rng(0).standard_normal((401, 603)))
    waves *= (np.abs(np.fft.fftfreq(401))[:, None] < 32 / 401) & (np.fft.rfftfreq(603) < 32 / 401)
    values = np.fft.irfft2(waves, (401, 603))
    detail = np.clip(127 + 40 * values / values.std(), 0, 255).astype(np.uint8)
    data = encoded(Image.fromarray(detail).convert("RGB"), "JPEG", quality=98)
    left = 202 * place
    whole = Image.fromarray(pixels(data)).resize((64, 64), Image.Resampling.LANCZOS, box=(left, 0, left + 401, 401))
    error = decode(data, (64, 64), (place, place)) - np.asarray(whole, np.float64)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 45  # dB


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules


def test_the_limit_is_not_left_behind(monkeypatch):
    usual = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(pictures, "PIXEL_LIMIT", 1000)
    with pytest.raises(pictures.Rejected, match="bomb"):
        pictures.standardise(encoded(Image.new("RGB", (64, 64))))
    assert Image.MAX_IMAGE_PIXELS == usual


def test_pixels_as_models_take_them():
    """Black is -1, white is 1; NumPy and XLA agree, and each of the 256 values comes back."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    host, device = from_uint8(values), jax.jit(from_uint8)(values)
    assert host.dtype == device.dtype == np.float32 and isinstance(host, np.ndarray)
    assert (host.min(), host.max()) == (-1, 1) and abs(host.mean(dtype=np.float64)) < 1e-7
    np.testing.assert_allclose(host, device, rtol=0, atol=2e-7)
    np.testing.assert_array_equal(to_uint8(host), values)


def test_lab_has_no_transparency():
    """Its channel is called A."""
    grey = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (90, 90, 90)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    np.testing.assert_allclose(np.asarray(pictures._to_rgb(grey)), 90, atol=2)
