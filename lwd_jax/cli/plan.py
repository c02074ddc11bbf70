"""Compiles every program of a run for a TPU slice or GPUs, on any machine, and tells whether it fits and how fast it
can be.

Nothing runs and no weight is read. `pip install libtpu` brings the TPU compiler, the extra [cuda] that for GPUs;
without them the memory of the state is evaluated by shape, and the table says what is missing. A slice is KIND:SHAPE in
chips: v5e:4x4, v5p:2x2x4, v6e:16x16, tpu7x:2x2x1; GPUs are counted, h200:8; cpu:8 stands for devices of this machine.
"""

import argparse
import json
import shlex

import jax
from etils.epath import Path

from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import Config
from lwd_jax.errors import UserError
from lwd_jax.files import absolute, in_bucket, locate
from lwd_jax.plan.compile import plan_program
from lwd_jax.plan.flags import as_words, flags_of
from lwd_jax.plan.programs import Makers, names_of
from lwd_jax.plan.result import Result
from lwd_jax.plan.search import Try, suggest, sweep
from lwd_jax.plan.table import as_json, machines, quantity, sweep_head, sweep_json, sweep_row, sweep_text, text
from lwd_jax.plan.topology import GIB, Topology, open_topology, parse
from lwd_jax.sample.generate import make_decoder, make_sampler

EXAMPLE = "lwd plan --config=configs/stage2_sd3_1024.py --topology v5e:4x4 --json plan.json"
TRIES = 6  # of a sweep: some minutes each, where they are not kept from an earlier one
MAKERS = Makers(make_sampler, make_decoder)


class _PrintFlags(argparse.Action):
    """As --version does: prints and ends."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(as_words(flags_of(values)))
        parser.exit()


def arguments(parser) -> None:
    parser.add_argument("--config", required=True, help="file of configs/, or a config.json; --config.a.b=value")
    parser.add_argument("--topology", required=True, help="KIND:SHAPE, such as v5p:4x4x4")
    parser.add_argument("--num_slices", type=int, default=1, help="slices of that shape (default %(default)s)")
    parser.add_argument(
        "--program",
        choices=("all", "train", "encode", "sample", "decode"),
        help="what to compile; sample decodes too (default all; with --sweep, nothing beside it)",
    )
    parser.add_argument("--suggest", action="store_true", help="if the train step does not fit, try what makes it fit")
    parser.add_argument(
        "--sweep",
        nargs="?",
        type=int,
        const=TRIES,
        metavar="N",
        help="find the best mesh, remat policy and batch of the train step for the topology; compiles at most N "
        "(default %(const)s), the config as it is among them",
    )
    parser.add_argument("--fresh", action="store_true", help="compile again what is kept from an earlier plan")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="for TPU slices: end the compiler once the memory is laid out, in half a minute to some minutes. What is "
        "left out is machine code: 0.1 to 0.2 GiB of a chip, of stage 1 up to 1, the compiler's cycles, and the proof "
        "that it can be made",
    )
    parser.add_argument(
        "--flags",
        action=_PrintFlags,
        metavar="KIND",
        help="print the flags that plans are compiled with and runs are launched with, for LIBTPU_INIT_ARGS (GPUs: "
        "XLA_FLAGS), and end; a chip kind or an accelerator type such as v5litepod-16, gpu",
    )
    parser.add_argument("--json", help="file to write the figures to")


def _check_writable(file: Path) -> None:
    """Before minutes of compiling."""
    folder = absolute(file).parent
    if not in_bucket(folder) and not folder.is_dir():
        raise UserError(f"--json: there is no folder '{folder}'.")
    if file.is_dir():
        raise UserError(f"--json: '{file}' is a folder; name a file.")


def _plan(args, config: Config, topology: Topology) -> list[Result]:
    """The results of the programs that were asked for, printed."""
    if args.program is None and args.sweep is not None:
        return []
    results = []
    for name in names_of(config.stage, args.program or "all"):
        result = plan_program(config, topology, MAKERS, name, args.fresh, args.fast)
        if result.seconds:
            done = "laid out" if result.memory and result.memory.code is None else "compiled"
            print(f"{done} {name} in {quantity(result.seconds, 's')}", flush=True)
        results.append(result)
    print(f"\n{text(config, topology, results)}")
    return results


def _suggest(args, config: Config, topology: Topology) -> Try | None:
    def on_try(tried: Try) -> None:
        peak = "not known" if tried.result.peak is None else f"{tried.result.peak / GIB:.2f} GiB"
        print(f"  {tried.words}: peak {peak}, {'fits' if tried.result.fits(topology) else 'does not fit'}", flush=True)

    print("\nWhat makes the train step fit:")
    found = suggest(config, topology, MAKERS, on_try, fresh=args.fresh, fast=args.fast)
    print(f"Add {found.words}" if found else "Nothing that was tried: take a larger slice.")
    return found


def _suggested(args, config: Config, topology: Topology, results: list[Result]) -> dict:
    """What --suggest adds to the plan; says so where there is nothing to suggest."""
    fits = next((result.fits(topology) for result in results if result.program == "train"), None)
    if fits is False:
        found = _suggest(args, config, topology)
        return {"suggested": found and {"words": found.words, "peak": found.result.peak}}
    why = "whether the train step fits is not known" if fits is None else "the train step fits as it is"
    print(f"\nNothing to suggest: {why}.")
    return {}


def _sweep(args, config: Config, topology: Topology) -> tuple[dict, Try | None]:
    """(what plan["sweep"] becomes, the best settings), printed as it goes on."""
    print(f"\nThe train step of {config.name or 'the run'} on {machines(topology)}:", flush=True)
    print(sweep_head(), flush=True)

    def on_try(tried: Try) -> None:
        print(sweep_row(tried, topology), flush=True)

    found = sweep(config, topology, MAKERS, args.sweep, on_try, fresh=args.fresh, fast=args.fast)
    print(f"\n{sweep_text(config, topology, found)}")
    return sweep_json(config, topology, found), found.best


def _next(args, results: list[Result], topology: Topology, best: Try | None) -> str:
    added = best.words.split() if best else []
    run = shlex.join([f"--config={args.config}", *args.overrides, *added])
    if any(result.fits(topology) is False for result in results) and not args.suggest and not best:
        return f"lwd plan {run} --topology {args.topology} --program train --suggest"
    if args.sweep is not None and best is None:
        return f"lwd plan {run} --topology {args.topology} --sweep {2 * args.sweep}, or a larger slice"
    return f"lwd train {run} --workdir=WORKDIR, on {topology.name}"


def run(args) -> None:
    if args.sweep is not None and args.sweep < 1:
        raise UserError(f"--sweep: {args.sweep} tries find nothing.")
    config = read_config(args.config, args.overrides)
    if parse(args.topology, args.num_slices).chip.platform == "tpu":
        jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    topology = open_topology(args.topology, args.num_slices)
    if args.fast and topology.chip.platform != "tpu":
        raise UserError(f"--fast is of the TPU compiler; {args.topology} is compiled to the end.")
    if args.json:
        _check_writable(locate(args.json))
    results, best = _plan(args, config, topology), None
    plan = as_json(config, topology, results)
    if args.suggest and results:
        plan |= _suggested(args, config, topology, results)
    if args.sweep is not None:
        plan["sweep"], best = _sweep(args, config, topology)
    if args.json:
        locate(args.json).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    where = f"Wrote {args.json}. " if args.json else ""
    print(f"\n{where}Next: {_next(args, results, topology, best)}")
