"""Which implementation runs a convolution: one ordered table, with a reason for every refusal.

``GROUPCONV_NATIVE=1`` takes a native kernel wherever one is legal, ``GROUPCONV_NATIVE=0`` never;
otherwise those that are legal are timed on the first call of a kind, and the fastest one is
remembered on disk. ``GROUPCONV_TUNE=0`` takes the first legal one. Settings count from the first
call of a kind on.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.kernels import cache, openmp
from groupconv.kernels.machine import runnable
from groupconv.kernels.native import Native
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec
from groupconv.kernels.tuning import tuning
from groupconv.timing import interleave

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
# Seconds for which the implementations of a call are compared.
_COMPARING = 0.05


class Implementation(ABC):
    """A way to run a convolution."""

    name: str

    @abstractmethod
    def why_not(self, request: Request) -> str | None:
        """Why it can't run ``request``, or None when it can."""

    @abstractmethod
    def prepare(self, request: Request) -> Run:
        """Make ready; the result takes input, weight and bias."""


class _Native(Implementation):
    """A generated kernel."""

    name = "native"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def why_not(self, request: Request) -> str | None:
        if os.environ.get("GROUPCONV_NATIVE") == "0":
            return "GROUPCONV_NATIVE=0"
        if not runnable():
            return "no code can be generated for this processor"
        if request.dtype not in self.dtypes:
            legal = " or ".join(str(dtype) for dtype in self.dtypes)
            return f"the input is {request.dtype}, this takes {legal}"
        if request.mixed:
            return "input, weight and bias differ in dtype"
        if len(request.conv.input_size) == 3:
            return "kernels have 1 or 2 spatial axes, the input has 3"
        return None

    def prepare(self, request: Request) -> Run:
        return Native(request)


class _NativeLowPrecision(_Native):
    """Sums in float32, rounded once: more exact, and faster where PyTorch has no fast path."""

    name = "native in float32"
    dtypes = (torch.bfloat16, torch.float16)


class _Aten(Implementation):
    """PyTorch's own."""

    name = "aten"

    def why_not(self, request: Request) -> str | None:
        return None

    def prepare(self, request: Request) -> Run:
        return lambda input, weight, bias: aten(request.conv, input, weight, bias)


TABLE: tuple[Implementation, ...] = (_Native(), _NativeLowPrecision(), _Aten())


def aten(conv: ConvSpec, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own convolution."""
    dims = len(conv.input_size)
    pads: Any = [before for before, _ in conv.padding]
    if conv.transposed:
        extra = conv.output_padding or (0,) * dims
        return _CONV_TRANSPOSE[dims - 1](
            input, weight, bias, conv.stride, pads, extra, conv.groups, conv.dilation
        )
    if any(before != after for before, after in conv.padding):
        pads = "same"
    return _CONV[dims - 1](input, weight, bias, conv.stride, pads, conv.dilation, conv.groups)


@dataclass(frozen=True)
class Choice:
    """What was decided for one kind of call.

    Args:
        conv: the convolution.
        name: of the implementation that runs.
        run: runs it.
        refused: name of every other implementation to the reason why it does not run.
    """

    conv: ConvSpec
    name: str
    run: Run
    refused: dict[str, str]

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution; input is batched."""
        if _listeners:
            tell(self.name, self.refused)
        if (
            self.name != "aten"
            and torch.is_grad_enabled()
            and (
                input.requires_grad
                or weight.requires_grad
                or (bias is not None and bias.requires_grad)
            )
        ):
            return _Differentiable.apply(self, input, weight, bias)
        return self.run(input, weight, bias)


class _Differentiable(torch.autograd.Function):
    """Forward on a kernel of ours, backward on PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, choice: Choice, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.conv, ctx.biased = choice.conv, bias is not None
        ctx.save_for_backward(input, weight)
        return choice.run(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        conv: ConvSpec = ctx.conv
        input, weight = ctx.saved_tensors
        # What only one end has becomes part of the input.
        common, rest = conv.even_padding
        if any(rest):
            input = F.pad(input, rest)
        found = torch.ops.aten.convolution_backward(
            grads[0], input, weight, [conv.out_channels] if ctx.biased else None,
            conv.stride, common, conv.dilation, conv.transposed,
            conv.output_padding or [0] * len(conv.stride), conv.groups,
            list(ctx.needs_input_grad[1:]),
        )  # fmt: skip
        grad_input, *others = found
        if any(rest) and grad_input is not None:
            grad_input = F.pad(grad_input, [-n for n in rest])
        return None, grad_input, *others


Listener = Callable[[str, dict[str, str]], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While the block runs, call ``listener`` with the name of each implementation that runs, and
    why the others don't."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(name: str, refused: dict[str, str]) -> None:
    """Tell all listeners of a call."""
    for listener in _listeners:
        listener(name, refused)


def tell_lowered(reason: str) -> None:
    """Tell all listeners of a call that was left to PyTorch before any choice."""
    tell("aten", {way.name: reason for way in TABLE if way.name != "aten"})


Signature = tuple[Any, ...]
_choices: dict[Signature, Choice] = {}
# More kinds of calls than a program makes, unless sizes vary without end.
_MOST_CHOICES = 4096


def signature(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Signature:
    """All that a choice depends on: of the tensors, the convolution's arguments, and threads."""
    return (
        input.shape, input.stride(), input.dtype, weight.shape, weight.stride(), weight.dtype,
        None if bias is None else (bias.shape, bias.dtype), openmp.threads() > 1, arguments,
    )  # fmt: skip


def known(call: Signature) -> Choice | None:
    """The choice made before for a call."""
    return _choices.get(call)


def choose(
    call: Signature | None, conv: ConvSpec, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Choice:
    """Decide by the table, and by the clock where several implementations are legal.

    The choice is remembered by ``call`` unless that is None.
    """
    with torch.no_grad(), openmp.own_threads():
        request = Request.of(conv, input, weight, bias)
        refused = {way.name: way.why_not(request) for way in TABLE}
        runs = {way.name: way.prepare(request) for way in TABLE if refused[way.name] is None}
        best, *others = runs
        for name in others:
            refused[name] = f"{best} comes first"
        if others and tuning() and os.environ.get("GROUPCONV_NATIVE") != "1":
            times = _compare(request, runs, input, weight, bias)
            best = min(times, key=times.__getitem__)
            for name, seconds in times.items():
                refused[name] = f"{seconds * 1e6:.0f} us, {best} {times[best] * 1e6:.0f} us"
    reasons = {name: why for name, why in refused.items() if why and name != best}
    choice = Choice(conv, best, runs[best], reasons)
    if call is not None:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        _choices[call] = choice
    return choice


def _compare(
    request: Request,
    runs: dict[str, Run],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> dict[str, float]:
    """Seconds that each implementation takes, from the cache or measured now."""
    key = cache.key("choice", replace(request.conv, batch=1), request.dtype, request.bias,
                    request.channels_last_input, request.channels_last_output, request.dense,
                    runnable(), openmp.threads(), torch.__version__)  # fmt: skip
    entry = cache.read(key)
    if entry is not None:
        return json.loads(entry)
    calls = {name: _bind(run, input, weight, bias) for name, run in runs.items()}
    times = interleave(calls, seconds=_COMPARING, min_runs=1, max_runs=50)
    result = {name: timing.q1 for name, timing in times.items()}
    cache.write(key, json.dumps(result).encode())
    return result


def _bind(run: Run, input: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    return lambda: run(input, weight, bias)
