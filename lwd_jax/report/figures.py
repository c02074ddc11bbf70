"""The pictures of previews, `lwd inspect` and the report: arrays in, PNG bytes out.

Pictures are uint8 [H W 3]; saliency and masks are float [h w] on the latent's grid and are drawn over the picture's.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from lwd_jax.evaluate.spectrum import Spectrum
from lwd_jax.report.style import (
    AFTER,
    BEFORE,
    HEAT,
    INK,
    OTHERS,
    QUIET,
    SERIES,
    figure,
    legend,
    picture_axes,
    png,
    style,
)

LARGEST = 900  # px, of a picture in a figure: no cell is drawn larger than this


def _shrink(picture: np.ndarray, largest: int = LARGEST) -> np.ndarray:
    """A copy no longer than `largest` px."""
    height, width = picture.shape[:2]
    if max(height, width) <= largest:
        return picture
    scale = largest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))


def _onto(field: np.ndarray, picture: np.ndarray, resample=Image.Resampling.NEAREST) -> np.ndarray:
    """A latent-sized field [h w], resized to the picture's height and width."""
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(np.asarray(field, np.float32)).resize((width, height), resample))


def supervised(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture in colour where the mask supervises, faded to light grey elsewhere; uint8 [H W 3]."""
    weight = _onto(mask, picture)[..., None]
    grey = picture.astype(np.float32).mean(axis=-1, keepdims=True)
    faded = 0.22 * grey + 0.78 * 240
    return np.clip(weight * picture + (1 - weight) * faded, 0, 255).astype(np.uint8)


def wrap(text: str, width: int, lines: int = 2) -> str:
    """The text in at most `lines` lines of `width` letters, cut with an ellipsis where it is longer."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _row_height(pictures: Sequence[np.ndarray], columns: int, width: float = 10.0) -> list[float]:
    return [width / columns * p.shape[0] / p.shape[1] for p in pictures]


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 or share == 0 else 1}f} %"


def saliency_and_masks(
    pictures: Sequence[np.ndarray],
    saliency: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    times: Sequence[float],
    title: str = "What is supervised at noise level t",
) -> bytes:
    """A row per picture: the photograph, its saliency, and the supervised part at each time.

    Args:
      pictures: n of [H W 3] uint8.
      saliency: n of [h w] in [0, 1].
      masks: n of [T h w].
      times: T.
    """
    pictures = [_shrink(p) for p in pictures]
    columns = 2 + len(times)
    heights = _row_height(pictures, columns)
    with style():
        made = figure(sum(heights) + 0.22 * len(pictures) + 0.55)
        made.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
        cells = made.subplots(len(pictures), columns, squeeze=False, height_ratios=heights)
        for row, (picture, map_, mask) in enumerate(zip(pictures, saliency, masks, strict=True)):
            cells[row, 0].imshow(picture)
            cells[row, 1].imshow(np.sqrt(_onto(map_, picture)), cmap=HEAT, vmin=0, vmax=1)
            for axes, at in zip(cells[row, 2:], np.asarray(mask), strict=True):
                axes.imshow(supervised(picture, at))
                axes.set_xlabel(f"{_percent(at.mean())} supervised", fontsize=8.5, color=QUIET, labelpad=3)
        heads = ["photograph", "saliency (root scale)"] + [f"t = {t:g}" for t in times]
        for axes, head in zip(cells[0], heads, strict=True):
            axes.set_title(head, fontsize=10, weight="normal", loc="center", pad=5)
        for axes in cells.flat:
            picture_axes(axes)
        return png(made)


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """The largest centre square of a picture, side x side px."""
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS))


def picture_rows(
    rows: Mapping[str, Sequence[np.ndarray]], title: str, notes: Sequence[Sequence[str]] = (), name_rows: bool = True
) -> bytes:
    """A grid of pictures with one named row each (originals, reconstructions, arms), and a note under each cell.

    Args:
      rows: name -> pictures, the same number in each row.
      notes: a row of texts for each row of pictures, or nothing.
      name_rows: write the names beside the rows.
    """
    columns = len(next(iter(rows.values())))
    heights = [max(_row_height(pictures, columns, 9.2)) for pictures in rows.values()]
    with style():
        lines = sum(max((note.count("\n") + bool(note) for note in row), default=0) for row in notes)
        made = figure(sum(heights) + 0.17 * lines + 0.08 * len(rows) + 0.45)
        made.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
        cells = made.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for row, (name, pictures) in enumerate(rows.items()):
            for column, (axes, picture) in enumerate(zip(cells[row], pictures, strict=True)):
                axes.imshow(_shrink(picture), interpolation="nearest")
                picture_axes(axes)
                if notes:
                    axes.set_xlabel(notes[row][column], fontsize=8.5, color=QUIET, labelpad=3)
            if name_rows:
                cells[row, 0].set_ylabel(name, fontsize=10, color=INK, labelpad=7)
        return png(made)


