"""Forward passes, and what is read in them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.errors import DataError
from groupconv.optimize.cost import tensors_in

# Images per forward pass.
BATCH = 128
# Positions of the largest maps of a pass, on other devices and on the CPU. There a pass of seven
# images of 224 x 224 takes half as long for each as one of 32: larger maps leave the caches, and
# the memory allocator keeps none of them for the next layer.
_PIXELS, _CPU_PIXELS = 1 << 23, 3 << 17


def images_at_once(pixels: int, device: torch.device) -> int:
    """How many images to run at once where the largest map of one has so many positions."""
    most = _CPU_PIXELS if device.type == "cpu" else _PIXELS
    return max(1, min(BATCH, most // pixels))


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its job
    """The last module of interest has run."""


def visit(
    model: nn.Module,
    names: Sequence[str],
    batch: Tensor,
    see: Callable[[str, Any, Any], None],
) -> None:
    """One forward pass, which stops after the last of some modules.

    Args:
        model: in evaluation mode.
        names: of modules that are called once; the model itself is named "".
        batch: ``(N, C, H, W)``.
        see: takes a module's name, input and output, before anything can change them.
    """
    left = set(names)

    def hook(name: str, output: Any, args: tuple[Any, ...]) -> None:
        see(name, args[0], output)
        left.discard(name)
        if not left:
            raise Reached

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(name, output, args)
        )
        for name in names
    ]
    try:
        model(batch)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def outputs(
    model: nn.Module, images: Tensor, ends: Sequence[str] = ("",), at_once: int = BATCH
) -> list[Tensor]:
    """What some modules of a network, or itself, return for all images, on the CPU in float32.

    Args:
        model: in evaluation mode.
        images: ``(N, C, H, W)``.
        ends: names of the modules; see :func:`rows`.
        at_once: images per forward pass.

    Raises:
        DataError: as :func:`rows`.
    """
    device = next(model.parameters()).device
    batches = [
        [tensor.float().cpu() for tensor in rows(model, part.to(device), ends)]
        for part in images.split(at_once)
    ]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def rows(model: nn.Module, batch: Tensor, ends: Sequence[str] = ("",)) -> list[Tensor]:
    """Every tensor ``(N, ...)`` that some modules return in one forward pass.

    Args:
        model: in evaluation mode.
        batch: ``(N, C, H, W)``.
        ends: names of modules that are called once; the model itself is named "".

    Raises:
        DataError: the network does not accept the images, or gives no such tensor.
    """
    found: dict[str, Any] = {}

    def see(name: str, _: Any, output: Any) -> None:
        found[name] = output

    with accepted(batch):
        visit(model, ends, batch, see)
    leaves = [
        tensor
        for name in ends
        for tensor in tensors_in(found[name])
        if tensor.ndim > 0 and len(tensor) == len(batch)
    ]
    if not leaves:
        kinds = ", ".join(type(found[name]).__name__ for name in ends)
        raise DataError(f"the model returns a {kinds} without a tensor of a row for each image")
    return leaves


@contextmanager
def accepted(batch: Tensor) -> Iterator[None]:
    """A forward pass of these images.

    Raises:
        DataError: the network does not accept them.
    """
    try:
        yield
    except RuntimeError as error:
        raise DataError(
            f"the model does not accept images of shape {tuple(batch.shape)}: {error}"
        ) from error
