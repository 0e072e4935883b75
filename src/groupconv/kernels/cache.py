"""The code cache: a private folder of generated code, one checked file for each entry.

What is read from here is executed, so the folder must belong to the user and to nobody else, and
a file counts only if its digest is right; anything else is rebuilt. A right digest is believed:
only the user can write here. Files appear by renaming, so several processes may read and write at
once.
"""

import functools
import hashlib
import os
import stat
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import llvmlite

from groupconv.version import __version__

# Bytes of all entries together; the least recently used are removed first.
LIMIT = 128 * 2**20
_SUFFIX, _PART = ".kernel", ".part"
# Seconds after which a file is no longer being written.
_ABANDONED = 3600
_DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """Where entries lie: ``GROUPCONV_CACHE``, or ``groupconv`` in the user's cache folder."""
    if chosen := os.environ.get("GROUPCONV_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "groupconv"


def place() -> str:
    """The folder, or why there is none, as text."""
    try:
        return str(folder())
    except RuntimeError as error:
        return f"no folder: {error}"


def why_not() -> str | None:
    """Why no cache is kept, or None when one is. Makes the folder where it is missing."""
    try:
        path = folder()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except (OSError, RuntimeError) as error:
        return f"the folder can't be made: {error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a folder"
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if os.name == "posix" and found.st_mode & 0o077:
        return f"{path} is open to other users; expected mode 0700"
    return None if os.access(path, os.W_OK) else f"{path} can't be written to"


def read(key: str) -> bytes | None:
    """The entry of ``key``, or None where there is none that can be trusted."""
    if why_not() is not None:
        return None
    path = _path(key)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        with open(handle, "rb") as file:
            data = file.read()
        # The clock of the file system is a coarse one.
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
    except OSError:
        # Missing, or removed just now by another process: not there either way.
        return None
    content = data[_DIGEST:]
    return content if _digest(key, content) == data[:_DIGEST] else None


def write(key: str, content: bytes) -> None:
    """Keep ``content`` if there is a usable folder; a full disk is a warning, not an error."""
    if why_not() is not None:
        return
    try:
        handle, name = tempfile.mkstemp(dir=folder(), suffix=_PART)
        try:
            with open(handle, "wb") as file:
                file.write(_digest(key, content) + content)
            os.replace(name, _path(key))
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"the code cache {folder()} can't be written to: {error}", stacklevel=2)
    _shrink()


@dataclass(frozen=True)
class Usage:
    """How many entries there are, and their bytes."""

    entries: int
    bytes: int


def usage() -> Usage:
    sizes = [status.st_size for _, status in _entries()]
    return Usage(len(sizes), sum(sizes))


def clear() -> Usage:
    """Remove every entry; returns what there was."""
    before = usage()
    for entry, _ in _entries():
        entry.unlink(missing_ok=True)
    _sweep()
    return before


def key(*parts: object) -> str:
    """The name of an entry made from ``parts`` by this version of the generator."""
    text = "\n".join([_generator(), *map(repr, parts)])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _generator() -> str:
    """Names all code that has a part in what is generated."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"{__version__} llvmlite {llvmlite.__version__} {digest.hexdigest()}"


def _digest(key: str, content: bytes) -> bytes:
    # With the key, so that an entry renamed to another's name is refused.
    return hashlib.sha256(key.encode() + content).digest()


def _path(key: str) -> Path:
    return folder() / f"{key}{_SUFFIX}"


def _entries(suffix: str = _SUFFIX) -> list[tuple[Path, os.stat_result]]:
    """Files of the folder, the least recently used first; none where there is no folder."""
    found = []
    try:
        paths = list(folder().glob(f"*{suffix}"))
    except (OSError, RuntimeError):
        return []
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            # Removed just now by another process.
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((path, status))
    return sorted(found, key=lambda entry: entry[1].st_mtime_ns)


def _shrink() -> None:
    """Remove the least recently used entries until the rest fits the limit."""
    found = _entries()
    total = sum(status.st_size for _, status in found)
    for path, status in found:
        if total <= LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= status.st_size
    _sweep()


def _sweep() -> None:
    """Remove what writers that were killed left behind."""
    for path, status in _entries(_PART):
        if time.time() - status.st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
