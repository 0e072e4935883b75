"""PyTorch's own thread pool: the OpenMP runtime that it has already loaded."""

import ctypes
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_RUNTIMES = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.(so[.\d]*|dylib)$")
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# The pool's threads don't survive a fork; waiting for them would hang.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Pool:
    """Addresses of functions of an OpenMP runtime, and the file that it came from."""

    parallel: int
    thread_number: int
    thread_count: int
    path: str


@functools.cache
def pool() -> Pool | None:
    """The OpenMP runtime of this process, or None where there is none to be found."""
    for path in _loaded():
        if not _RUNTIMES.search(path):
            continue
        library = ctypes.CDLL(path)
        try:
            functions = (
                library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
            )  # fmt: skip
        except AttributeError:
            continue
        parallel, number, count = (
            ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions
        )
        return Pool(parallel, number, count, path)
    return None


def _loaded() -> list[str]:
    """Paths of the shared libraries in this process; PyTorch's own come first."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()]
    else:
        paths = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("lib*")]
    unique = dict.fromkeys(path for path in paths if path.startswith("/"))
    return sorted(unique, key=lambda path: "torch" not in path)


def threads() -> int:
    """Threads that a kernel may use: PyTorch's setting; one after a fork."""
    return 1 if _forked or pool() is None else torch.get_num_threads()


@contextmanager
def own_threads() -> Iterator[None]:
    """What PyTorch computes in the block uses :func:`threads` threads: after a fork it would wait
    for those that are gone."""
    before = torch.get_num_threads()
    if threads() == before:
        yield
        return
    torch.set_num_threads(threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
