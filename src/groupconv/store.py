"""Finished parts of a run, kept in its folder so that the same run goes on where it stopped."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupconv.errors import DataError, GroupConvError
from groupconv.files import replacing, write_text

log = logging.getLogger(__name__)

_FOLDER, _INPUTS, _LOCK = ".unfinished", "inputs.json", "lock"

T = TypeVar("T")


@contextmanager
def claimed(folder: Path, inputs: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
    """A folder for one run at a time, and for one run until it ends.

    A run that was killed has left a note of its inputs. It can go on; another can't begin.

    Args:
        folder: of the results.
        inputs: name to a plain value, of all that the result depends on.
        restart: whether to forget an unfinished run, whatever its inputs.

    Raises:
        DataError: another run writes there, or one with other inputs, which are named, has not
            ended.
    """
    kept = folder / _FOLDER
    kept.mkdir(exist_ok=True)
    lock, note = FileLock(kept / _LOCK, timeout=0), kept / _INPUTS
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            f"out={str(folder)!r}: another run writes there; wait for its end or give another "
            "folder"
        ) from None
    try:
        if restart:
            _empty(kept)
        _compare(folder, note, inputs)
        write_text(note, json.dumps(inputs, indent=1))
        try:
            yield
        except GroupConvError:
            # It has ended: what it found serves whatever is asked for next.
            note.unlink(missing_ok=True)
            raise
    finally:
        lock.release()
        # The parts found so far, if any, serve the next run.
        if kept.exists() and {path.name for path in kept.iterdir()} <= {_LOCK}:
            shutil.rmtree(kept)


def _empty(kept: Path) -> None:
    """Remove all but the lock, which is held."""
    for path in kept.iterdir():
        if path.name != _LOCK:
            path.unlink()


def _compare(folder: Path, note: Path, inputs: Mapping[str, Any]) -> None:
    if not note.exists():
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        log.warning("%s is damaged (%s): it is not known what the unfinished run was", note, error)
        return
    # As they would be read from the file.
    now = json.loads(json.dumps(inputs))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise DataError(
            f"out={str(folder)!r} holds an unfinished run with other inputs: {'; '.join(changed)}. "
            "Run it again as it was to go on, or with restart=True (--restart) to forget it"
        )


class Store:
    """Results by name; those of other inputs are not found, nor those of a damaged file.

    Args:
        folder: of the run, or None to keep nothing.
        inputs: all that the results depend on, as a fingerprint.
    """

    def __init__(self, folder: Path | None, inputs: str) -> None:
        self.folder = None if folder is None else folder / _FOLDER
        self.inputs = inputs

    def read(self, name: str) -> Any:
        """The plain values kept under a name, or None."""
        return self._read(name, ".json", lambda path: json.loads(path.read_text()))

    def write(self, name: str, values: Any) -> None:
        """Keep plain values under a name."""
        path = self._path(name, ".json")
        if path is not None:
            write_text(path, json.dumps(values))

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under a name, on the CPU, or None."""
        return self._read(name, ".safetensors", load_file)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        path = self._path(name, ".safetensors")
        if path is not None:
            with replacing(path) as temporary:
                save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, temporary)

    def clear(self) -> None:
        """Forget everything: the run has ended."""
        if self.folder is not None and self.folder.exists():
            _empty(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _read(self, name: str, suffix: str, load: Callable[[Path], T]) -> T | None:
        path = self._path(name, suffix)
        if path is None or not path.exists():
            return None
        try:
            return load(path)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("%s is damaged (%s): %s is computed again", path, error, name)
            return None

    def _path(self, name: str, suffix: str) -> Path | None:
        if self.folder is None:
            return None
        self.folder.mkdir(exist_ok=True)
        digest = hashlib.sha256(f"{self.inputs}\n{name}".encode()).hexdigest()
        return self.folder / (digest[:32] + suffix)


def fingerprint(tensors: Iterable[tuple[str, Tensor]], *values: object) -> str:
    """A text that differs where any tensor or value does."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
