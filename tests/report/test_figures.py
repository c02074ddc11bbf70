"""Figures are pictures of page width made of the arrays given; equal arrays give equal bytes."""

import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image

from lwd_jax.evaluate.spectrum import Spectrum
from lwd_jax.report import figures, style

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (40, 60, 3), np.uint8), RNG.integers(0, 256, (50, 30, 3), np.uint8)]
STEPS = np.arange(0, 40, 2.0)
MADE = {
    "masks": lambda: figures.saliency_and_masks(
        PICTURES, [np.zeros((5, 8)), np.ones((6, 4))], [np.zeros((2, 5, 8)), np.ones((2, 6, 4))], [0.3, 0.9]
    ),
    "rows": lambda: figures.picture_rows({"a": PICTURES, "b": PICTURES}, "title", [["x", "y"], ["", "z"]]),
    "spectrum": lambda: figures.latent_spectrum({n: Spectrum(RNG.normal(size=16), np.ones(16)) for n in ("RGB", "q")}),
    "curves": lambda: figures.curves({"p": {"LWD": (STEPS, STEPS), "new": (STEPS, np.full(20, np.nan))}}, "t", "y"),
    "bins": lambda: figures.time_bins({"plain": np.array([1, np.nan, 3])}, np.linspace(0, 1, 4), "t", "y"),
    "fraction": lambda: figures.supervised_fraction({"one": np.ones(9), "two": np.zeros(9)}, np.linspace(0, 1, 9), 0.3),
}


@pytest.mark.parametrize("name", MADE)
def test_figures_are_pictures_of_page_width(name):
    image = Image.open(io.BytesIO(MADE[name]()))
    assert image.format == "PNG" and 1300 < image.width < 1500
    assert 200 < image.height < 4 * image.width
    assert np.asarray(image.convert("RGB")).std() > 3  # something is drawn


def test_no_words_stand_on_others(monkeypatch):
    """Titles, legends and notes, where the names are as long as captions are."""
    made = []
    monkeypatch.setattr(figures, "png", made.append)
    names = [f"{word} tabby cat looking into ..." for word in ("one", "another", "third")]
    falling = np.clip(1.5 - 2 * np.linspace(0, 1, 50), 0, 1)
    figures.supervised_fraction(dict.fromkeys(names, falling), np.linspace(0, 1, 50), 0.3)
    MADE["spectrum"](), MADE["curves"](), MADE["bins"]()
    for figure in made:
        figure.draw_without_rendering()
        parts = [*figure.texts, *itertools.chain(*(axes.get_children() for axes in figure.axes))]
        words = [part for part in parts if isinstance(part, Legend) or isinstance(part, Text) and part.get_text()]
        for one, other in itertools.combinations(words, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def test_equal_arrays_give_equal_bytes_and_leave_no_style_behind():
    before = dict(matplotlib.rcParams)
    assert MADE["bins"]() == MADE["bins"]()
    assert dict(matplotlib.rcParams) == before


def test_letters_that_the_font_lacks_are_drawn_without_a_word(recwarn):
    with style.style():
        drawn = style.figure(1.0)
        drawn.suptitle("\u5199\u771f")
        style.png(drawn)
    assert not recwarn.list


def test_supervised_keeps_colour_where_the_mask_is_and_fades_the_rest():
    picture = PICTURES[0]
    mask = np.zeros((5, 6))
    mask[:, 3:] = 1
    shown = figures.supervised(picture, mask)
    np.testing.assert_array_equal(shown[:, 30:], picture[:, 30:])
    faded = shown[:, :30]
    assert np.ptp(faded, axis=-1).max() == 0 and faded.min() >= 180  # grey, and light


def test_smooth_is_a_centred_mean_that_shortens_at_the_ends():
    values = RNG.normal(size=11)
    expected = [values[max(0, i - 1) : i + 2].mean() for i in range(11)]
    np.testing.assert_allclose(figures.smooth(values, 3), expected)
    np.testing.assert_allclose(figures.smooth(np.full(5, 2.0), 9), 2.0)


def test_smooth_passes_over_missing_values():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan, 7.0])
    np.testing.assert_allclose(figures.smooth(values, 3), [1, 2, 3, 3, np.nan, 7, 7])


def test_square_is_the_centre():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 200
    assert (figures.square(picture, 10) > 180).all()  # the filter reaches a little over the edge


def test_a_time_bin_without_samples_is_not_a_loss_of_nothing():
    def drawn(*values):
        return figures.time_bins({"LWD": np.array(values)}, np.linspace(0, 1, 4), "t", "y")

    assert drawn(1, np.nan, 3) != drawn(1, 0, 3)
    assert Image.open(io.BytesIO(drawn(np.nan, np.nan, np.nan))).format == "PNG"


def test_large_pictures_are_drawn_small():
    large = np.zeros((3000, 5300, 3), np.uint8)
    shown = Image.open(
        io.BytesIO(figures.saliency_and_masks([large], [np.zeros((4, 7))], [np.zeros((1, 4, 7))], [0.5]))
    )
    assert shown.width < 1500
