"""Compiles every program of a run for a TPU slice, on any machine, and tells whether it fits and how fast it can be.

Nothing runs and no weight is read. `pip install libtpu` brings the TPU compiler; without it the memory of the state is
evaluated by shape, and the table says what is missing. A slice is KIND:SHAPE in chips: v5e:4x4, v5p:2x2x4, v6e:16x16,
tpu7x:2x2x1; GPUs are counted, h200:8, and are compiled for where they are; cpu:8 stands for devices of this machine.
"""

import json
import shlex

import jax
from etils.epath import Path

from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import Config
from lwd_jax.errors import UserError
from lwd_jax.files import absolute, in_bucket, locate
from lwd_jax.plan.compile import plan_program, suggest
from lwd_jax.plan.programs import Makers, names_of
from lwd_jax.plan.result import Result
from lwd_jax.plan.table import as_json, quantity, text
from lwd_jax.plan.topology import GIB, Topology, open_topology, parse
from lwd_jax.sample.generate import make_decoder, make_sampler

EXAMPLE = "lwd plan --config=configs/stage2_sd3_1024.py --topology v5e:4x4 --json plan.json"
MAKERS = Makers(make_sampler, make_decoder)


def arguments(parser) -> None:
    parser.add_argument("--config", required=True, help="file of configs/, or a config.json; --config.a.b=value")
    parser.add_argument("--topology", required=True, help="KIND:SHAPE, such as v5p:4x4x4")
    parser.add_argument("--num_slices", type=int, default=1, help="slices of that shape (default %(default)s)")
    parser.add_argument(
        "--program",
        choices=("all", "train", "encode", "sample", "decode"),
        default="all",
        help="what to compile; sample decodes too (default %(default)s)",
    )
    parser.add_argument("--suggest", action="store_true", help="if the train step does not fit, try what makes it fit")
    parser.add_argument("--fresh", action="store_true", help="compile again what is kept from an earlier plan")
    parser.add_argument("--json", help="file to write the figures to")


def _check_writable(file: Path) -> None:
    """Before minutes of compiling."""
    folder = absolute(file).parent
    if not in_bucket(folder) and not folder.is_dir():
        raise UserError(f"--json: there is no folder '{folder}'.")


def _suggest(config: Config, topology: Topology) -> tuple[str, Result] | None:
    def on_try(words: str, result: Result) -> None:
        peak = "not known" if result.peak is None else f"{result.peak / GIB:.2f} GiB"
        print(f"  {words}: peak {peak}, {'fits' if result.fits(topology) else 'does not fit'}", flush=True)

    print("\nWhat makes the train step fit:")
    found = suggest(config, topology, MAKERS, on_try)
    print(f"Add {found[0]}" if found else "Nothing that was tried: take a larger slice.")
    return found


def _next(args, results: list[Result], topology: Topology) -> str:
    run = shlex.join([f"--config={args.config}", *args.overrides])
    if any(result.fits(topology) is False for result in results) and not args.suggest:
        return f"lwd plan {run} --topology {args.topology} --program train --suggest"
    return f"lwd train {run} --workdir=WORKDIR, on {topology.name}"


def run(args) -> None:
    config = read_config(args.config, args.overrides)
    if parse(args.topology, args.num_slices).chip.platform == "tpu":
        jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    topology = open_topology(args.topology, args.num_slices)
    if args.json:
        _check_writable(locate(args.json))
    results = []
    for name in names_of(config.stage, args.program):
        result = plan_program(config, topology, MAKERS, name, args.fresh)
        if result.seconds:
            print(f"compiled {name} in {quantity(result.seconds, 's')}", flush=True)
        results.append(result)
    print(f"\n{text(config, topology, results)}")
    plan = as_json(config, topology, results)
    if args.suggest and results[0].program == "train" and results[0].fits(topology) is False:
        found = _suggest(config, topology)
        plan["suggested"] = found and {"words": found[0], "peak": found[1].peak}
    if args.json:
        locate(args.json).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    where = f"Wrote {args.json}. " if args.json else ""
    print(f"\n{where}Next: {_next(args, results, topology)}")
