"""Library: the native code that programs are made of, and their weights as it reads them."""

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from groupconv.compiler.steps import code
from groupconv.compiler.steps.step import Step
from groupconv.kernels import kernel, tuning
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.tile import Tile

# Packed weights by what is in them: programs of one network, for other batches or in other copies
# of it, have them once.
_packed: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()


@dataclass
class Library:
    """Kernels and steps by what they compute.

    Args:
        saved: for kernels, as :func:`name` has them, the tile and the object code that were chosen
            before; what is not there is tuned.
    """

    saved: Mapping[str, tuple[Tile, bytes]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    steps: dict[Step, int] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        return runnable()[0]

    def kernel(self, spec: KernelSpec, images: int) -> Kernel:
        """The kernel of a convolution on so many images."""
        name = f"{images} {spec}"
        if name not in self.kernels:
            found = self.saved.get(name)
            if found is None:
                self.kernels[name] = tuning.tuned(spec, images)
            else:
                self.kernels[name] = kernel.load(spec, self.machine, *found)
        return self.kernels[name]

    def function(self, step: Step) -> int:
        """The address of a step's code."""
        if step not in self.steps:
            self.steps[step] = code.function(step, self.machine)
        return self.steps[step]


def shared(what: str, weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """``pack(weight)``, or the same tensor as last time for the same numbers.

    Args:
        what: names what ``pack`` does.
    """
    digest = hashlib.sha256(f"{what} {tuple(weight.shape)}".encode())
    digest.update(weight.contiguous().numpy().data)
    key = digest.hexdigest()
    found = _packed.get(key)
    if found is None:
        found = _packed[key] = pack(weight)
    return found
