"""Compiled networks as one file: graph, weights, and the code that was chosen and made.

The file is a zip archive: ``program.json``, ``weights.safetensors``, and for each kernel its object
code. On another instruction set, or in another version of the generator, the code is made anew.
Native code is loaded from the file: load only files that you trust.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from groupconv.compiler import records
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.errors import DataError
from groupconv.files import replacing
from groupconv.kernels import cache, kernel
from groupconv.kernels.machine import runnable
from groupconv.kernels.tile import Tile

_FORMAT = 1
_HEAD, _WEIGHTS = "program.json", "weights.safetensors"


def save(
    programs: Iterable[tuple[Program, pytree.TreeSpec]], library: Library, path: str | Path
) -> None:
    """Write programs of one library, each with the structure of what it returns.

    Raises:
        DataError: an argument of a part that PyTorch runs can't be written.
    """
    tensors: dict[str, Tensor] = {}
    graphs = [
        {
            "graph": records.encode(program.graph, tensors),
            "structure": pytree.treespec_dumps(structure),
        }
        for program, structure in programs
    ]
    kernels = library.kernels
    codes = [kernel.compile(made.spec, made.machine, made.tile) for made in kernels.values()]
    head = {
        "format": _FORMAT,
        "machine": library.machine.name,
        "generator": cache.key(),
        "programs": graphs,
        "kernels": [
            {"name": name, "tile": asdict(made.tile), "sha256": hashlib.sha256(code).hexdigest()}
            for (name, made), code in zip(kernels.items(), codes, strict=True)
        ],
    }
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_HEAD, json.dumps(head))
        archive.writestr(_WEIGHTS, safetensors.torch.save(tensors))
        for number, code in enumerate(codes):
            archive.writestr(_code(number), code)


def load(path: str | Path) -> tuple[list[tuple[Program, pytree.TreeSpec]], Library]:
    """What :func:`save` was given.

    Raises:
        DataError: the file can't be read, is damaged, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            head = json.loads(archive.read(_HEAD))
            tensors = safetensors.torch.load(archive.read(_WEIGHTS))
            codes = [archive.read(_code(number)) for number in range(len(head["kernels"]))]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(f"load_compiled: path={str(path)!r} can't be read: {error}") from error
    if head["format"] != _FORMAT:
        raise DataError(
            f"load_compiled: path={str(path)!r} has format {head['format']}, not {_FORMAT}"
        )
    saved = {}
    if head["generator"] == cache.key() and head["machine"] == runnable()[0].name:
        for entry, code in zip(head["kernels"], codes, strict=True):
            if hashlib.sha256(code).hexdigest() != entry["sha256"]:
                raise DataError(f"load_compiled: path={str(path)!r}: {entry['name']} is damaged")
            saved[entry["name"]] = (Tile(**entry["tile"]), code)
    library = Library(saved)
    programs = [
        (
            Program(records.decode(entry["graph"], tensors), library),
            pytree.treespec_loads(entry["structure"]),
        )
        for entry in head["programs"]
    ]
    return programs, library


def _code(number: int) -> str:
    return f"kernels/{number}.o"
