"""The quickstart's report: what the parts left in its workdir, as one page."""

import dataclasses
import json
import math
import os
import resource
import shlex
import sys

import jax
import numpy as np
from etils.epath import Path
from PIL import Image

from lwd_jax.adapters.peft import FILE as ADAPTER_FILE
from lwd_jax.config import Config
from lwd_jax.data.batches import held_out
from lwd_jax.data.latents import open_latents
from lwd_jax.errors import read_json
from lwd_jax.evaluate.fidelity import psnr, ssim
from lwd_jax.evaluate.spectrum import block_mean, high_frequency_share
from lwd_jax.report import figures
from lwd_jax.report.card import code_with_adapters
from lwd_jax.report.page import Code, Picture, Section, Table, Text, write_page
from lwd_jax.report.photographs import SHIPPED, Photograph
from lwd_jax.report.pipeline import FLUX, MANIFEST, open_models
from lwd_jax.report.previews import (
    SHOWN,
    TIMES,
    make_encode,
    make_reconstruct,
    masks_over_time,
    scale_error,
    short,
    spectra,
)
from lwd_jax.report.samples import INDEX as SAMPLES_INDEX
from lwd_jax.train import metrics
from lwd_jax.train.checkpoint import read_config
from lwd_jax.train.models import BACKBONE
from lwd_jax.weights.folder import header

SIDE = 128  # px of the squares that are trained on
CROPS = 160  # squares in all, about
TIMES_FILE = "times.json"
SHOWN_SIDE = 448  # px, of the photographs whose saliency is shown: finer than the squares, for the eye
ARMS = ("plain", "LWD")
ADAPTED = ("base", "LoRA", "read back")


@dataclasses.dataclass(frozen=True)
class Run:
    """The folders of one quickstart."""

    workdir: Path

    crops = property(lambda self: self.workdir / "squares")
    dataset = property(lambda self: self.workdir / "dataset")
    before = property(lambda self: self.workdir / "autoencoder_before")
    after = property(lambda self: self.workdir / "autoencoder_after")
    latents = property(lambda self: self.workdir / "latents")
    base = property(lambda self: self.workdir / "backbone_base")
    plain = property(lambda self: self.workdir / "backbone_plain")
    lwd = property(lambda self: self.workdir / "backbone_lwd")
    export = property(lambda self: self.workdir / "export")
    lora = property(lambda self: self.workdir / "backbone_lora")
    base_export = property(lambda self: self.workdir / "export_base")
    lora_export = property(lambda self: self.workdir / "export_lora")
    back = property(lambda self: self.workdir / "backbone_lora_back")

    def arms(self) -> dict[str, Path]:
        """Arm -> workdir."""
        return dict(zip(ARMS, (self.plain, self.lwd)))

    def samples(self) -> dict[str, Path]:
        """Arm -> folder of samples."""
        return {arm: self.workdir / f"samples_{arm.lower()}" for arm in ARMS}

    def adapted(self) -> dict[str, Path]:
        """What the round trip of a LoRA compares -> models: the base alone, the run of the LoRA, the file read back."""
        return dict(zip(ADAPTED, (self.base_export, self.lora, self.back)))

    def adapted_samples(self) -> dict[str, Path]:
        """The same -> folder of samples."""
        return {name: self.workdir / f"samples_{name.lower().replace(' ', '_')}" for name in ADAPTED}


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"


def _lines(workdir: Path, *names: str) -> tuple[np.ndarray, ...]:
    """(steps, values of each name) of the lines of metrics.jsonl that have them all."""
    rows = [line for line in metrics.read(workdir) if all(line.get(name) is not None for name in names)]
    return tuple(np.array([line[name] for line in rows], float) for name in ("step", *names))


# ------------------------------------------------------------------------------------------------------ sections


