"""One look for every picture of a report: palette, type, and the way from a matplotlib figure to PNG bytes.

Matplotlib is imported where a figure is made: it takes a second, and few commands draw.
"""

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2933"
QUIET = "#7b8794"  # secondary text, references
RULE = "#d9dee4"  # axes and grid
PAPER = "#ffffff"
LWD = "#0f6b8f"
PLAIN = "#d1703c"
BEFORE = PLAIN
AFTER = LWD
HEAT = "magma"  # saliency and error: dark = none, bright = much
SERIES = {"LWD": LWD, "plain": PLAIN, "after": AFTER, "before": BEFORE}  # series that keep their colour everywhere
OTHERS = ("#0f6b8f", "#d1703c", "#6b8e4e", "#8a5a9e", "#b5892e", "#4a5568")  # series without a fixed meaning

WIDTH = 10.0  # inches, of every picture
DPI = 140

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#eceff2",
    "grid.linewidth": 0.9,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "text.parse_math": False,  # names of files may have dollars in them
    "legend.fontsize": 9.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def style():
    """The context in which figures are made; it leaves the caller's matplotlib as it was."""
    import matplotlib

    return matplotlib.rc_context(RC)


def figure(height: float) -> "Figure":
    """An empty figure of page width; no pyplot, so nothing is kept alive and no window system is asked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    return made


def png(made: "Figure") -> bytes:
    """The picture as PNG bytes, without a date, so that equal figures are equal bytes."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name of a file in letters that the font lacks is drawn as boxes: it is whole in what is printed.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        made.savefig(out, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    return out.getvalue()


def picture_axes(axes) -> None:
    """Turns axes into a frame for a picture: no ticks, no grid, no border."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def legend(axes) -> None:
    """The legend on the title's line, right, where no curve can run under it."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, handlelength=1.4, columnspacing=1.4, borderpad=0.1
    )
