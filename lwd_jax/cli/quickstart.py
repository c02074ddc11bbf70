"""Runs the whole job on real photographs, on any machine: prepare, stage 1, encode, stage 2 (plain and LWD), sample, export.

Without --images it takes eight photographs that ship with scikit-image and scikit-learn: nothing is downloaded. Each part
is an ordinary lwd command, printed as you would type it. Interrupt it and run it again: it goes on where it was. It ends
with a report, WORKDIR/report.html, that says what so small a run can and cannot show.
"""

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import jax

import lwd_jax
from lwd_jax.data.dataset import INDEX as DATASET_INDEX
from lwd_jax.errors import UserError
from lwd_jax.report.export import MANIFEST
from lwd_jax.report.photographs import Photograph, own, shipped, write_crops
from lwd_jax.report.quickstart import CROPS, SIDE, TIMES_FILE, Run, write_report
from lwd_jax.report.samples import INDEX as SAMPLES_INDEX
from lwd_jax.report.staging import staged
from lwd_jax.train.checkpoint import FOLDER

EXAMPLE = "lwd quickstart --workdir runs/quickstart\n  lwd quickstart --images ~/photographs --workdir runs/mine"
CONFIGS = Path(lwd_jax.__file__).parent.parent / "configs"
SAMPLED = 6  # prompts
STEPS = {"before": 400, "after": 150, "backbone": 400}  # training steps of the parts
SOURCE = "source.json"  # in the workdir: which photographs it was begun with


def arguments(parser) -> None:
    parser.add_argument("--workdir", default="runs/quickstart", help="folder of everything it writes (default %(default)s)")
    parser.add_argument("--images", default="", help="a folder with photographs of your own instead")
    parser.add_argument("--fast", action="store_true", help="a few steps of each part: shows that all parts run, learns nothing")


class Clock:
    """Runs the parts, prints what is done, and keeps the seconds each took in times.json, over interruptions too."""

    def __init__(self, workdir: Path, parts: int):
        self._file, self._parts, self._done = workdir / TIMES_FILE, parts, 0
        self._begin = time.perf_counter()
        self.seconds = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def part(self, title: str, command: str, done: bool, work: Callable[[], int | None]) -> int:
        """One part; its exit status. `done`: the result is there already."""
        self._done += 1
        start = time.perf_counter()
        minutes, seconds = divmod(int(start - self._begin), 60)
        print(f"\n[{self._done}/{self._parts}]  {minutes}:{seconds:02d}  {title}{' (done before)' if done else ''}", flush=True)
        if done:
            return 0
        if command:
            print(f"    {command}", flush=True)
        status = work() or 0
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
        self._file.write_text(json.dumps(self.seconds, indent=1))
        return status


def _command(words: list[str]) -> tuple[str, Callable[[], int | None]]:
    """(the command as it is typed, what runs it); the words are those after `lwd`."""
    from lwd_jax.cli import parser_of

    def work() -> int | None:
        args, rest = parser_of(words[0]).parse_known_args(words[1:])
        args.overrides = rest
        return args.run(args)

    return f"lwd {shlex.join(words)}", work


def _cut(photographs: list[Photograph], folder: Path) -> None:
    with staged(folder, False, "") as partial:
        count = write_crops(photographs, partial, CROPS, SIDE)
    print(f"    {count} squares of {SIDE} px from {len(photographs)} photographs")


def _check_source(workdir: Path, images: str, fast: bool) -> None:
    """A workdir belongs to one set of photographs and one length."""
    source = {"images": str(Path(images).resolve()) if images else "", "fast": fast}
    file = workdir / SOURCE
    if file.is_file() and json.loads(file.read_text()) != source:
        raise UserError(f"The quickstart in {workdir} was begun with other photographs or another length; name a new --workdir.")
    file.write_text(json.dumps(source))


def _train(stage: int, workdir: Path, steps: int, **overrides) -> list[str]:
    length = {"training.steps": steps, "training.preview_every": steps}
    if steps < STEPS["after"]:
        length |= {"optimizer.warmup": 1, "training.log_every": 1}
    fields = [f"--config.{name}={value}" for name, value in (length | {k.replace("__", "."): v for k, v in overrides.items()}).items()]
    return ["train", f"--config={os.path.relpath(CONFIGS / f'quickstart_stage{stage}.py')}", f"--workdir={workdir}", *fields]