def _what(photographs: list[Photograph], run: Run, config: Config, fast: bool) -> Section:
    words = open_latents(run.latents).metadata["text"]["length"] - 1  # the first token marks the beginning
    cut = sum(len(photograph.caption.split()) > words for photograph in photographs)
    family = "FLUX" if config.models.backbone_variant.startswith("flux") else "SD3"
    scale_of_it = (
        f"Everything here was made on this machine from {len(photographs)} photographs, with a small autoencoder and "
        f"a small {family} backbone that began as random numbers and saw pictures of {config.resolution} x "
        f"{config.resolution} px."
    )
    can = (
        "What it can show: that every part runs and fits the next; what saliency and mask are on real photographs; "
        "that scale-consistent fine-tuning lowers the error of decoding pooled latents; that both arms start equal, "
        "see the same batches, and what they learn in detail-rich and smooth regions, measured alike."
    )
    cannot = (
        "What it cannot show: how well the method works. A model that has seen a few photographs for a few minutes "
        "repeats them and does not generalise; the held-out squares are other views of the same photographs and "
        "overlap with those trained on; one seed of a short run says nothing about which arm is better at 2048 px; "
        "and the text encoder tells words apart without knowing their meaning, and reads the first "
        f"{words} words of a caption ({cut} of the {len(photographs)} captions are longer). For that, start from "
        f"{family}'s weights with the configs of full size."
    )
    blocks = [Text(scale_of_it), Text(can), Text(cannot, note=True)]
    if fast:
        shortened = (
            "This is a run with --fast: each part trained for a few steps only. It shows that the parts run; nothing "
            "was learnt, and no figure below means anything else."
        )
        blocks.insert(0, Text(shortened, note=True))
    return Section("What this is", blocks)


def _photographs(photographs: list[Photograph]) -> Section:
    shown = photographs[:8]
    per_row = min(4, len(shown))
    squares = [figures.square(photograph.load(), 320) for photograph in shown]
    squares += [np.full_like(squares[0], 255)] * (-len(squares) % per_row)
    captions = [figures.wrap(photograph.caption, 32) for photograph in shown] + [""] * (len(squares) - len(shown))
    rows = {f"row {i}": squares[i : i + per_row] for i in range(0, len(squares), per_row)}
    notes = [captions[i : i + per_row] for i in range(0, len(captions), per_row)]
    png = figures.picture_rows(rows, "Photographs and captions", notes, name_rows=False)
    stems = {Path(row.file).stem: row for row in SHIPPED}
    credit = "; ".join(f"{p.name}: {stems[p.name].credit}" for p in shown if p.name in stems)
    caption = "The centres of the photographs. Training sees squares cut from them at several places and sizes."
    return Section("Photographs", [Picture("photographs", png, f"{caption} {credit}".strip())])


def _saliency(photographs: list[Photograph], run: Run, config: Config) -> Section:
    module, params = open_models(run.after).autoencoder()
    shown = np.stack([figures.square(photograph.load(), SHOWN_SIDE) for photograph in photographs[:3]])
    latents = make_encode(module)(params, shown)
    masks = figures.saliency_and_masks(shown, *masks_over_time(latents, config.matching, TIMES), TIMES)
    times = np.linspace(0, 1, 101)
    shares = masks_over_time(latents, config.matching, times)[1].mean(axis=(2, 3))
    shares = {short(photograph.caption, 26): share for photograph, share in zip(photographs, shares)}
    fraction = figures.supervised_fraction(shares, times, config.matching.floor)
    about = (
        "Saliency is the energy of the latent's detail sub-bands (one Haar level, all channels), scaled to [0, 1]. "
        f"At noise level t the loss counts where saliency + {config.matching.floor:g} >= t: early, noisy steps are "
        "left to the most detailed places, and up to the floor everything is supervised."
    )
    return Section(
        "Saliency and mask",
        [
            Text(about),
            Picture(
                "saliency_and_masks",
                masks,
                "Photographs, the saliency of their latents, and in colour what is supervised.",
            ),
            Picture("supervised_fraction", fraction, "How much is supervised, over the noise level."),
        ],
    )


def _stage1_figures(run: Run, pictures: np.ndarray, scales: tuple[int, ...]) -> dict[str, dict]:
    opened = {
        name: open_models(workdir).autoencoder() for name, workdir in (("before", run.before), ("after", run.after))
    }
    module = opened["after"][0]
    reconstruct = make_reconstruct(module, scales)
    return {
        name: reconstruct(params, pictures) | {"factor": module.config.factor} for name, (_, params) in opened.items()
    }


