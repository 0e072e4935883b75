"""A network in a file of another runtime, checked there."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError, DataError
from groupconv.nn.dense import ungrouped
from groupconv.targets.base import FileTarget
from groupconv.targets.coreml import CoreMl
from groupconv.targets.eager import Eager
from groupconv.targets.executorch import ExecuTorch
from groupconv.targets.inductor import Inductor
from groupconv.targets.litert import LiteRt
from groupconv.targets.native import Native
from groupconv.targets.onnxruntime import OnnxRuntime
from groupconv.targets.openvino import OpenVino
from groupconv.targets.verify import INT8_TOLERANCE, Agreement, verify

FILE_TARGETS: tuple[FileTarget, ...] = (
    Eager(), Inductor(), Native(), OnnxRuntime(), OpenVino(), LiteRt(), ExecuTorch(), CoreMl(),
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Args:
        path: of the file.
        target: the runtime that it was checked in.
        bytes: of the file, and of what lies beside it.
        nodes: operators by the names of the format, with how many there are.
        agreement: with PyTorch.
        before_int8: that of the float file that an INT8 file was made from.
        stay_float: names of what is not INT8 in it.
        off_gpu: what the GPU delegate of LiteRT doesn't run as the file has it: operators that it
            leaves to the CPU, and convolutions that it splits into their groups.
    """

    path: str
    target: str
    bytes: int
    nodes: dict[str, int]
    agreement: Agreement
    before_int8: Agreement | None = None
    stay_float: tuple[str, ...] = ()
    off_gpu: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.nodes.items()))
        lines = [f"{self.path}: {self.bytes / 1e6:.1f} MB, {counts}"]
        if self.before_int8 is not None:
            lines.append(f"before INT8: in {self.target} it {self.before_int8}")
        lines.append(f"in {self.target} it {self.agreement}")
        if self.stay_float:
            lines.append(f"not INT8: {', '.join(self.stay_float)}")
        if self.off_gpu:
            lines.append(f"its GPU code does not run as they are: {', '.join(self.off_gpu)}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    int8: Tensor | None = None,
    any_size: bool = False,
    dense: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a network to a file, load it in its runtime, and compare it with PyTorch.

    Args:
        model: in evaluation mode.
        example_inputs: the network's arguments.
        path: the suffix tells the format: ``.onnx`` (ONNX Runtime), ``.xml`` (OpenVINO),
            ``.tflite`` (LiteRT), ``.pte`` (ExecuTorch), ``.mlpackage`` (Core ML), ``.pt2``
            (PyTorch) or ``.groupconv`` (native).
        images: ``(N, C, H, W)``, to compare on, in batches as large as the example; the example
            alone if there are none.
        labels: ``(N,)``, of the images, for the accuracy.
        int8: ``(N, C, H, W)``, to calibrate on: the file is quantized, weights and activations;
            ``.onnx`` and ``.tflite`` only.
        any_size: whether the file must be for images of any size, and of any batch but in
            ``.mlpackage``: that, ``.onnx``, ``.xml`` and ``.pt2`` only.
        dense: whether grouped convolutions, but for depthwise ones, are written as dense ones with
            zeros, for hardware that has no others.
        metadata: kept in the file.

    Raises:
        ArgumentError: the suffix is unknown or has no such files, a library is missing, or the
            model is in training mode.
        DataError: the file can't be written.
        ExportError: the format can't hold the network, or the file computes something else. No
            file is left then; one that was there before stays as it was.
    """
    path = Path(path)
    target = _target(path)
    if any_size and not target.any_size:
        legal = ", ".join(dict.fromkeys(t.suffix for t in FILE_TARGETS if t.any_size))
        raise ArgumentError(f"any_size: {target.suffix} files are for one size; write {legal}")
    busy = next((name or "model" for name, m in model.named_modules() if m.training), None)
    if busy is not None:
        raise ArgumentError(f"export: {busy} is in training mode; call model.eval() first")
    if not path.parent.is_dir():
        raise ArgumentError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    size = len(inputs[0])
    batches = [inputs] if images is None else _batches("images", images, inputs)
    classes = None
    if labels is not None:
        if images is None or labels.shape != (len(images),):
            raise ArgumentError(f"export: labels of shape {tuple(labels.shape)} must be of images")
        classes = [part for part in labels.split(size) if len(part) == size]
    calibration = None if int8 is None else _batches("int8", int8, inputs)
    return written(target, model, batches, path, metadata, classes, calibration, any_size, dense)


def written(
    target: FileTarget,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    labels: Sequence[Tensor] | None = None,
    int8: Sequence[tuple[Tensor, ...]] | None = None,
    any_size: bool = False,
    dense: bool = False,
) -> Exported:
    """The file of a target, compared with PyTorch on ``batches``, all of one size.

    Args:
        labels: of each batch.
        int8: batches to calibrate on, if the file shall be INT8.
        any_size, dense: see :func:`export`.

    Raises:
        DataError, ExportError: as :func:`export`.
    """
    try:
        # In a folder of its own, so that a file that was there before stays until the new one is
        # known to be right.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            new = Path(folder) / path.name
            with torch.no_grad():
                net = ungrouped(model) if dense else model
                target.export(net, batches[0], new, metadata, any_size=any_size)
            agreement, before, kept = verify(target, new, model, batches, labels), None, []
            if int8 is not None:
                whole, before = new.with_stem(f"{new.stem}-float"), agreement
                new.replace(whole)
                kept = target.quantize(whole, int8, new)
                whole.unlink()
                agreement = verify(target, new, model, batches, labels, INT8_TOLERANCE)
            nodes, off_gpu = target.nodes(new), tuple(target.off_gpu(new))
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            for suffix in (*target.beside, target.suffix):
                _put(new.with_suffix(suffix), path.with_suffix(suffix))
    except OSError as error:
        raise DataError(f"path={str(path)!r} can't be written: {error}") from error
    return Exported(str(path), target.name, size, nodes, agreement, before, tuple(kept), off_gpu)


def _put(new: Path, path: Path) -> None:
    """Let a file, or a folder that is a package, take the place of another of its kind."""
    if new.is_dir() and (path / "Manifest.json").exists():
        path.replace(new.with_name(f"{new.name}-before"))
    new.replace(path)


def _batches(name: str, images: Tensor, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Images in batches as large as the example."""
    if len(inputs) != 1 or images.shape[1:] != inputs[0].shape[1:]:
        raise ArgumentError(
            f"export: {name} of shape {tuple(images.shape)} must be like the only input, "
            f"{tuple(inputs[0].shape)}"
        )
    size = len(inputs[0])
    batches: list[tuple[Tensor, ...]] = [(x,) for x in images.split(size) if len(x) == size]
    if not batches:
        raise ArgumentError(f"export: {name}: {len(images)} images are less than one batch")
    return batches


def _target(path: Path) -> FileTarget:
    target = next((t for t in FILE_TARGETS if t.suffix == path.suffix), None)
    if target is None:
        known = {t.suffix: t.name for t in reversed(FILE_TARGETS)}
        legal = ", ".join(f"{suffix} ({name})" for suffix, name in reversed(known.items()))
        raise ArgumentError(f"path={str(path)!r}: the suffix must be one of {legal}")
    reason = target.why_not()
    if reason is not None:
        raise ArgumentError(f"path={str(path)!r}: {reason}")
    return target
