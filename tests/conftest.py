"""Every test runs on eight simulated CPU devices; the variables must be set before jax is imported."""

import atexit
import gc
import os
import shutil
import tempfile

from compiling import QUICKLY

# Tracing makes many small objects that live on: looking for garbage among them took an eighth of the time.
gc.set_threshold(100_000, 50, 20)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " " + QUICKLY
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A worker has one core: PyTorch's threads, on all of them, would wait for those of the other workers at every layer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one worker or command has compiled, the others read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lwd-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# So is what takes a tenth of a second: with JAX's own second most is compiled again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


def pytest_collection_modifyitems(items):
    """The longest test begins first: with two workers it would otherwise run alone at the end."""
    items.sort(key=lambda item: item.originalname != "test_quickstart_from_photographs_to_report")


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX's own checks of what cuDNN takes, without the library and the chip: its attention can be traced."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
