"""Weights in the order in which kernels read them: the only form in which programs keep them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.kernels.kernel import Kernel
from groupconv.kernels.parts import Part


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights that one kernel reads.

    Args:
        tensor: what ``kernel.pack`` returned.
        kernel: which kernel.
        part: what it computes of its convolution.
    """

    tensor: Tensor
    kernel: Kernel
    part: Part

    def unpack(self, weight: Tensor) -> None:
        """Write them where they belong in ``weight``, that of the whole operator."""
        # Every weight by its number, and 0 where the kernel reads none, packed in the same way.
        numbers = torch.arange(1, weight.numel() + 1).reshape(weight.shape)
        places = pack(self.kernel, self.part, numbers)
        used = places > 0
        weight.view(-1)[places[used] - 1] = self.tensor[used]


def pack(kernel: Kernel, part: Part, weight: Tensor) -> Tensor:
    """What ``kernel`` reads of ``weight``, that of a whole convolution, or for each image one."""
    if weight.ndim == 5:
        return torch.cat([kernel.pack(part.weight(matrix)) for matrix in weight])
    return kernel.pack(part.weight(weight))
