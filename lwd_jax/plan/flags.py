"""Flags of XLA per chip kind: the one table of them. `lwd plan` compiles with them and prints them (`--flags KIND`),
and the launchers start runs with what it prints.

Here stand flags whose default is not what the documents suggest, or is worse by a plan. The documents are, of TPUs,
openxla.org/xla/flags_guidance; of GPUs, openxla.org/xla/gpu_optimization_levels, and the defaults in XLA's
debug_options_flags.cc. What is the default already is not repeated (the latency hiding scheduler and the asynchronous
all-gathers of TPUs). Left at the default although another value is suggested: the pipelining of all-gathers over ICI,
which holds the weights of two layers. And xla_tpu_run_space_to_batch with its _on_new_platforms (off only together):
without them the gradient of an autoencoder's block at 512 px takes 22 instead of 25 million cycles by the compiler's
estimate and moves 2.0 instead of 6.7 GB on a v5e, but one of 512 channels takes five times as long to compile.
"""

import re

from lwd_jax.errors import choose

_TPU = {
    # All-to-all beside arithmetic; default: it waits. The exchange of Ulysses is one.
    "xla_tpu_enable_async_all_to_all": True,
    # From how many MiB on a product is worked in parts while its operand or result goes around the ring; here never.
    # With fsdp = 16 there are 16 parts, each reads the whole other operand again, and the gradients' parts are thin.
    # SD3-medium at 1024 px on v5e:4x4, without and with the parts: 68 and 150 GB over HBM, 10.9 and 14.4 GB sent by a
    # chip and step, 2.70 and 2.80 GiB, 464 and 721 ms by the compiler's estimate.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_V5E = {
    # All-reduces beside arithmetic, in parts; default: only all-gathers. Needs xla_tpu_enable_async_collective_fusion,
    # which is on. The guide has this row for v5e alone.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}
_GPU = {
    # Collectives beside arithmetic; off by default, for it takes longer to compile. The flags that pipelined them in
    # loops are gone from jax 0.12 on, and XLA ends a program that is given a flag it does not know.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
FLAGS = {  # kind of plan.topology.CHIPS, or all GPUs -> flag -> value
    "v5e": _TPU | _V5E,
    "v5p": _TPU,
    "v6e": _TPU,
    "tpu7x": _TPU,
    **dict.fromkeys(("gpu", "a100", "h100", "h200"), _GPU),
    "cpu": {},
}
# What else the kinds are called: accelerator types of Cloud TPU (v5litepod-16) and of GKE (tpu-v5-lite-podslice).
_NAMES = ((r"v5(lite|-lite|e)", "v5e"), (r"v5p", "v5p"), (r"v6e", "v6e"), (r"tpu7x", "tpu7x"))


def flags_of(name: str) -> dict[str, bool | int]:
    """The flags of a chip kind, by its name here, by that of a topology (v5e:4x4) or by an accelerator type of a cloud.

    Raises:
      UserError: no such kind.
    """
    kind = name.lower().partition(":")[0]
    known = next((row for pattern, row in _NAMES if re.match(rf"(tpu-?)?{pattern}", kind)), kind)
    return choose(FLAGS, known, "chip kind")


def as_words(flags: dict[str, bool | int]) -> str:
    """As XLA reads them in LIBTPU_INIT_ARGS and XLA_FLAGS."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