def _stage1_table(pictures: np.ndarray, made: dict[str, dict]) -> Table:
    def row(what, of, digits=3):
        return [what, *(_number(of(made[name]), digits) for name in ("before", "after"))]

    rows = [
        row("PSNR of D(E(x)), dB", lambda m: psnr(pictures, m["picture"]).mean()),
        row("SSIM of D(E(x))", lambda m: ssim(pictures, m["picture"]).mean()),
    ]
    for s in made["before"]["pooled"]:
        rows.append(row(f"|D(pool_{s}(z)) - pool_{s}(x)|^2", lambda m, s=s: scale_error(pictures, m["pooled"])[s]))
    rows.append(row("high-frequency share of the latent", lambda m: high_frequency_share(m["mean"]).mean()))
    caption = f"Means over {len(pictures)} held-out squares, averaged weights; squared errors of pictures in [-1, 1]."
    return Table(["", "before", "after"], rows, caption)


def _stage1(run: Run) -> Section:
    config = read_config(run.after)
    pictures, scales = held_out(config)["picture"], config.reconstruction.scales
    made = _stage1_figures(run, pictures, scales)
    shown, (low, *_), n = pictures[:SHOWN], scales, SHOWN
    rows = {"photograph": shown, "before": made["before"]["picture"][:n], "after": made["after"]["picture"][:n]}
    notes = [[""] * len(shown)]
    notes += [
        [f"{value:.1f} dB" for value in psnr(pictures, made[name]["picture"])[:n]] for name in ("before", "after")
    ]
    whole = figures.picture_rows(rows, "Reconstructions of held-out squares", notes)
    rows = {"pooled x": np.round(block_mean(shown, low)).astype(np.uint8)}
    rows |= {name: made[name]["pooled"][low][:n] for name in ("before", "after")}
    pooled = figures.picture_rows(rows, f"Decoded from latents pooled by {low}")
    drawn = spectra(pictures, {name: m["mean"] for name, m in made.items()}, made["after"]["factor"])
    spectrum = figures.latent_spectrum(drawn)
    before = read_config(run.before)
    term = "with" if before.reconstruction.alpha else "without"
    about = (
        f"Before: {before.training.steps} steps from random weights, {term} the scale term. After: "
        f"{config.training.steps} more steps with it (alpha {config.reconstruction.alpha:g}, s = "
        f"{' or '.join(map(str, scales))}). A scale-consistent decoder makes of a pooled latent the pooled picture. "
        "Some of the change in PSNR is that of training longer."
    )
    curves = {
        "reconstruction": {
            name: _lines(w, "reconstruction") for name, w in (("before", run.before), ("after", run.after))
        },
        "scale consistency (after)": {"after": _lines(run.after, "scale_consistency")},
    }
    loss = figures.curves(
        curves,
        "Loss terms of stage 1",
        {"l1": "mean absolute error", "l2": "mean squared error"}[config.reconstruction.distance],
    )
    return Section(
        "Stage 1: a scale-consistent autoencoder",
        [
            Text(about),
            _stage1_table(pictures, made),
            Picture("reconstructions", whole, "Held-out squares before and after fine-tuning."),
            Picture("pooled", pooled, f"Pooled pictures, and what is decoded of latents averaged over {low} x {low}."),
            Picture("spectrum", spectrum, "Amplitude of the latents' frequencies, mean and spread over channels."),
            Picture("stage1_loss", loss, "Training loss terms; faint: each logged value, strong: running mean."),
        ],
    )


def _time_bins(run: Run, bins: int) -> dict[str, np.ndarray]:
    """Arm -> mean loss per bin of t, over the second half of training."""
    found = {}
    for arm, workdir in run.arms().items():
        lines = [line for line in metrics.read(workdir) if "loss_by_time" in line]
        total, count = np.zeros(bins), np.zeros(bins)
        for line in lines[len(lines) // 2 :]:
            counts = np.array(line["count_by_time"], float)
            total += np.array([value or 0.0 for value in line["loss_by_time"]]) * counts
            count += counts
        found[arm] = np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)
    return found


