"""Finished parts of a run, kept in its folder so that the same run goes on where it stopped."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupconv.files import replacing, write_text

log = logging.getLogger(__name__)

_FOLDER = ".unfinished"

T = TypeVar("T")


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
            shutil.rmtree(self.folder)

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
