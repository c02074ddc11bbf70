"""How much memory do the runs of this project take on TPU slices, what do they move and how fast can they be?

Each row is compiled ahead of time by `lwd plan` (pip install libtpu; no TPU is needed) in a process of its own, and
printed as it comes. Nothing runs on a TPU.

    python benchmarks/tpu_plan.py --fast                     # all rows, without their code: an hour on two cores
    python benchmarks/tpu_plan.py --rows sd3_1024 encode     # those whose names begin so, with it
    python benchmarks/tpu_plan.py --json plans.json

The limits are of weights and moments alone: those rows are planned without the average of the weights that the configs
keep, which takes 4 more bytes a parameter, 0.47 GiB a chip for SD3-medium over 16 chips.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30


class Row(NamedTuple):
    """One program on one slice.

    Attributes:
      run: what it is.
      config: file of configs/.
      topology: of `lwd plan`.
      mesh: (data, fsdp, context, tensor).
      batch: pictures a step.
      limit: GiB a chip, at most; 0 = only that it fits.
      program: of `lwd plan`.
      settings: other fields of the config.
      slices: of that topology.
    """

    run: str
    config: str
    topology: str
    mesh: tuple[int, int, int, int]
    batch: int
    limit: float = 0.0
    program: str = "train"
    settings: dict = {}
    slices: int = 1


_4K = {"resolution": 4096}
_NO_AVERAGE = {"training.ema": 0.0}
_NO_LPIPS = {"reconstruction.lpips": 0.0} | _NO_AVERAGE
_ALONE, _SPREAD = (1, 1, 1, 1), (1, 1, 8, 1)


def _sd3(side: int, share: str, mesh: tuple[int, int, int, int], batch: int, limit: float) -> Row:
    run, config = f"SD3-medium, {side} px, {share}", f"stage2_sd3_{side}"
    return Row(run, config, "v5e:4x4", mesh, batch, limit, settings=_NO_AVERAGE)


def _flux(name: str, config: str, topology: str, mesh: tuple[int, int, int, int], limit: float, **settings) -> Row:
    batch = mesh[0] * mesh[1]
    return Row(f"FLUX.1-dev, {name}", config, topology, mesh, batch, limit, settings=_NO_AVERAGE | settings)


def _weak(topology: str, data: int, slices: int = 1) -> Row:
    run = "SD3-medium, 2048 px, 1 picture a chip"
    return Row(run, "stage2_sd3_2048", topology, (data, 16, 1, 1), 16 * data, slices=slices)


ROWS = {
    "sd3_1024": _sd3(1024, "1 picture a chip", (1, 16, 1, 1), 16, 2.8),
    "sd3_2048": _sd3(2048, "1 picture a chip", (1, 16, 1, 1), 16, 5.0),
    "sd3_4096": _sd3(4096, "1 picture a chip", (1, 16, 1, 1), 16, 13.8),
    "sd3_4096_context": _sd3(4096, "1 picture on 4 chips", (1, 4, 4, 1), 4, 6.4),
    "sd35_large_v6e": Row("SD3.5-large, 2048 px", "stage2_sd35_large_2048", "v6e:4x4", (1, 16, 1, 1), 16),
    "sd35_large_v5p": Row("SD3.5-large, 2048 px", "stage2_sd35_large_2048", "v5p:2x2x4", (1, 16, 1, 1), 16),
    "encode_1": Row("encode, 4096 px, 1 chip", "stage1_sd3_512", "v5p:1x1x1", _ALONE, 1, 14.4, "encode", _4K),
    "encode_8": Row("encode, 4096 px, 8 chips", "stage1_sd3_512", "v5e:2x4", _SPREAD, 1, 2.4, "encode", _4K),
    "decode_1": Row("decode, 4096 px, 1 chip", "stage1_sd3_512", "v5p:1x1x1", _ALONE, 1, 24.2, "decode", _4K),
    "decode_8": Row("decode, 4096 px, 8 chips", "stage1_sd3_512", "v5e:2x4", _SPREAD, 1, 3.7, "decode", _4K),
    "stage1_512": Row(
        "stage 1 without LPIPS, 512 px, 2 a chip", "stage1_sd3_512", "v5e:2x4", (8, 1, 1, 1), 16, 10.8,
        settings=_NO_LPIPS,
    ),
    "stage1_1024": Row(
        "stage 1 without LPIPS, 1024 px, 1 a chip", "stage1_sd3_1024", "v5e:2x4", (8, 1, 1, 1), 8, 13.5,
        settings=_NO_LPIPS,
    ),
    "stage1_1024_context": Row(
        "stage 1 without LPIPS, 1024 px, 1 on 4 chips", "stage1_sd3_1024", "v5e:2x4", (1, 2, 4, 1), 2, 4.4,
        settings=_NO_LPIPS,
    ),
    "stage1_2048_v5e": Row(
        "stage 1 with LPIPS, 2048 px, 1 on 16 chips", "stage1_sd3_1024", "v5e:4x4", (1, 1, 16, 1), 1,
        settings={"resolution": 2048},
    ),
    "stage1_2048_v6e": Row(
        "stage 1 with LPIPS, 2048 px, 1 on 8 chips", "stage1_sd3_1024", "v6e:4x4", (2, 1, 8, 1), 2,
        settings={"resolution": 2048},
    ),
    "sample_4096": Row(
        "sample with CFG, SD3-medium, 4096 px", "stage2_sd3_4096", "v5e:4x4", (1, 4, 4, 1), 4, program="sample"
    ),
    "flux_full_1024": _flux("1024 px", "flux_full_1024", "v6e:4x4", (1, 16, 1, 1), 12.8),
    "flux_full_2048": _flux("2048 px", "flux_full_2048", "v6e:4x4", (1, 16, 1, 1), 18.9),
    "flux_full_4096_v6e": _flux("4096 px, 1 on 4 chips", "flux_full_2048", "v6e:4x4", (1, 4, 4, 1), 19.6, **_4K),
    "flux_full_4096_v5p": _flux("4096 px, 1 on 8 chips", "flux_full_2048", "v5p:4x4x4", (1, 8, 8, 1), 6.8, **_4K),
    "flux_lora_1024": _flux("LoRA, 1024 px", "flux_lora_1024", "v5e:4x4", (1, 16, 1, 1), 9.3),
    "flux_lora_4096": _flux("LoRA, 4096 px, 1 on 8 chips", "flux_lora_2048", "v5e:4x4", (1, 2, 8, 1), 13.0, **_4K),
    "weak_16": _weak("v5p:2x2x4", 1),
    "weak_64": _weak("v5p:4x4x4", 4),
    "weak_256": _weak("v5p:4x8x8", 16),
    "weak_1024": _weak("v5p:8x8x16", 64),
    "weak_2_slices": _weak("v5p:4x4x4", 8, slices=2),
}  # fmt: skip


def command(row: Row, file: str, *flags: str) -> list[str]:
    """The words of `lwd plan` for a row."""
    settings = dict(zip(("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor"), row.mesh))
    settings |= {"data.batch_size": row.batch} | row.settings
    words = [sys.executable, "-m", "lwd_jax.cli", "plan", f"--config={CONFIGS / row.config}.py", f"--json={file}"]
    words += ["--topology", row.topology, "--num_slices", str(row.slices), "--program", row.program, *flags]
    return words + [f"--config.{name}={value}" for name, value in settings.items()]


def plan(row: Row, *flags: str) -> dict | str:
    """The JSON of a row's plan, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "plan.json")
        done = subprocess.run(command(row, file, *flags), capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return json.loads(Path(file).read_text(encoding="utf-8"))


def _lines(name: str, row: Row, found: dict | str):
    slices = f"{row.slices} x " if row.slices > 1 else ""
    mesh = ",".join(map(str, row.mesh))
    head = f"{name:<20} {row.run:<46} {slices + row.topology:<14} ({mesh})"
    if isinstance(found, str):
        yield f"{head}  FAILED: {found}"
        return
    for program in found["programs"]:
        peak = program["peak"]
        size = "-" if peak is None else f"{peak / GIB:.2f} GiB"
        limit = f"at most {row.limit}" if row.limit else "fits"
        met = program["fits"] and (not row.limit or peak <= row.limit * GIB)
        bounds = program.get("roofline") or {}
        sent = sum(part["sent"] for part in program["traffic"]) / 1e9
        fast = f"MFU <= {bounds['mfu_cap']:.0%} ({bounds['binds']})" if bounds else ""
        done = "laid out" if program["memory"] and program["memory"]["code"] is None else "compiled"
        yield (
            f"{head}  {program['program']}: {size} a chip, {limit}: {'yes' if met else 'NO'}; {sent:.2f} GB sent a "
            f"chip, {fast}; {done} in {program['seconds']:.0f} s"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[""], help="names, or how they begin (default: all)")
    parser.add_argument("--fast", action="store_true", help="as of lwd plan: what code takes is left out")
    parser.add_argument("--json", help="file to write every plan to")
    args = parser.parse_args(arguments)
    chosen = {name: row for name, row in ROWS.items() if name.startswith(tuple(args.rows))}
    if not chosen:
        raise SystemExit(f"No row is called {' or '.join(args.rows)}; there are: {', '.join(ROWS)}.")
    plans = {}
    for name, row in chosen.items():
        plans[name] = plan(row, *["--fast"] * args.fast)
        for line in _lines(name, row, plans[name]):
            print(line, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(plans, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