def _stage2(run: Run) -> Section:
    config, base = read_config(run.lwd), read_config(run.base).training.steps
    arms = run.arms()
    regions = {"detail-rich quarter": "loss_detail", "smooth quarter": "loss_smooth"}
    panels = {head: {arm: _lines(workdir, name) for arm, workdir in arms.items()} for head, name in regions.items()}
    loss = figures.curves(panels, "Training loss of both arms, by region", "squared velocity error per element")
    bins = config.matching.time_bins
    by_time = figures.time_bins(
        _time_bins(run, bins), np.linspace(0, 1, bins + 1), "Loss by noise level", "squared velocity error per element"
    )
    names = {"all positions": "", "detail-rich quarter": "_detail", "smooth quarter": "_smooth"}
    names = {what: f"preview/loss{region}" for what, region in names.items()}
    rows = [
        [
            what,
            _number(_lines(arms["LWD"], name)[1][0], 4),
            *(_number(_lines(arms[arm], name)[1][-1], 4) for arm in ARMS),
        ]
        for what, name in names.items()
    ]
    supervised = [_number(float(_lines(arms[arm], "supervised_fraction")[1].mean()), 3) for arm in ARMS]
    rows.append(["supervised share in training", "", *supervised])
    about = (
        f"LWD fine-tunes a backbone that can already paint, so one was trained first, plainly, for {base} steps from "
        f"random weights. From there, on the same batches, it went on for {config.training.steps} steps twice: with "
        "the loss at every position (plain), and under the mask (LWD). The error is measured without the mask in "
        "both, in the quarter of positions with most detail and in the smoothest. The LWD arm is not asked to learn "
        "smooth places at high noise levels, so a larger error there is what the mask does, not a defect of the run."
    )
    caption = "Squared velocity error of held-out squares before and after; averaged weights, fixed noise."
    return Section(
        "Stage 2: plain and LWD",
        [
            Text(about),
            Picture(
                "stage2_loss", loss, "Faint: each logged value, strong: running mean. Both arms are measured alike."
            ),
            Picture("loss_by_time", by_time, "Mean over the second half of training; without the mask."),
            Table(["held-out error", "base", *ARMS], rows, caption),
        ],
    )


def _drawn(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """(pictures, prompts) of a folder of samples."""
    listed = json.loads((folder / SAMPLES_INDEX).read_text())["samples"]
    return [np.asarray(Image.open(folder / each["file"])) for each in listed], [each["prompt"] for each in listed]


def _rows_of_samples(folders: dict[str, Path], title: str) -> tuple[dict[str, list[np.ndarray]], bytes]:
    """(the pictures of every folder, a row of them for each with the prompts below the last)."""
    drawn = {name: _drawn(folder) for name, folder in folders.items()}
    rows, prompts = {name: pictures for name, (pictures, _) in drawn.items()}, next(iter(drawn.values()))[1]
    notes = [[""] * len(prompts)] * (len(rows) - 1) + [[figures.wrap(prompt, 21, 3) for prompt in prompts]]
    return rows, figures.picture_rows(rows, title, notes)


def _samples(run: Run) -> Section:
    _, png = _rows_of_samples(run.samples(), "Samples from the training captions, equal noise")
    caption = (
        "Each column starts from one noise. The prompts are training captions: pictures that resemble the "
        "photographs have been learnt by heart, which at this size is the aim."
    )
    return Section("Samples", [Picture("samples", png, caption)])


def _count(folder: Path) -> int:
    """Numbers in the safetensors files of a folder."""
    return sum(math.prod(tensor.shape) for file in folder.glob("*.safetensors") for tensor in header(file).values())


def _adapters_table(run: Run, rows: dict[str, list[np.ndarray]]) -> Table:
    def difference(name):
        return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(rows["LoRA"], rows[name], strict=True))

    trained, whole = _count(run.lora_export), _count(run.base_export / BACKBONE.subfolder)
    size = (run.lora_export / ADAPTER_FILE).stat().length
    measured = [
        ["parameters that trained", f"{trained:,} beside {whole:,}"],
        [f"{ADAPTER_FILE}, float32", f"{size / 2**20:.2f} MiB"],
        ["largest difference of a pixel, LoRA and read back", f"{difference('read back')} of 255"],
        ["largest difference of a pixel, LoRA and base", f"{difference('base')} of 255"],
    ]
    return Table(["", ""], measured, "Differences are of the files of the samples, over all pictures and colours.")


