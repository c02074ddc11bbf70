"""Runs the whole job on real photographs, on any machine: prepare, stage 1, encode, stage 2 (plain and LWD), sample,
export. With --backbone flux also a LoRA, to the file that PyTorch reads and back.

Without --images it takes eight photographs that ship with scikit-image and scikit-learn: nothing is downloaded. Each
part is an ordinary lwd command, printed as you would type it. Interrupt it and run it again: it goes on where it was.
It ends with a report, WORKDIR/report.html, that says what so small a run can and cannot show.
"""

import json
import math
import os
import shlex
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils.epath import Path

import lwd_jax
from lwd_jax.adapters.peft import FILE as ADAPTER_FILE
from lwd_jax.cli.config_flag import read_config
from lwd_jax.data.dataset import INDEX as DATASET_INDEX
from lwd_jax.data.latents import METADATA
from lwd_jax.errors import UserError, read_json
from lwd_jax.files import absolute, on_disk
from lwd_jax.report.export import MANIFEST
from lwd_jax.report.photographs import Photograph, own, shipped, write_crops
from lwd_jax.report.quickstart import CROPS, SIDE, TIMES_FILE, Run, write_report
from lwd_jax.report.samples import INDEX as SAMPLES_INDEX
from lwd_jax.report.staging import staged
from lwd_jax.train.checkpoint import FOLDER

EXAMPLE = "lwd quickstart --workdir runs/quickstart\n  lwd quickstart --images ~/photographs --workdir runs/mine"
CONFIGS = Path(lwd_jax.__file__).parent.parent / "configs"
SAMPLED = 6  # prompts
COMPARED = 4  # prompts, drawn with a LoRA and with what is read back of it
WORDS = 11  # of a caption that are read; the text encoder adds one token for the beginning
STEPS = {"before": 210, "after": 50, "base": 600, "arm": 60}  # training steps of the parts
FAST_STEPS = 3  # of training and of sampling
SOURCE = "source.json"  # in the workdir: which photographs it was begun with
# Of stage 2. FLUX is sampled with the guidance that it was told in training, 1.
BACKBONES = {"sd3": {}, "flux": {"models__backbone_variant": "flux-tiny", "sampling__embedded_guidance": 1.0}}
ADAPTED = ("flux",)  # backbones that a LoRA is trained over as well
# alpha is not the rank, so that the file holds factors which a scale was multiplied into.
LORA = {"adapter__kind": "lora", "adapter__rank": 8, "adapter__alpha": 16.0, "optimizer__learning_rate": 2e-3}


def arguments(parser) -> None:
    parser.add_argument(
        "--workdir", default="runs/quickstart", help="folder of everything it writes (default %(default)s)"
    )
    parser.add_argument("--images", default="", help="a folder with photographs of your own instead")
    parser.add_argument(
        "--backbone", choices=tuple(BACKBONES), default="sd3", help="whose small sibling trains (default %(default)s)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a few steps of each part: shows that all parts run, learns nothing"
    )


class Part(NamedTuple):
    """A piece of the job.

    Attributes:
      title: what it does.
      work: the words of an lwd command (without lwd), or a function.
      result: the path that is there when it is done; None = it is always done again.
    """

    title: str
    work: list[str] | Callable[[], None]
    result: Path | None


class Clock:
    """Runs parts, says which, and keeps the seconds each took in times.json, over interruptions and failures too."""

    def __init__(self, workdir: Path, parts: int):
        self._file, self._parts, self._number = workdir / TIMES_FILE, parts, 0
        self._begin = time.perf_counter()
        self.seconds = read_json(self._file) if self._file.is_file() else {}

    def run(self, part: Part) -> int:
        """The part's exit status."""
        self._number += 1
        start = time.perf_counter()
        minutes, seconds = divmod(int(start - self._begin), 60)
        done = part.result is not None and part.result.exists()
        note = " (done before)" if done else ""
        print(f"\n[{self._number}/{self._parts}]  {minutes}:{seconds:02d}  {part.title}{note}", flush=True)
        if done:
            return 0
        try:
            return (part.work() if callable(part.work) else _run_command(part.work)) or 0
        finally:
            self.seconds[part.title] = self.seconds.get(part.title, 0.0) + time.perf_counter() - start
            self._file.write_text(json.dumps(self.seconds, indent=1))


def _run_command(words: list[str]) -> int | None:
    """Prints an lwd command as it is typed, and runs it."""
    from lwd_jax.cli import parser_of

    print(f"    lwd {shlex.join(words)}", flush=True)
    args, overrides = parser_of(words[0]).parse_known_args(words[1:])
    args.overrides = overrides
    return args.run(args)


