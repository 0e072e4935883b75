"""Compiled networks as one file: graph, weights, and the code that was chosen and made.

The file is a zip archive: ``program.json``, ``weights.safetensors``, and the object code of every
kernel and step. On another instruction set, or in another version of the generator, the code is
made anew. Native code is loaded from the file: load only files that you trust.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from groupconv.compiler import records, runner
from groupconv.compiler.graph import Graph
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.compiler.steps import code as step_code
from groupconv.errors import DataError
from groupconv.files import replacing
from groupconv.kernels import cache, jit, kernel
from groupconv.kernels.tile import Tile

_FORMAT = 3
_HEAD, _WEIGHTS = "program.json", "weights.safetensors"


def save(
    programs: Iterable[tuple[Program, pytree.TreeSpec]],
    library: Library,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write programs of one library, each with the structure of what it returns.

    Args:
        metadata: of the user's.

    Raises:
        DataError: an argument of a part that PyTorch runs can't be written, or the file can't.
    """
    tensors: dict[str, Tensor] = {}
    graphs = [
        {
            "graph": records.encode(program.graph_with_weights(), tensors),
            "structure": _structure(structure),
        }
        for program, structure in programs
    ]
    kernels = library.kernels
    codes = {
        f"kernel {name}": kernel.compile(made.spec, made.machine, made.tile)
        for name, made in kernels.items()
    }
    for symbol, step in library.steps.items():
        codes[symbol] = step_code.object_code(step, library.machine)
    codes[runner.name(library.machine)] = runner.object_code(library.machine)
    head = {
        "format": _FORMAT,
        "metadata": dict(metadata or {}),
        "made": _maker(library),
        "programs": graphs,
        "tiles": {name: asdict(made.tile) for name, made in kernels.items()},
        "codes": {name: hashlib.sha256(code).hexdigest() for name, code in codes.items()},
    }
    try:
        with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr(_HEAD, json.dumps(head))
            archive.writestr(_WEIGHTS, safetensors.torch.save(tensors))
            for number, code in enumerate(codes.values()):
                archive.writestr(_file(number), code)
    except OSError as error:
        raise DataError(f"save: path={str(path)!r} can't be written: {error}") from error


def load(path: str | Path) -> tuple[list[tuple[Program, pytree.TreeSpec]], Library]:
    """What :func:`save` was given.

    Raises:
        DataError: the file can't be read, is damaged, or of another version.
    """
    library = Library()
    with _readable(path), zipfile.ZipFile(path) as archive:
        head = json.loads(archive.read(_HEAD))
        if head["format"] != _FORMAT:
            raise DataError(
                f"load_compiled: path={str(path)!r} has format {head['format']}, not {_FORMAT}"
            )
        graphs = _graphs(head, safetensors.torch.load(archive.read(_WEIGHTS)))
        codes = _codes(head, archive)
        if head["made"] == _maker(library):
            tiles = {name: Tile(**tile) for name, tile in head["tiles"].items()}
            library.saved = {name: (tile, codes[f"kernel {name}"]) for name, tile in tiles.items()}
            for symbol in codes.keys() - {f"kernel {name}" for name in tiles}:
                jit.address(codes[symbol], symbol)
    return [(Program(graph, library), structure) for graph, structure in graphs], library


def _graphs(
    head: dict[str, Any], tensors: dict[str, Tensor]
) -> list[tuple[Graph, pytree.TreeSpec]]:
    return [
        (records.decode(entry["graph"], tensors), pytree.treespec_loads(entry["structure"]))
        for entry in head["programs"]
    ]


def _codes(head: dict[str, Any], archive: zipfile.ZipFile) -> dict[str, bytes]:
    codes = {name: archive.read(_file(number)) for number, name in enumerate(head["codes"])}
    for name, code in codes.items():
        if hashlib.sha256(code).hexdigest() != head["codes"][name]:
            raise ValueError(f"the code of {name} is damaged")
    return codes


def _maker(library: Library) -> str:
    """For whom the code is, and who made it: only then does it run, and do what it should."""
    machine = library.machine
    return cache.key(machine, step_code.generator(), runner.emit(machine, "run"))


def _structure(structure: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(structure)
    except NotImplementedError as error:
        raise DataError(f"save: what the network returns can't be written: {error}") from error


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turns what reading a file that is not ours, or not whole, may raise into a DataError."""
    try:
        yield
    except (
        OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, NotImplementedError,
        RuntimeError, zipfile.BadZipFile, SafetensorError,
    ) as error:  # fmt: skip
        raise DataError(f"load_compiled: path={str(path)!r} can't be read: {error}") from error


def _file(number: int) -> str:
    return f"code/{number}.o"