def _adapters_code(run: Run) -> str:
    """What loads the base and the LoRA in PyTorch."""
    absent = [part for part in FLUX.parts if not (run.base_export / part).is_dir()]
    paths = f"folder = {str(run.base_export)!r}\nadapters = {str(run.lora_export)!r}\n\n"
    return paths + code_with_adapters(read_json(run.base_export / MANIFEST), absent)


def _adapters(run: Run) -> Section:
    config = read_config(run.lora)
    rows, png = _rows_of_samples(run.adapted_samples(), "The base, a LoRA over it, and its file read back, equal noise")
    about = (
        f"A LoRA of rank {config.adapter.rank} was trained over the base for {config.training.steps} steps under the "
        "mask; the base's own weights stayed as they were. Both were exported as diffusers reads them, the base as a "
        "folder and the LoRA as a file, and that file was imported over that folder as anyone's would be. The run and "
        "what was read back must draw the same; how far both are from the base is what could have been lost."
    )
    code = (
        "In PyTorch, with diffusers and PEFT. The pipeline takes text states, because captions were encoded by "
        f"{open_models(run.base_export).text()['kind']} and the folder has no text encoders:"
    )
    return Section(
        "LoRA: to PyTorch and back",
        [
            Text(about),
            Picture("adapters", png, "Each column starts from one noise; the last two rows should be the same."),
            _adapters_table(run, rows),
            Text(code),
            Code(_adapters_code(run)),
        ],
    )


def peak_memory() -> float:
    """The most memory this process has held, GiB. The kernel counts it in KiB, but macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _times(seconds: dict[str, float]) -> Section:
    rows = [[title, f"{value:.0f} s"] for title, value in seconds.items()] + [
        ["together", f"{sum(seconds.values()):.0f} s"]
    ]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    device = jax.devices()[0].device_kind
    about = (
        f"{os.cpu_count()} cores, {jax.device_count()} {device} device(s), jax {jax.__version__}; at most "
        f"{peak_memory():.1f} GiB of memory, {usage.ru_utime + usage.ru_stime:.0f} s of processor time in the last run "
        "of the command. Compiling is part of it; so is what an interrupted run did again."
    )
    return Section("Times", [Table(["part", "time"], rows), Text(about)])


def _next(run: Run, photographs: list[Photograph]) -> Section:
    sample = ["lwd", "sample", "--models", run.export, "--prompt", photographs[0].caption, "--out", "samples"]
    commands = (
        "source .venv/bin/activate      # in the checkout, once in a shell: launch/quickstart.sh put lwd there\n"
        f"{shlex.join(map(str, sample))}\n"
        "lwd quickstart --images ~/photographs --workdir runs/mine      # the same on your own pictures\n"
        "lwd train --config=configs/stage1_sd3_512.py --workdir=runs/stage1 ...   # your SD3 weights; see the README"
    )
    files = (
        f"{run.export} is a diffusers folder: transformer, vae and scheduler load in PyTorch with from_pretrained. The "
        "workdirs beside it hold checkpoints, metrics.jsonl, TensorBoard files and previews."
    )
    return Section("What to do next", [Text(files), Code(commands)])


def write_report(run: Run, photographs: list[Photograph], seconds: dict[str, float], fast: bool = False) -> None:
    """Writes `workdir/report.html` and `workdir/pictures/*.png`.

    Args:
      run: a quickstart whose parts are all done.
      photographs: those it was made on.
      seconds: title of a part -> how long it took.
      fast: it was a run of a few steps; the page says so.
    """
    config = read_config(run.lwd)
    sections = [
        _what(photographs, run, config, fast),
        _photographs(photographs),
        _saliency(photographs, run, config),
        _stage1(run),
        _stage2(run),
        _samples(run),
        *([_adapters(run)] if run.lora.is_dir() else []),
        _times(seconds),
        _next(run, photographs),
    ]
    lead = "Both stages of Latent Wavelet Diffusion, end to end and small, on real photographs."
    footer = "lwd_jax: Latent Wavelet Diffusion (arXiv 2506.00433) in JAX. Every figure here was computed in this run."
    write_page(run.workdir, "LWD quickstart", lead, sections, footer)
