"""GPUs to compile for on a machine that has none: XLA's compiler for them takes a description instead.

It comes with the extra [cuda], and so does cuDNN, whose version attention asks for when it is traced. What it cannot do
without a GPU is to try out kernels, so that products and convolutions may get other ones than in a run.
"""

import importlib.util
import os
from typing import Any, NamedTuple

from jax.experimental import topologies

from lwd_jax.errors import UserError

NO_COMPILER = "Compiling for {name} needs {count} such GPUs here, or their compiler: pip install 'lwd_jax[cuda]'."
# Triton's products take sizes of tiles that are tried out; without a GPU some find none, and the compiler gives up.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_HOST = 8  # GPUs that NVLink joins
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class Target(NamedTuple):
    """What the compiler asks of a GPU, beside its memory.

    Attributes:
      device: its name, as CUDA tells it.
      capability: CUDA's compute capability.
      cores, units: streaming multiprocessors, and float32 units of each.
      shared: bytes of shared memory of a multiprocessor; a block may have 1 KiB less.
      cache: bytes of the level-2 cache.
      clock: GHz.
    """

    device: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float


# NVIDIA's architecture papers of the A100 and H100, and the table of compute capabilities of the CUDA C++ guide.
TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 40 << 20, 1.41),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
    "h200": Target("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
}


def has_compiler() -> bool:
    """Whether XLA's compiler for GPUs is installed, and cuDNN."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("nvidia") is None:
        return False
    found = any(importlib.util.find_spec(name) for name in _PLUGINS)
    return found and importlib.util.find_spec("nvidia.cudnn") is not None


def allow_none() -> None:
    """Lets jax load the compiler where there is no GPU; to be called before jax looks for devices."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def _description(target: Target, memory: float, bandwidth: float) -> str:
    """The text of XLA's message GpuTargetConfigProto."""
    major, minor = target.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {target.cores}
  fpus_per_core: {target.units}
  clock_rate_ghz: {target.clock}
  device_memory_size: {memory:.0f}
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {target.cache}
  shared_memory_per_core: {target.shared}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {target.shared - 1024}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{target.device}"
"""


def devices(kind: str, count: int, memory: float, bandwidth: float) -> list[Any]:
    """Devices to compile for; no GPU is touched.

    Args:
      kind: of TARGETS.
      count: up to 8, or a multiple of 8: hosts of 8.
      memory, bandwidth: bytes, and bytes/s, of one.

    Raises:
      UserError: there is no such number of them.
    """
    if count > _HOST and count % _HOST:
        raise UserError(f"GPUs come in hosts of {_HOST}: {count} of them are no whole hosts.")
    each = min(count, _HOST)
    shape = f"1x{count // each}x{each}"  # slices, hosts of each, GPUs of each
    description = topologies.get_topology_desc(
        platform="cuda", topology=shape, target_config=_description(TARGETS[kind], memory, bandwidth)
    )
    return list(description.devices)
