"""Kernel: generated code with what it needs to be called."""

import hashlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.kernels import jit, module, openmp, packing
from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.tile import Tile

# Seconds of work below which waking other threads costs more than they save.
WORTH_SHARING = 15e-6
# Guesses of what one thread does in a second: multiply-adds per lane, bytes near the core.
_MACS, _BYTES = 5e9, 1e11


@dataclass(frozen=True)
class Kernel:
    """One kernel in this process. Safe to call from several threads at once.

    Args:
        function: the machine code; takes a record of ``module.ARGUMENTS``.
        work: address of what each thread of it runs, ``void work(record, thread, threads)``, where
            record points at ``module.RECORD``, and thread is below threads.
        buffer: float32 values that each thread needs for staging.
        seconds: see :func:`guess`.
    """

    spec: KernelSpec
    machine: Machine
    tile: Tile
    function: jit.Function
    work: int
    buffer: int
    seconds: float

    def pack(self, weight: Tensor) -> Tensor:
        """``weight`` (float32, ``spec.conv.weight_shape``) as :meth:`__call__` takes it."""
        spec = self.spec
        return packing.pack(weight, spec.conv, self._blocks(), self._lanes, spec.chain)

    @property
    def packed_size(self) -> int:
        """Elements of what :meth:`pack` returns."""
        return packing.size(self.spec.conv, self._blocks(), self._lanes)

    @property
    def _lanes(self) -> int:
        return self.tile.narrowed(self.machine).lanes

    def _blocks(self) -> list[Block]:
        return blocks(self.spec.conv, self._lanes, self.tile.vectors)

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        y: Tensor,
        residual: Tensor | None = None,
        order: Tensor | None = None,
        offset: int = 0,
        *,
        alone: bool = False,
    ) -> None:
        """Compute ``y``; see :meth:`arguments`."""
        record, _buffer = self.arguments(x, packed, bias, y, residual, order, offset, alone=alone)
        self.function(record)

    def arguments(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        y: Tensor,
        residual: Tensor | None = None,
        order: Tensor | None = None,
        offset: int = 0,
        *,
        alone: bool = False,
    ) -> tuple[bytes, Tensor | None]:
        """What ``function`` takes to compute ``y``, and a buffer to keep while it runs.

        All tensors are float32 and lie in memory as the spec says: dense, or slices of the channels
        of wider ones.

        Args:
            x: ``(N, in_channels, H, W)``.
            packed: what :meth:`pack` returned.
            bias: ``(out_channels,)``.
            y: ``(N, out_channels, *spec.output_tensor_size)``.
            residual: as y, but in other memory.
            order: ``(in_channels,)`` int64; channel i of the convolution is ``x[:, order[i]]``.
            offset: element of an image of y where the first output goes; the residual starts at
                the same pixel.
            alone: whether one thread does it all, however much it is.
        """
        threads, images = 1 if alone else openmp.threads(), x.shape[0]
        if threads > 1 and self.seconds * images < WORTH_SHARING:
            threads = 1
        buffer = _buffer(threads * self.buffer) if self.buffer else None
        pool = openmp.pool()
        record = module.LAYOUT.pack(
            x.data_ptr(),
            packed.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr() + 4 * self._beside(offset),
            0 if order is None else order.data_ptr(),
            y.data_ptr() + 4 * offset,
            0 if buffer is None else buffer.data_ptr(),
            images,
            self.tile.rows,
            self.tile.blocks,
            self.buffer,
            self.spec.input_image,
            self.spec.output_image,
            0,
            threads,
            *((pool.parallel, pool.thread_number, pool.thread_count) if pool else (0, 0, 0)),
        )
        return record, buffer

    def _beside(self, offset: int) -> int:
        """Element of an image of the residual at the pixel where ``offset`` is in one of y."""
        return offset // self.spec.output_stride * self.spec.residual_stride


def _buffer(elements: int) -> Tensor:
    """Memory for staging, kept for the next call of this Python thread: a fresh one of this size
    would often be mapped, and its pages found, anew in every call."""
    buffer: Tensor | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        buffer = _local.buffer = torch.empty(elements, dtype=torch.float32)
    return buffer


_local = threading.local()


def compile(spec: KernelSpec, machine: Machine, tile: Tile) -> bytes:
    """The object file of a kernel, good for every tile of the same code."""
    return jit.compile_object(module.emit(spec, machine, tile, _name(spec, machine, tile)), machine)


def load(spec: KernelSpec, machine: Machine, tile: Tile, code: bytes) -> Kernel:
    """The kernel of an object file that :func:`compile` made."""
    assert tile.rows % tile.lines == 0
    assert tile.blocks == 1 or not spec.staged
    buffer = module.buffer_size(spec, machine, tile)
    name = _name(spec, machine, tile)
    function = jit.load(code, name, module.PROTOTYPE)
    work = jit.address(code, module.work_name(name))
    return Kernel(spec, machine, tile, function, work, buffer, guess(spec.conv, machine))


def guess(conv: ConvSpec, machine: Machine) -> float:
    """Of the seconds of one image on one thread."""
    elements = conv.in_channels * conv.input_size[0] * conv.input_size[1]
    elements += conv.out_channels * conv.output_size[0] * conv.output_size[1]
    return conv.macs / (_MACS * machine.lanes) + 4 * elements / _BYTES


def _name(spec: KernelSpec, machine: Machine, tile: Tile) -> str:
    """The name of the function: no two codes in a process may share one."""
    text = repr((spec, machine, tile.code))
    return "convolution_" + hashlib.sha256(text.encode()).hexdigest()[:32]
