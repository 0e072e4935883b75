"""PyTorch with every convolution on the library's own kernels, channels last in memory."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from groupconv.nn.conv import LAYERS
from groupconv.targets.base import Target
from groupconv.targets.eager import Eager


class Native(Target):
    """The kernels of :mod:`groupconv.kernels` where they are legal and faster, on the CPU."""

    name = "native"

    def why_not(self) -> str | None:
        return None

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        net = on_kernels(module).to(memory_format=torch.channels_last)
        ordered = (
            x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
        )
        return Eager().build(net, tuple(ordered))


def on_kernels(module: nn.Module) -> nn.Module:
    """A copy whose convolutions of torch's own classes are those of :mod:`groupconv.nn`."""
    net = copy.deepcopy(module)
    ours = {next(c for c in layer.__mro__ if c.__module__.startswith("torch.")): layer
            for layer in LAYERS}  # fmt: skip
    for part in net.modules():
        # Theirs have the same attributes: nothing but the class need change.
        if type(part) in ours:
            part.__class__ = ours[type(part)]
    return net
