"""A disk that takes no more, for tests: no file may grow beyond so many bytes."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
