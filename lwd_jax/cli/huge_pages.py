"""Huge pages for the memory of a process.

On a CPU, XLA takes a program's temporaries anew at every call, and the kernel hands them out page by page: 35,000 pages
of 4 KiB in a step of the quickstart's backbone, a fifth of its time. In pages of 2 MiB it is no time at all. glibc asks
for those where its tunable says so (from 2.35 on), and reads it only when a process starts.
"""

import os
import re
import sys
from collections.abc import Mapping

from etils.epath import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"


def kernel_mode() -> str:
    """Who gets huge pages: "always" everybody, "madvise" who asks, "never" nobody; "" where there is no telling."""
    try:
        return re.search(r"\[(\w+)]", MODE.read_text())[1]
    except (OSError, TypeError):
        return ""


def _libc() -> str:
    """Name and version of the C library, "glibc 2.36"; "" of others."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # no such call, name or value: not glibc
        return ""


def to_be_asked_for(environment: Mapping[str, str], mode: str, libc: str) -> bool:
    """Whether a process gets huge pages only if it starts with the tunable, and has none of its user's."""
    version = re.fullmatch(r"glibc (\d+)\.(\d+)", libc)
    knows = version is not None and tuple(map(int, version.groups())) >= (2, 35)
    return knows and mode == "madvise" and VARIABLE not in environment


def ask_for_huge_pages() -> None:
    """Starts this program again, as the same process, with the tunable; does nothing where that does not help.

    To be called first thing: what the program did before is done twice.
    """
    if to_be_asked_for(os.environ, kernel_mode(), _libc()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: TUNABLE})
