"""How fast is a training step of stage 2, against the same step in PyTorch with diffusers, and what does the mask cost?

Same weights, batch, loss, clipping and AdamW; master weights in float32, products in --dtype. Velocities and gradients
of both, on the same noise and times, must agree before anything is timed. The masked and the plain step share one
state. Both frameworks have the huge pages that `lwd` asks for; GLIBC_TUNABLES="" in the environment: neither has.

    python benchmarks/step.py                                              # a small model, on a CPU
    python benchmarks/step.py --variant sd3-medium --part 8 --batch 1      # one block in eight of SD3-medium, on a CPU
    python benchmarks/step.py --backbone flux                              # a small FLUX, on a CPU
    python benchmarks/step.py --variant sd3-medium --resolution 1024 --dtype bfloat16 --batch 4 --compile   # a GPU
"""

import math
import os
import statistics
import sys
import time

from lwd_jax.cli.huge_pages import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()  # before anything else is imported
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory too

import diffusers  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import Family, chosen, conditioning, parser, random_batch, run_config, title  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from saliency import with_torch  # noqa: E402

from lwd_jax.objective.matching import matching_loss  # noqa: E402
from lwd_jax.parallel.mesh import make_mesh  # noqa: E402
from lwd_jax.plan.flops import TRAINING, backbone_forward  # noqa: E402
from lwd_jax.train.program import backbone_stage, build_program  # noqa: E402
from lwd_jax.weights.model import abstract_params  # noqa: E402
from lwd_jax.weights.table import read, write  # noqa: E402

SCALING, SHIFT = 1.5305, 0.0609  # SD3's autoencoder
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by a part of the device's name
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}  # |difference| / |PyTorch's|, 2-norms, of velocities and of gradients
MASKS = {"masked": "time", "plain": "everywhere"}


def scaled(z):
    return (z - SHIFT) * SCALING


# ----------------------------------------------------------------------------------------------------------- PyTorch


class TorchStep:
    """The stage-2 step as one writes it with diffusers: autocast over float32 masters, fused AdamW."""

    def __init__(self, args, family: Family, config, batch: dict[str, np.ndarray]):
        self.predict = family.predict
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast = {"device_type": self.device, "dtype": torch.bfloat16, "enabled": args.dtype == "bfloat16"}
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = getattr(diffusers, family.model.class_name)(**family.model.to_foreign(config))
        if args.remat != "none":
            self.model.enable_gradient_checkpointing()
        self.call = torch.compile(self.model) if args.compile else self.model
        settings = run_config(args, "time").optimizer
        self.clip = settings.clip
        matrices = [p for p in self.model.parameters() if p.ndim > 1]  # biases and norms do not decay
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate, betas=(settings.b1, settings.b2), eps=settings.eps, fused=True,
        )  # fmt: skip
        self.batch = {name: self.tensor(value) for name, value in batch.items()}

    def tensor(self, value: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(value)).to(self.device)
        return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor

    def velocity(self, z_t, t) -> torch.Tensor:
        with torch.autocast(**self.autocast):
            return self.predict(self.call, z_t, t, self.batch["tokens"], self.batch["pooled"]).float()

    def loss(self, z0, noise, t, masked: bool) -> torch.Tensor:
        sigma = t[:, None, None, None]
        error = self.velocity((1 - sigma) * z0 + sigma * noise, t) - (noise - z0)
        return ((with_torch(z0, t)[1] * error if masked else error) ** 2).mean()

    def gradients(self, *given) -> dict[str, np.ndarray]:
        """Of the masked loss: name -> array."""
        self.loss(*given, masked=True).backward()
        found = {name: parameter.grad.cpu().numpy() for name, parameter in self.model.named_parameters()}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def step(self, masked: bool) -> None:
        sample = self.batch["mean"] + self.batch["std"] * torch.randn_like(self.batch["std"])
        t = torch.sigmoid(torch.randn(sample.shape[0], device=self.device))
        loss = self.loss(scaled(sample), torch.randn_like(sample), 3 * t / (1 + 2 * t), masked)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        else:
            loss.item()


# --------------------------------------------------------------------------------------------------------------- JAX


class JaxSteps:
    """The masked and the plain program of this package, over one state."""

    def __init__(self, args, family: Family, config, batch: dict[str, np.ndarray], params):
        self.module = family.model.build(config, dtype=jnp.dtype(args.dtype), remat=args.remat)
        self.matching = run_config(args, MASKS["masked"]).matching
        self.batch, self.key = jax.device_put(batch), jax.random.key(0)
        mesh = make_mesh(run_config(args, "time").mesh)
        latent = batch["mean"].shape[1:]

        def program(mask):
            run = run_config(args, mask)
            stage = backbone_stage(run, self.module, lambda _: params, scaled, latent, args.text)
            return build_program(run, mesh, stage)

        self.programs = {name: program(mask) for name, mask in MASKS.items()}
        self.state = self.programs["masked"].init(self.key, params)
        self.compiled, self.seconds = {}, {}

    def compile(self) -> None:
        for name, made in self.programs.items():
            start = time.perf_counter()
            self.compiled[name] = made.step.compile(self.state, self.batch, self.key)
            self.seconds[name] = time.perf_counter() - start

    def predict(self, params, z_t, t):
        return self.module.apply({"params": params}, z_t, t, conditioning(self.batch, self.module.config))

    def velocity(self, z_t, t) -> jax.Array:
        return jax.jit(self.predict)(self.state.params, z_t, t)

    def gradients(self, z0, noise, t):
        """Of the masked loss, with respect to the parameters."""

        def loss(params):
            def predict(z_t, t, _):
                return self.predict(params, z_t, t)

            return matching_loss(predict, z0, None, t, noise, self.matching)[0].mean()

        return jax.jit(jax.grad(loss))(self.state.params)

    def counted(self, what: str) -> float:
        """How much more of `what` XLA counts for the masked than for the plain step, as a share.

        It counts the body of a scan once, so that of a whole step the share is less than that.
        """
        counts = {name: compiled.func.cost_analysis()[what] for name, compiled in self.compiled.items()}
        return counts["masked"] / counts["plain"] - 1

    def step(self, name: str) -> None:
        self.state, metrics = self.compiled[name](self.state, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))


