"""One network in every runtime, side by side."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.busy import require_quiet
from groupconv.errors import ArgumentError, ExportError
from groupconv.targets import alone
from groupconv.targets.base import FileTarget, Opened
from groupconv.targets.export import FILE_TARGETS, Exported, written
from groupconv.targets.verify import Agreement
from groupconv.timing import TURN, Timing, interleave, machine

log = logging.getLogger(__name__)

# Seconds for which the worker threads of a runtime keep their cores busy after a pass, and some:
# those of ONNX Runtime do longest, 31 ms, and PyTorch's, which `spin` leaves out, 15.
_REST = max(target.spin for target in FILE_TARGETS)
_SECONDS = 0.8


@dataclass(frozen=True)
class Measured:
    """One network in one runtime.

    Args:
        target, version: the runtime.
        why_not: why nothing was measured, or None.
        latency: seconds of one pass.
        throughput: images per second in passes of a larger batch.
        memory: bytes it occupies at most in a process of its own, weights included; see
            :mod:`groupconv.targets.alone`.
        bytes: of its file.
        agreement: with PyTorch.
    """

    target: str
    version: str | None = None
    why_not: str | None = None
    latency: Timing | None = None
    throughput: float | None = None
    memory: int | None = None
    bytes: int | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Bench:
    """One network in several runtimes.

    Args:
        shapes: of its inputs where latency was measured.
        batch: images per pass where throughput was.
        machine: see :func:`groupconv.timing.machine`.
        results: one for each runtime, in the order asked for.
    """

    shapes: list[list[int]]
    batch: int
    machine: dict[str, str | int]
    results: list[Measured]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def bench(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    targets: Sequence[str] | None = None,
    batch: int = 8,
    seconds: float = _SECONDS,
) -> Bench:
    """Time a network in several runtimes in one interleaved run, once its numbers are right there.

    Args:
        model: in evaluation mode, on the CPU.
        example_inputs: the network's arguments; their first axis is the batch.
        targets: names of runtimes; all if None.
        batch: images per pass where throughput is measured.
        seconds: to time each of them for, for latency and for throughput.

    Raises:
        ArgumentError: a name is unknown, or the model is in training mode.
        BusyError: others use the machine.
        ExportError: no runtime can run the network.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    chosen = _chosen(targets)
    busy = next((name or "model" for name, m in model.named_modules() if m.training), None)
    if busy is not None:
        raise ArgumentError(f"bench: {busy} is in training mode; call model.eval() first")
    if batch < 1:
        raise ArgumentError(f"bench: batch={batch} must be 1 or more")
    require_quiet()
    shapes = [list(x.shape) for x in inputs]
    with tempfile.TemporaryDirectory(prefix="groupconv-bench-") as name:
        folder = Path(name)
        files, reasons = _files(chosen, model, inputs, folder)
        if not files:
            said = "; ".join(f"{target.name}: {reason}" for target, reason in reasons.items())
            raise ExportError(f"no runtime can run the network: {said}")
        ready = {t: t.open(Path(file.path), inputs) for t, file in files.items()}
        log.info("timing %d runtimes", len(ready))
        latencies = _times(ready, seconds)
        many = tuple(_repeated(x, batch) for x in inputs)
        ready = {t: _open_many(t, file, model, many) for t, file in files.items()}
        throughputs = {t: batch / timing.median for t, timing in _times(ready, seconds).items()}
        # The files of some are mapped into memory.
        del ready
        log.info("looking at their memory")
        memory = {t: _memory(t, file, folder, shapes) for t, file in files.items()}
    results = [
        Measured(t.name, why_not=reasons[t])
        if t in reasons
        else Measured(
            t.name, t.version, None, latencies[t], throughputs[t], memory[t], files[t].bytes,
            files[t].agreement,
        )
        for t in chosen
    ]  # fmt: skip
    return Bench(shapes, batch, machine(), results)


def _chosen(names: Sequence[str] | None) -> list[FileTarget]:
    known = {target.name: target for target in FILE_TARGETS}
    for name in names or ():
        if name not in known:
            raise ArgumentError(f"bench: target {name!r} must be one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _files(
    targets: Sequence[FileTarget], model: nn.Module, inputs: tuple[Tensor, ...], folder: Path
) -> tuple[dict[FileTarget, Exported], dict[FileTarget, str]]:
    """The checked file of each, or why there is none."""
    files, reasons = {}, {}
    for target in targets:
        reason = target.why_not_timed()
        if reason is None:
            try:
                path = folder / target.name / f"network{target.suffix}"
                path.parent.mkdir()
                log.info("%s: writing and checking its file", target.name)
                files[target] = written(target, model, [inputs], path)
            except ExportError as error:
                reason = str(error)
        if reason is not None:
            reasons[target] = reason
    return files, reasons


def _times(ready: Mapping[FileTarget, Opened], seconds: float) -> dict[FileTarget, Timing]:
    calls = {target.name: opened.run for target, opened in ready.items()}
    # On one thread there are no workers.
    rest = _REST if torch.get_num_threads() > 1 else 0.0
    times = interleave(calls, seconds=seconds * len(calls), max_runs=10_000, rest=rest, turn=TURN)
    return {target: times[target.name] for target in ready}


def _repeated(x: Tensor, batch: int) -> Tensor:
    return x[torch.arange(batch) % len(x)]


def _open_many(
    target: FileTarget, file: Exported, model: nn.Module, inputs: tuple[Tensor, ...]
) -> Opened:
    """Ready for a larger batch; a file that is for one batch alone is written anew."""
    path = Path(file.path)
    if not target.any_batch:
        path = path.with_name(f"many{target.suffix}")
        with torch.no_grad():
            target.export(model, inputs, path)
    return target.open(path, inputs)


def _memory(
    target: FileTarget, file: Exported, folder: Path, shapes: list[list[int]]
) -> int | None:
    tiny = folder / target.name / f"tiny{target.suffix}"
    with torch.no_grad():
        target.export(nn.Conv2d(1, 1, 1).eval(), (torch.zeros(alone.TINY),), tiny)
    return alone.memory(target, tiny, Path(file.path), shapes)
