"""How fast is a LoRA training step, and how much memory does it take, against the same step with diffusers and PEFT?

The same model, batch, loss, clipping and AdamW over a frozen base in --dtype, with adapters in float32. That both
compute the same is a test's matter (tests/adapters/test_peft.py). Each side runs in a process of its own, so that its
peak memory is its own: on a GPU what its allocator gave out; on a CPU what XLA's program holds (the process held its
compiler too), and what PyTorch's process took beyond what it began with.

    python benchmarks/lora.py                                               # a small model, on a CPU
    python benchmarks/lora.py --variant sd3-medium --part 8 --batch 1       # one block in eight, on a CPU
    python benchmarks/lora.py --backbone flux --variant flux-dev --part 8 --batch 1
    python benchmarks/lora.py --variant sd3-medium --resolution 1024 --dtype bfloat16 --remat full   # a GPU
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys

from lwd_jax.cli.huge_pages import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()  # before anything else is imported; for both sides
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
from models import Family, chosen, parser, random_batch, run_config, title  # noqa: E402
from peft import LoraConfig  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from step import TorchStep, scaled, timed  # noqa: E402

from lwd_jax.config import Adapter  # noqa: E402
from lwd_jax.parallel.mesh import make_mesh  # noqa: E402
from lwd_jax.train.program import backbone_stage, build_program  # noqa: E402
from lwd_jax.weights.model import init_params  # noqa: E402

# The same layers under both names: the attention of both streams.
_NAMES = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
THEIRS = [f"attn.{name}" for name in _NAMES]
OURS = ("q", "k", "v", "out")


class PeftStep(TorchStep):
    """The step as one writes it with PEFT: a base that is cast and frozen, adapters in float32, autocast."""

    def __init__(self, args, family: Family, config, batch):
        self.before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        super().__init__(args, family, config, batch)
        self.model.requires_grad_(False)
        self.model.to(getattr(torch, args.dtype))
        self.model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=THEIRS))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        settings = run_config(args, "time").optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, betas=(settings.b1, settings.b2), fused=True
        )

    def count(self) -> int:
        """Parameters that train."""
        return sum(parameter.numel() for parameter in self.trained)

    def step(self) -> None:
        super().step(masked=True)

    def peak_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before


class JaxStep:
    """The compiled step of this package."""

    def __init__(self, args, family: Family, config, batch):
        adapter = Adapter(kind="lora", rank=args.rank, alpha=args.rank, targets=OURS)
        run = dataclasses.replace(run_config(args, "time"), adapter=adapter, param_dtype=args.dtype)
        dtype = jnp.dtype(args.dtype)
        module = family.model.build(config, dtype=dtype, param_dtype=dtype, remat=args.remat)

        def init(key):
            return init_params(family.model, config, key, dtype)

        stage = backbone_stage(run, module, init, scaled, batch["mean"].shape[1:], args.text)
        program = build_program(run, make_mesh(run.mesh, jax.devices()[:1]), stage)
        self.batch, self.key = jax.device_put(batch), jax.random.key(0)
        self.state = program.init(self.key)
        self.compiled = program.step.compile(self.state, self.batch, self.key)

    def count(self) -> int:
        """Parameters that train."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.opt_state[0].mu))

    def step(self) -> None:
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))

    def peak_bytes(self) -> int:
        if jax.default_backend() == "gpu":
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        memory = self.compiled.func.memory_analysis()
        sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return sizes - memory.alias_size_in_bytes


SIDES = {"diffusers + PEFT": PeftStep, "JAX": JaxStep}


def measured(args, family: Family, config) -> dict:
    """Seconds of each step, peak bytes and the number of trained parameters of one side, in this process."""
    side = SIDES[args.side](args, family, config, random_batch(args, config))
    seconds = timed({"step": side.step}, args.repeats)["step"]
    return {"seconds": seconds, "bytes": side.peak_bytes(), "count": side.count()}


def report(args, config, found: dict[str, dict]) -> None:
    table = Table(title=f"LoRA step of rank {args.rank}: {title(args, config)}")
    for name in ("", "median ms", "fastest ms", "peak GiB", "trained parameters"):
        table.add_column(name, justify="right" if name else "left")
    for name, result in found.items():
        median, fastest = (1e3 * of(result["seconds"]) for of in (statistics.median, min))
        table.add_row(name, f"{median:.1f}", f"{fastest:.1f}", f"{result['bytes'] / 2**30:.2f}", f"{result['count']:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--side", choices=sorted(SIDES), help="measure this one here; prints what was found as JSON")
    args = arguments.parse_args()
    family, config = chosen(args)
    if args.side:
        print(json.dumps(measured(args, family, config)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, *sys.argv, "--side", side]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    report(args, config, found)


if __name__ == "__main__":
    main()
