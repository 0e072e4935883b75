"""Weights of YOLO v3 that others have trained, in the forms in which they are found."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groupconv.errors import DataError
from groupconv.models.yolov3 import YOLOv3

_NOT_WEIGHTS = ("num_batches_tracked", "anchors")


@torch.no_grad()
def load_darknet(model: YOLOv3, path: str | Path) -> None:
    """Load a ``.weights`` file of Darknet, such as ``yolov3.weights``, in place.

    Raises:
        DataError: it can't be read, or has the weights of another network.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"weights={str(path)!r} can't be read: {error}") from error
    # Three numbers of the version; then how many images were seen, wider since version 0.2.
    major, minor = np.frombuffer(content[:8].ljust(8, b"\0"), "<i4")
    start = 20 if major * 10 + minor >= 2 else 16
    there = max(len(content) - start, 0)
    wanted = sum(tensor.numel() for tensor in _darknet(model))
    if there != 4 * wanted:
        raise DataError(
            f"weights={str(path)!r} hold {there / 4:,.0f} numbers; this network with "
            f"{model.num_classes} classes has {wanted:,}"
        )
    numbers: NDArray[np.float32] = np.frombuffer(content, "<f4", offset=start).copy()
    left = torch.from_numpy(numbers)
    for tensor in _darknet(model):
        tensor.copy_(left[: tensor.numel()].view_as(tensor))
        left = left[tensor.numel() :]


def load_ultralytics(model: YOLOv3, state: Mapping[str, Tensor]) -> None:
    """Load the state_dict of ultralytics' ``yolov3.pt``, the one with anchors, in place.

    Their batch norm has eps 1e-3, which the model takes over.

    Args:
        model: whose layers stand in the same order; the heads' outputs are one module there, the
            last, with the finest first.
        state: as ``module.state_dict()`` gives it.

    Raises:
        DataError: it is that of another network.
    """
    theirs = [t for name, t in state.items() if not name.endswith(_NOT_WEIGHTS)]
    own = {k: t for k, t in model.state_dict().items() if not k.endswith(_NOT_WEIGHTS)}
    names = [name for name in own if ".boxes." not in name]
    names += [f"heads.{i}.boxes.{what}" for i in (2, 1, 0) for what in ("weight", "bias")]
    shapes = [tuple(t.shape) for t in theirs], [tuple(own[name].shape) for name in names]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"state: its {len(theirs)} tensors are not the {len(names)} of YOLOv3 with "
            f"{model.num_classes} classes"
        )
    model.load_state_dict(dict(zip(names, theirs, strict=True)), strict=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def _darknet(model: YOLOv3) -> Iterator[Tensor]:
    """All tensors in the order of Darknet's files: of a layer first what follows it."""
    modules = list(model.modules())
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            if isinstance(following, nn.BatchNorm2d):
                yield following.bias
                yield following.weight
                assert following.running_mean is not None
                assert following.running_var is not None
                yield following.running_mean
                yield following.running_var
            else:
                assert module.bias is not None
                yield module.bias
            yield module.weight
