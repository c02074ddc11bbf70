"""The platform that a program is traced for: kernels and the shape of loops are chosen by it."""

import contextlib
import contextvars

import jax

_PLATFORM = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def for_platform(platform: str):
    """What is traced within is for "cpu", "gpu" or "tpu", whatever runs here: to compile ahead of time."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """That of `for_platform`, or of this machine."""
    return _PLATFORM.get() or jax.default_backend()
