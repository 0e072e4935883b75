"""The generated kernels as an implementation of PyTorch's convolutions."""

import torch
from torch import Tensor

from groupconv.kernels import openmp
from groupconv.kernels.parts import parts
from groupconv.kernels.request import Request
from groupconv.kernels.weights import packed


class Native:
    """Runs one :class:`Request` on generated kernels, in float32."""

    def __init__(self, request: Request) -> None:
        self.request = request
        conv = request.conv
        # The batch is that of the request: a call with another is another request.
        like = _layout(
            torch.empty(conv.batch, conv.out_channels, *conv.output_size, device="meta"),
            request.channels_last_output,
        )
        self.size, self.strides = like.shape, like.stride()
        self.ones = [1] * len(conv.output_size)
        self.ready = request.dense and request.dtype == torch.float32
        whole = parts(
            conv,
            channels_last_input=request.channels_last_input,
            channels_last_output=request.channels_last_output,
            bias=request.bias,
        )
        self.parts, self.sparse = whole.parts, whole.sparse
        self.kernels = [part.kernel(conv.batch) for part in self.parts]
        self.offsets = [part.offset for part in self.parts]
        # All that packing depends on, as text, whose hash is remembered.
        self.key = repr(
            [
                (part.spec.conv, part.phase, kernel.machine, kernel.tile)
                for part, kernel in zip(self.parts, self.kernels, strict=True)
            ]
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
            # Outputs that no tap reaches hold the bias alone.
            y.copy_(torch.zeros(()) if bias is None else bias.detach().reshape(-1, *self.ones))
        for kernel, w, offset in zip(self.kernels, weights, self.offsets, strict=True):
            kernel(x, w, bias, y, offset=offset)

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``weight`` as :meth:`compute` takes it."""
        with torch.no_grad():
            weight = weight.to(torch.float32)
            return tuple(
                kernel.pack(part.weight(weight))
                for kernel, part in zip(self.kernels, self.parts, strict=True)
            )


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` dense in memory, its channels innermost or not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