# ------------------------------------------------------------------------------------------------------ measurement


def relative(mine, other) -> float:
    """|mine - other| / |other|, 2-norms over all leaves."""
    pairs = list(zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True))
    apart = sum(float(np.sum((np.asarray(a, np.float64) - np.asarray(b)) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in pairs)) ** 0.5


def check_agreement(args, family: Family, config, theirs: TorchStep, ours: JaxSteps) -> dict[str, float]:
    """How far apart both are on the same latents, noise and times: the velocity, the masked loss's gradient.

    Raises:
      SystemExit: by more than rounding.
    """
    rng = np.random.default_rng(1)
    z0, noise = rng.standard_normal((2, *ours.batch["mean"].shape)).astype(np.float32)
    t = rng.uniform(size=args.batch).astype(np.float32)
    given = tuple(map(theirs.tensor, (z0, noise, t)))
    with torch.no_grad():
        velocity = theirs.velocity(given[0], given[2]).permute(0, 2, 3, 1).cpu().numpy()
    gradients = theirs.gradients(*given)
    mine = dict(write(family.model.rows(config), ours.gradients(z0, noise, t)))
    compared = sorted(gradients)  # not SD3's position table, which is no parameter of diffusers' model
    apart = {
        "velocities": relative(ours.velocity(z0, t), velocity),
        "gradients": relative([mine[name] for name in compared], [gradients[name] for name in compared]),
    }
    for name, value in apart.items():
        if not value <= AGREE[args.dtype]:
            raise SystemExit(f"The {name} of JAX and PyTorch differ by {value:.1e} (relative). Nothing was timed.")
    return apart


def timed(steps: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step. All are run half of `repeats` times in a row, then the other half in the opposite order,
    with two more before each half that do not count.

    Of one framework only: a step that follows the other framework's waits for its idle threads, which spin, and for
    the memory that it gave back. Nor one of each kind in turn: on a CPU the temporaries of one program, freed, leave
    holes that those of the other do not fit, and at true width one of the two was 15 % slower than on its own.
    """
    seconds = {name: [] for name in steps}
    for half in ([*steps], [*reversed(steps)]):
        for name in half:
            for i in range(math.ceil(repeats / 2) + 2):
                start = time.perf_counter()
                steps[name]()
                if i >= 2:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def report(args, config, seconds: dict[str, list[float]], apart: dict[str, float], ours: JaxSteps) -> None:
    side = args.resolution // config.latent_factor
    flops = args.batch * TRAINING * backbone_forward(config, side, side, args.text)
    device = jax.devices()[0].device_kind
    peak = next((value for name, value in PEAK.items() if name in device and args.dtype == "bfloat16"), None)
    what = f"{flops / 1e12:.3g} TFLOP a step by formula"
    table = Table(title=f"Stage-2 step: {title(args, config)}, on {device}; {what}")
    for name in ("step", "median ms", "fastest ms", "pictures/s", "TFLOP/s", "MFU", "speed-up"):
        table.add_column(name, justify="left" if name == "step" else "right")
    first = min(next(iter(seconds.values())))
    for name, times in seconds.items():
        fastest = min(times)  # other programs of the machine only ever add to it
        table.add_row(
            name, f"{1e3 * statistics.median(times):.1f}", f"{1e3 * fastest:.1f}", f"{args.batch / fastest:.3g}",
            f"{flops / fastest / 1e12:.3g}", f"{flops / fastest / peak:.1%}" if peak else "-",
            f"{first / fastest:.2f}x",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    masked, plain = seconds["JAX, masked"], seconds["JAX, plain"]
    fastest, median = min(masked) / min(plain) - 1, statistics.median(masked) / statistics.median(plain) - 1
    console.print(f"Masked against plain: fastest {fastest:+.2%}, median {median:+.2%}, {len(masked)} steps each.")
    more = ", ".join(f"{ours.counted(what):+.3%} {what}" for what in ("flops", "bytes accessed"))
    console.print(f"By XLA's count the masked step differs by at most {more}.")
    if apart:
        agreement = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        console.print(f"JAX and PyTorch differ by (relative): {agreement}.")
    console.print("Compiling: " + ", ".join(f"{name} {value:.1f} s" for name, value in ours.seconds.items()) + ".")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--skip-torch", action="store_true", help="time JAX alone; its weights are diffusers' still")
    args = arguments.parse_args()
    family, config = chosen(args)
    batch = random_batch(args, config)
    theirs = TorchStep(args, family, config, batch)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in theirs.model.state_dict().items()}
    params = read(family.model.rows(config), tensors, abstract_params(family.model, config))
    ours = JaxSteps(args, family, config, batch, params)
    seconds, apart = {}, {}
    if not args.skip_torch:
        apart = check_agreement(args, family, config, theirs, ours)
        kind = "PyTorch compiled" if args.compile else "PyTorch"
        steps = {f"{kind}, {name}": lambda name=name: theirs.step(name == "masked") for name in MASKS}
        seconds = timed(steps, args.repeats)
    ours.compile()
    steps = {f"JAX, {name}": lambda name=name: ours.step(name) for name in MASKS}
    seconds |= timed(steps, args.repeats)
    report(args, config, seconds, apart, ours)


if __name__ == "__main__":
    main()