def _finished(workdir: Path, steps: int) -> bool:
    return (workdir / FOLDER / str(steps)).is_dir()  # Orbax gives a step its name when it is whole


def _parts(run: Run, photographs: list[Photograph], fast: bool) -> list[tuple[str, list[str] | Callable, bool]]:
    """(title, the command's words or a function, whether it is done) of every part but the report."""
    steps = {name: 3 for name in STEPS} if fast else STEPS
    first = {"data__dataset": run.dataset, "models__autoencoder": run.before}
    second = {"data__latents": run.latents, "models__autoencoder": run.after}
    prompts = [f"--prompt={photograph.caption}" for photograph in photographs[:SAMPLED]]
    few = ["--steps=2"] if fast else []

    def sample(models: Path, out: Path) -> list[str]:
        return ["sample", f"--models={models}", *prompts, f"--out={out}", "--batch=2", "--overwrite", *few]

    plain = {"reconstruction__alpha": 0.0, "reconstruction__freeze_output": False, "optimizer__learning_rate": 3e-3}
    plain["data__dataset"] = run.dataset
    return [
        ("cut the photographs into squares", lambda: _cut(photographs, run.crops), run.crops.is_dir()),
        (
            "prepare: a dataset of the squares and captions",
            ["prepare", f"--images={run.crops}", f"--out={run.dataset}", f"--resolution={SIDE}"],
            (run.dataset / DATASET_INDEX).is_file(),
        ),
        ("stage 1, before: the autoencoder without the scale term", _train(1, run.before, steps["before"], **plain), _finished(run.before, steps["before"])),
        ("stage 1, after: fine-tuned with scale consistency", _train(1, run.after, steps["after"], **first), _finished(run.after, steps["after"])),
        (
            "encode: latents and text states",
            ["encode", f"--dataset={run.dataset}", f"--models={run.after}", f"--out={run.latents}", f"--resolution={SIDE}",
             "--no-buckets", "--text=hashed_words", "--batch-size=8"],
            False,
        ),
        ("stage 2, plain: every position supervised", _train(2, run.plain, steps["backbone"], **second, matching__mask="everywhere"), _finished(run.plain, steps["backbone"])),
        ("stage 2, LWD: the wavelet mask", _train(2, run.lwd, steps["backbone"], **second), _finished(run.lwd, steps["backbone"])),
        ("sample with the plain backbone", sample(run.plain, run.samples_plain), (run.samples_plain / SAMPLES_INDEX).is_file()),
        ("sample with the LWD backbone", sample(run.lwd, run.samples_lwd), (run.samples_lwd / SAMPLES_INDEX).is_file()),
        ("export: a diffusers folder", ["export", f"--workdir={run.lwd}", f"--out={run.export}", "--overwrite"], (run.export / MANIFEST).is_file()),
    ]  # fmt: skip


def run(args) -> int:
    if not CONFIGS.is_dir():
        raise UserError(f"The quickstart reads its configs from {CONFIGS}, which is not there; run it from a checkout.")
    workdir = Path(args.workdir)
    photographs = own(args.images) if args.images else shipped()
    workdir.mkdir(parents=True, exist_ok=True)
    _check_source(workdir, args.images, args.fast)
    place = Run(workdir)
    print(f"Quickstart on {len(photographs)} photographs, {jax.device_count()} {jax.devices()[0].device_kind} device(s), in {workdir}")
    parts = _parts(place, photographs, args.fast)
    clock = Clock(workdir, len(parts) + 1)
    for title, words, done in parts:
        command, work = ("", words) if callable(words) else _command(words)
        if status := clock.part(title, command, done, work):
            print("Stopped; the same lwd quickstart goes on from here.")
            return status
    clock.part("report", "", False, lambda: write_report(place, photographs, clock.seconds))
    print(
        f"\nThe report is {workdir / 'report.html'}; its pictures are in {workdir / 'pictures'}. Next: open it in a browser, or\n"
        f"lwd sample --models {place.export} --prompt \"{photographs[0].caption}\" --out {workdir / 'more'}"
    )
    return 0
