"""LiteRT's converter in a process of its own.

It brings JAX, whose threads a process that forks should not have. ``python -m
groupconv.targets.litert_convert`` reads lines of JSON, ``[program, out]``, paths of a file by
``torch.export.save`` and of the one to write, and answers each with a line: null, or what went
wrong.
"""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from groupconv.errors import ExportError
from groupconv.targets.quiet import quiet

_lock = threading.Lock()


def convert(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` as a ``.tflite`` file.

    Raises:
        ExportError: LiteRT can't hold it.
    """
    with tempfile.TemporaryDirectory(prefix="groupconv-") as folder, _lock:
        file = Path(folder) / "program.pt2"
        torch.export.save(program, file)
        worker = _worker()
        requests, answers = worker.stdin, worker.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps([str(file), str(path.absolute())]) + "\n")
        requests.flush()
        answer = answers.readline()
        if not answer:
            _worker.cache_clear()
            raise ExportError(f"LiteRT's converter ended with exit status {worker.wait()}")
    reason = json.loads(answer)
    if reason is not None:
        raise ExportError(f"LiteRT can't hold the network: {reason}")


@functools.cache
def _worker() -> subprocess.Popen[str]:
    """Started once: the converter takes seconds to import."""
    worker = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(_end, worker)
    return worker


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()


def _serve(requests: IO[str], answers: IO[str]) -> None:
    with quiet():
        import litert_torch
    for line in requests:
        program, out = json.loads(line)
        answers.write(json.dumps(_reason(litert_torch, program, out)) + "\n")
        answers.flush()


def _reason(converter: Any, program: str, out: str) -> str | None:
    """Convert; why that failed."""
    try:
        with quiet():
            loaded = torch.export.load(program)
            converter.convert(loaded.module(), *loaded.example_inputs[:1]).export(out)
    except Exception as error:  # The converter raises errors of many types.
        return str(error) or type(error).__name__
    return None


if __name__ == "__main__":
    # Libraries print to standard output what is no answer.
    _answers, sys.stdout = sys.stdout, sys.stderr
    _serve(sys.stdin, _answers)
