"""Library: the native code that programs are made of, and their weights as it reads them."""

import hashlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from groupconv.compiler.steps import code
from groupconv.compiler.steps.step import Step
from groupconv.kernels import kernel, tuning
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.tile import Tile

# Seconds of work below which threads that wait for it already are not worth asking.
WORTH_SHARING = 3e-6
# Packed weights by what is in them: programs of one network, for other sizes or in other copies of
# it, have them once.
_packed: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()


@dataclass
class Library:
    """Kernels and steps by what they compute.

    Args:
        saved: for kernels, by images and spec, the tile and the object code that were chosen
            before; what is not there is tuned.
        kernels: those made so far, by the same names.
        steps: those made so far, by the symbols of their code.
    """

    saved: Mapping[str, tuple[Tile, bytes]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        return runnable()[0]

    def kernel(self, spec: KernelSpec, images: int, *, alone: bool = False) -> Kernel:
        """The kernel of a convolution on so many images.

        Args:
            alone: whether one thread runs it, however many there are.
        """
        name = f"{images} {spec}{' alone' if alone else ''}"
        least = math.inf if alone else WORTH_SHARING
        if name not in self.kernels:
            found = self.saved.get(name)
            if found is None:
                self.kernels[name] = tuning.tuned(spec, images, worth_sharing=least)
            else:
                self.kernels[name] = kernel.load(spec, self.machine, *found)
        return self.kernels[name]

    def function(self, step: Step) -> int:
        """The address of a step's code."""
        self.steps[code.name(step, self.machine)] = step
        return code.function(step, self.machine)


def shared(packed: Tensor) -> Tensor:
    """``packed``, or a tensor of the same numbers that another program has."""
    digest = hashlib.sha256(packed.numpy().data).hexdigest()
    return _packed.setdefault(digest, packed)
