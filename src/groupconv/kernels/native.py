"""The generated kernels as an implementation of PyTorch's convolutions."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.kernels import openmp, tuning
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.transposed import Phase, phases
from groupconv.kernels.weights import packed

# Pixels that a row should have at least, where it may have any number.
_ROW = 96


class Native:
    """Runs one :class:`Request` on generated kernels, in float32."""

    def __init__(self, request: Request) -> None:
        self.request = request
        conv = _on_two_axes(replace(request.conv, batch=1))
        # The batch is that of the request: a call with another is another request.
        like = _layout(
            torch.empty(
                request.conv.batch, conv.out_channels, *request.conv.output_size, device="meta"
            ),
            request.channels_last_output,
        )
        self.size, self.strides = like.shape, like.stride()
        self.ones = [1] * len(request.conv.output_size)
        self.ready = request.dense and request.dtype == torch.float32
        self.parts = phases(conv) if conv.transposed else [_whole(conv)]
        # Outputs that no tap reaches hold the bias alone.
        covered = sum(math.prod(part.conv.output_size) for part in self.parts)
        self.sparse = covered < math.prod(conv.output_size)
        self.kernels = [
            tuning.tuned(_kernel_spec(request, conv, part), request.conv.batch)
            for part in self.parts
        ]
        pixel = conv.out_channels if request.channels_last_output else 1
        self.offsets = [
            pixel * (part.start[0] * conv.output_size[1] + part.start[1]) for part in self.parts
        ]
        # As text, whose hash is remembered.
        self.key = repr(
            [(part, k.machine, k.tile) for part, k in zip(self.parts, self.kernels, strict=True)]
        )

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution; tensors of any floating dtype, computed in float32 and rounded once."""
        if self.ready and not self.sparse:
            return self._run(input, weight, bias)
        # PyTorch does a part.
        with openmp.own_threads():
            return self._run(input, weight, bias)

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = input
        if not self.ready:
            x = input.detach().to(torch.float32)
            if not self.request.dense:
                x = _layout(x, self.request.channels_last_input)
            bias = None if bias is None else bias.detach().to(torch.float32)
        if bias is not None and not bias.is_contiguous():
            bias = bias.detach().contiguous()
        y = torch.empty_strided(self.size, self.strides, dtype=torch.float32)
        self.compute(x, packed(weight, self.key, self.pack), bias, y)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def compute(
        self, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        """Fill ``y`` from dense float32 tensors and packed weights."""
        if self.sparse:
            y.copy_(torch.zeros(()) if bias is None else bias.detach().reshape(-1, *self.ones))
        for kernel, w, offset in zip(self.kernels, weights, self.offsets, strict=True):
            kernel(x, w, bias, y, offset=offset)

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``weight`` as :meth:`compute` takes it."""
        with torch.no_grad():
            weight = weight.to(torch.float32)
            if weight.ndim == 3:
                weight = weight.unsqueeze(2)
            if not self.request.conv.transposed:
                return (self.kernels[0].pack(weight),)
            return tuple(
                kernel.pack(part.weight(weight))
                for kernel, part in zip(self.kernels, self.parts, strict=True)
            )


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` dense in memory, its channels innermost or not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _on_two_axes(conv: ConvSpec) -> ConvSpec:
    """A 1-d convolution as a 2-d one on images of one row."""
    if len(conv.input_size) == 2:
        return conv
    return replace(
        conv,
        input_size=(1, *conv.input_size),
        kernel_size=(1, *conv.kernel_size),
        stride=(1, *conv.stride),
        padding=((0, 0), *conv.padding),
        dilation=(1, *conv.dilation),
        output_padding=(0, *conv.output_padding) if conv.output_padding else (),
    )


def _whole(conv: ConvSpec) -> Phase:
    """All of a plain convolution. Where pixels don't meet, rows become long enough for tiles."""
    height, width = conv.input_size
    alone = (1, 1) == conv.kernel_size == conv.stride and conv.output_size == conv.input_size
    if alone and width < _ROW and conv.padding == ((0, 0), (0, 0)):
        pixels = height * width
        row = next(n for n in range(1, pixels + 1) if pixels % n == 0 and n >= min(_ROW, pixels))
        conv = replace(conv, input_size=(pixels // row, row))
    taps: Sequence[int] = conv.kernel_size
    return Phase(conv, tuple(tuple(range(k)) for k in taps), (0, 0))


def _kernel_spec(request: Request, conv: ConvSpec, part: Phase) -> KernelSpec:
    spec = KernelSpec(
        part.conv, request.channels_last_input, request.channels_last_output, request.bias
    )
    if not conv.transposed:
        return spec
    height, width = conv.output_size
    return replace(spec, step=(conv.stride[0], conv.stride[1]), written_size=(height, width))