def panels(pictures: Sequence[np.ndarray], notes: Sequence[str], title: str) -> bytes:
    """Pictures of one size [H W 3] as large as fits, two in a row (three, if they are tall), with a note under each."""
    pictures = [_shrink(p) for p in pictures]
    height, width = pictures[0].shape[:2]
    columns = 2 if width >= height else 3
    rows = -(-len(pictures) // columns)
    with style():
        made = figure(rows * (10 / columns * height / width + 0.3) + 0.4)
        made.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
        cells = made.subplots(rows, columns, squeeze=False)
        for axes in cells.flat:
            picture_axes(axes)
        for axes, picture, note in zip(cells.flat, pictures, notes):
            axes.imshow(picture)
            axes.set_xlabel(note, fontsize=9.5, color=INK, labelpad=4)
        return png(made)


def latent_spectrum(spectra: Mapping[str, Spectrum], title: str = "Latent spectrum") -> bytes:
    """Amplitude over DC by zig-zag frequency, mean +- standard deviation over channels; `RGB` is the reference."""
    colours = {"before": BEFORE, "after": AFTER, "latent": AFTER, "RGB": QUIET}
    spare = iter(OTHERS[2:])
    with style():
        made = figure(3.9)
        axes = made.subplots()
        for name, spectrum in spectra.items():
            colour = next((c for key, c in colours.items() if name.startswith(key)), None) or next(spare)
            frequency = np.arange(1, len(spectrum.mean))
            mean, std = spectrum.mean[1:], spectrum.std[1:]
            axes.fill_between(frequency, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)
            axes.plot(frequency, mean, color=colour, label=name, linestyle="--" if name.startswith("RGB") else "-")
        side = round((len(mean) + 1) ** 0.5)
        axes.set_title(title)
        axes.set_xlabel(f"DCT frequency of {side} x {side} blocks in zig-zag order, low to high")
        axes.set_ylabel("log10 amplitude / DC")
        axes.margins(x=0.01)
        legend(axes)
        return png(made)


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """A centred running mean over `span` values that shortens at both ends; NaN counts as missing."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    window = np.ones(min(span, len(values)))
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def curves(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], title: str, ylabel: str, log: bool = False
) -> bytes:
    """Curves over training steps: raw values faint, their running mean strong.

    Args:
      panels: panel title -> curve name -> (steps [n], values [n]). Arms keep their colour in every panel.
      ylabel: what the values are, with units.
      log: logarithmic ordinate.
    """
    with style():
        made = figure(3.7)
        made.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
        cells = made.subplots(1, len(panels), squeeze=False)[0]
        for axes, (head, lines) in zip(cells, panels.items()):
            for index, (name, (steps, values)) in enumerate(lines.items()):
                colour = SERIES.get(name, OTHERS[index % len(OTHERS)])
                axes.plot(steps, values, color=colour, alpha=0.18, linewidth=1.0)
                span = max(1, len(steps) // 12) * 2 + 1
                axes.plot(steps, smooth(values, span), color=colour, label=name)
            axes.set_title(head, weight="normal")
            axes.set_xlabel("training step")
            axes.margins(x=0.01)
            if log:
                axes.set_yscale("log")
        cells[0].set_ylabel(ylabel)
        legend(max(cells, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
        return png(made)


def time_bins(arms: Mapping[str, np.ndarray], edges: np.ndarray, title: str, ylabel: str) -> bytes:
    """Bars of a value per bin of the noise level t, arms side by side.

    Args:
      arms: name -> [bins]; NaN where a bin saw no sample: no bar is drawn, and it is said so.
      edges: [bins + 1] of t.
    """
    with style():
        made = figure(3.5)
        axes = made.subplots()
        bins = len(edges) - 1
        width = 0.76 / len(arms)
        for index, (name, values) in enumerate(arms.items()):
            place = np.arange(bins) + (index - (len(arms) - 1) / 2) * width
            colour = SERIES.get(name, QUIET)
            axes.bar(place, values, width * 0.92, color=colour, label=name, linewidth=0)
            for where in place[~np.isfinite(values)]:  # an absent bar alone would look like a loss of 0
                axes.text(where, 0, "no sample", rotation=90, ha="center", va="bottom", color=colour, fontsize=9)
        axes.set_xticks(np.arange(bins), [f"{a:g} - {b:g}" for a, b in zip(edges[:-1], edges[1:])])
        axes.set_xlim(-0.5, bins - 0.5)
        axes.set_xlabel("noise level t (0 = data, 1 = noise)")
        axes.set_ylabel(ylabel)
        axes.set_title(title)
        legend(axes)
        return png(made)


def supervised_fraction(curves_: Mapping[str, np.ndarray], times: np.ndarray, floor: float) -> bytes:
    """The share of positions that is supervised over t, a line per picture, and the level below which all are.

    Args:
      curves_: name -> [T] shares in [0, 1].
      times: [T].
    """
    with style():
        made = figure(3.3)
        axes = made.subplots()
        for index, (name, shares) in enumerate(curves_.items()):
            axes.plot(times, 100 * np.asarray(shares), color=OTHERS[index % len(OTHERS)], label=name)
        below = f"floor {floor:g}: everything is supervised up to here"
        axes.axvline(floor, color=QUIET, linestyle="--", linewidth=1.1, label=below)
        axes.set_title("Supervised positions over the noise level")
        axes.set_xlabel("noise level t (0 = data, 1 = noise)")
        axes.set_ylabel("supervised, %")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 104)
        axes.legend(loc="best")  # the names are captions, too long for the title's line
        return png(made)
