"""Step: one piece of native work, as a record from which its code is generated."""

from abc import ABC, abstractmethod
from typing import ClassVar

from groupconv.kernels.machine import Machine


class Step(ABC):
    """A kind of work that is not a convolution. Subclasses are frozen dataclasses: equal ones have
    the same code.

    Sizes are those of one image and constant in the code. Pixels are rows of channels; the
    ``strides`` of a step are the elements from one pixel to the next, of each input and of the
    output: more than the channels where a value is a part of a wider one.
    """

    # What a record of the step holds, eight bytes each, in this order: pointers to the inputs,
    # to constants, to the output ``y``, then the number of images.
    arguments: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes read and written for one image, from which its time is guessed."""

    @abstractmethod
    def write(self, machine: Machine, name: str) -> str:
        """The module of ``void @name(ptr record, i64 thread, i64 threads)``.

        Called with the same record on all of ``threads`` threads, each of which does an equal part
        of the work: results don't depend on their number. Nothing but the output is written.
        """