def _cut(photographs: list[Photograph], folder: Path) -> None:
    with staged(folder, False, "") as partial:
        count = write_crops(photographs, partial, CROPS, SIDE)
    print(f"    {count} squares of {SIDE} px from {len(photographs)} photographs")


def _check_source(workdir: Path, images: str, photographs: list[Photograph], fast: bool, backbone: str) -> None:
    """A workdir belongs to one set of photographs, one length and one backbone."""
    source = {"images": str(absolute(Path(images))) if images else "", "fast": fast, "backbone": backbone}
    source["photographs"] = [[photograph.name, photograph.caption] for photograph in photographs]
    file = workdir / SOURCE
    # It was SD3's before there was a choice, and did not tell its photographs.
    if file.is_file() and {"backbone": "sd3", "photographs": source["photographs"]} | read_json(file) != source:
        raise UserError(
            f"The quickstart in {workdir} was begun with other photographs, another length or another backbone; name a "
            "new --workdir."
        )
    file.write_text(json.dumps(source))


def _config(stage: int) -> str:
    return os.path.relpath(CONFIGS / f"quickstart_stage{stage}.py")


def mesh_fields(devices: int) -> dict[str, int]:
    """The config fields of a mesh that the batches of both stages divide over; {} where the configs' own will do.

    A mesh covers all devices. As many as divide both batches share the pictures; the others go to `tensor`, the axis
    that divides no pictures, and hold parameters that do not divide over it whole.
    """
    sizes = [read_config(_config(stage), []).data.batch_size for stage in (1, 2)]
    shared = math.gcd(devices, *sizes)
    return {} if shared == devices else {"mesh__fsdp": shared, "mesh__tensor": -1}


def _train(stage: int, workdir: Path, steps: int, fast: bool, **overrides) -> list[str]:
    """The words of `lwd train`; overrides are config fields with __ for the dot."""
    fields = {"training__steps": steps, "training__preview_every": steps} | mesh_fields(jax.device_count()) | overrides
    if fast:
        fields |= {"optimizer__warmup": 1, "training__log_every": 1}
        if stage == 2:
            fields["sampling__steps"] = FAST_STEPS
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return ["train", f"--config={_config(stage)}", f"--workdir={workdir}", *given]


def _autoencoder_parts(run: Run, fast: bool) -> list[Part]:
    before, after = (FAST_STEPS if fast else STEPS[name] for name in ("before", "after"))
    plain = {"training__preview_every": 0}  # the report shows this one beside the other; compiling previews takes long
    if not fast:  # where it is the step of the run after it, compiled once
        plain |= {"reconstruction__alpha": 0.0, "reconstruction__freeze_output": False}
        plain |= {"optimizer__learning_rate": 1e-2}
    data = {"data__dataset": run.dataset}
    encode = [f"--dataset={run.dataset}", f"--models={run.after}", f"--out={run.latents}", f"--resolution={SIDE}"]
    return [
        Part(
            "stage 1, before: the autoencoder from random weights",
            _train(1, run.before, before, fast, **plain, **data),
            run.before / FOLDER / str(before),  # Orbax gives a step its name when it is whole
        ),
        Part(
            "stage 1, after: fine-tuned with scale consistency",
            _train(1, run.after, after, fast, models__autoencoder=run.before, **data),
            run.after / FOLDER / str(after),
        ),
        Part(
            "encode: latents and text states",
            ["encode", *encode, "--no-buckets", "--text=hashed_words", f"--text-length={WORDS + 1}", "--batch-size=8"],
            run.latents / METADATA,
        ),
    ]


def _sample(title: str, models: Path, photographs: list[Photograph], out: Path) -> Part:
    """Draws the captions of photographs."""
    prompts = [f"--prompt={photograph.caption}" for photograph in photographs]
    words = ["sample", f"--models={models}", *prompts, f"--out={out}", "--batch=2"]
    return Part(title, words, out / SAMPLES_INDEX)


def _inputs(run: Run, backbone: str) -> dict:
    """Config fields of what every run of stage 2 works with."""
    return {"data__latents": run.latents, "models__autoencoder": run.after} | BACKBONES[backbone]


