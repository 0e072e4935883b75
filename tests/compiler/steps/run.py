"""Steps run in memory that shows every wrong write, and reads of what is not theirs."""

import ctypes

import torch
from torch import Tensor

from groupconv.compiler.steps import code
from groupconv.compiler.steps.step import Step
from groupconv.kernels.machine import Machine

# Elements before and after the rows; an odd number, so that rows lie at no whole vector.
_MARGIN = 147
# The bits of a NaN that no arithmetic makes.
_POISON = 0x7FC0BEEF
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Rows:
    """Rows of channels, ``stride`` elements apart, with NaN around them and between them.

    Args:
        values: ``(rows, channels)`` to start with; all are NaN where only this shape is given.
        stride: at least the channels, which it is by default.
    """

    def __init__(self, values: Tensor | tuple[int, int], stride: int | None = None) -> None:
        self.rows, self.channels = values if isinstance(values, tuple) else values.shape
        self.stride = self.channels if stride is None else stride
        assert self.stride >= self.channels
        size = self.rows * self.stride + 2 * _MARGIN
        self._memory = torch.full((size,), _POISON, dtype=torch.int32)
        if isinstance(values, Tensor):
            self._view(self._memory.view(torch.float32)).copy_(values)

    @property
    def pointer(self) -> int:
        """The address of the first channel of the first row."""
        return self._memory.data_ptr() + 4 * _MARGIN

    def values(self) -> Tensor:
        """A copy of the rows, ``(rows, channels)``; fails where anything else was written."""
        rest = self._memory.clone()
        self._view(rest).fill_(_POISON)
        assert rest.eq(_POISON).all(), "written outside of the rows"
        return self._view(self._memory.view(torch.float32)).clone()

    def _view(self, memory: Tensor) -> Tensor:
        inside = memory[_MARGIN : len(memory) - _MARGIN]
        return inside.view(self.rows, self.stride)[:, : self.channels]


def run(
    step: Step,
    *pointers: Rows | Tensor | int,
    images: int,
    threads: int = 1,
    machine: Machine | None = None,
) -> None:
    """Call the step's function for each of ``threads`` threads, one after the other.

    Args:
        pointers: what ``step.arguments`` names, but for the images: rows, contiguous tensors or
            addresses.
    """
    assert len(pointers) + 1 == len(step.arguments)
    record = (ctypes.c_int64 * len(step.arguments))(*map(_address, pointers), images)
    function = _PROTOTYPE(code.function(step, machine))
    for thread in range(threads):
        function(ctypes.addressof(record), thread, threads)


def _address(pointer: Rows | Tensor | int) -> int:
    if isinstance(pointer, Rows):
        return pointer.pointer
    if isinstance(pointer, Tensor):
        assert pointer.is_contiguous()
        return pointer.data_ptr()
    return pointer