def _backbone_parts(run: Run, photographs: list[Photograph], fast: bool, backbone: str) -> list[Part]:
    base, arm_steps = (FAST_STEPS if fast else STEPS[name] for name in ("base", "arm"))
    data = _inputs(run, backbone)
    plain = {"matching__mask": "everywhere", "training__preview_every": 0}  # both arms' previews begin with it
    if not fast:  # where it is one of the arms' steps, compiled once
        plain |= {"optimizer__learning_rate": 4e-3, "training__ema": 0.99}
    words = _train(2, run.base, base, fast, **plain, **data)
    parts = [Part("stage 2, base: the backbone that both arms fine-tune", words, run.base / FOLDER / str(base))]
    titles = {"plain": "stage 2, plain: every position supervised", "LWD": "stage 2, LWD: the wavelet mask"}
    masks = {"plain": "everywhere", "LWD": "time"}
    for arm, workdir in run.arms().items():
        words = _train(2, workdir, arm_steps, fast, models__backbone=run.base, matching__mask=masks[arm], **data)
        parts.append(Part(titles[arm], words, workdir / FOLDER / str(arm_steps)))
    for arm, workdir in run.arms().items():
        title = f"sample with the {arm} backbone"
        parts.append(_sample(title, workdir, photographs[:SAMPLED], run.samples()[arm]))
    export = ["export", f"--workdir={run.lwd}", f"--out={run.export}"]
    return [*parts, Part("export: a diffusers folder", export, run.export / MANIFEST)]


def _adapter_parts(run: Run, photographs: list[Photograph], fast: bool, backbone: str) -> list[Part]:
    """A LoRA over the base, both as PyTorch's pipelines read them, and what is read back of that."""
    steps = FAST_STEPS if fast else STEPS["arm"]
    fields = _inputs(run, backbone) | LORA | {"models__backbone": run.base, "training__preview_every": 0}
    words = _train(2, run.lora, steps, fast, matching__mask="time", **fields)
    base = ["export", f"--workdir={run.base}", f"--out={run.base_export}"]
    lora = ["export", f"--workdir={run.lora}", f"--out={run.lora_export}", "--form=adapter"]
    back = ["import", f"--models={run.base_export}", f"--adapter={run.lora_export / ADAPTER_FILE}"]
    parts = [
        Part("stage 2, LoRA: adapters over the base", words, run.lora / FOLDER / str(steps)),
        Part("export: the base, a diffusers folder", base, run.base_export / MANIFEST),
        Part("export: the LoRA, a file of adapters", lora, run.lora_export / MANIFEST),
        Part("import: that file over that folder", [*back, f"--workdir={run.back}"], run.back / "config.json"),
    ]
    for name, models in run.adapted().items():
        out = run.adapted_samples()[name]
        parts.append(_sample(f"sample for the LoRA's round trip: {name}", models, photographs[:COMPARED], out))
    return parts


def _parts(run: Run, photographs: list[Photograph], fast: bool, backbone: str = "sd3") -> list[Part]:
    """Every part but the report."""
    prepare = ["prepare", f"--images={run.crops}", f"--out={run.dataset}", f"--resolution={SIDE}"]
    return [
        Part("cut the photographs into squares", lambda: _cut(photographs, run.crops), run.crops),
        Part("prepare: a dataset of the squares and captions", prepare, run.dataset / DATASET_INDEX),
        *_autoencoder_parts(run, fast),
        *_backbone_parts(run, photographs, fast, backbone),
        *(_adapter_parts(run, photographs, fast, backbone) if backbone in ADAPTED else []),
    ]


def run(args) -> int:
    if not CONFIGS.is_dir():
        raise UserError(f"The quickstart reads its configs from {CONFIGS}, which is not there; run it from a checkout.")
    workdir = on_disk(args.workdir, "The workdir of the quickstart")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; name a folder with --workdir.")
    photographs = own(args.images, workdir) if args.images else shipped()
    workdir.mkdir(parents=True, exist_ok=True)
    _check_source(workdir, args.images, photographs, args.fast, args.backbone)
    place = Run(workdir)
    print(
        f"Quickstart on {len(photographs)} photographs, {jax.device_count()} {jax.devices()[0].device_kind} "
        f"device(s), in {workdir}"
    )
    parts = _parts(place, photographs, args.fast, args.backbone)
    clock = Clock(workdir, len(parts) + 1)
    for part in parts:
        if status := clock.run(part):
            print("Stopped; the same lwd quickstart goes on from here.")
            return status
    clock.run(Part("report", lambda: write_report(place, photographs, clock.seconds, args.fast), None))
    sample = ["lwd", "sample", "--models", place.export, "--prompt", photographs[0].caption, "--out", workdir / "more"]
    print(
        f"\nThe report is {workdir / 'report.html'}; its pictures are in {workdir / 'pictures'}. Next: open it in a "
        f"browser, or\n{shlex.join(map(str, sample))}"
    )
    return 0
