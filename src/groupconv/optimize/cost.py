"""What each layer of a network costs: parameters, MACs, activation bytes, measured latency.

Counting: one multiply-add is one MAC (a FLOP count would be twice that); additions of a bias,
activations, normalisation and pooling are not MACs; taps that fall on padding are. Operators that
the count leaves out are listed by name with their number of calls.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from groupconv.errors import ArgumentError
from groupconv.targets import get_target
from groupconv.timing import Timing, interleave, machine

# Calls that move no data, or make the tensors that others fill.
# fmt: off
_FREE = frozenset((
    "alias", "as_strided", "detach", "empty", "expand", "ones_like", "permute", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsafe_split",
    "unsqueeze", "view", "_unsafe_view",
))
# fmt: on


@dataclass(frozen=True)
class LayerCost:
    """One row of a profile.

    Args:
        name, kind: qualified name and class of the module.
        calls: forward calls in one pass of the network.
        groups, width: of a convolution (width = input channels per group), else None.
        params: parameters held by the module itself.
        macs: multiply-adds of all calls together.
        activation_bytes: size of the outputs of all calls together.
        latency: seconds of all calls together, with the spread; None when not measured.
    """

    name: str
    kind: str
    calls: int
    groups: int | None
    width: int | None
    params: int
    macs: int
    activation_bytes: int
    latency: Timing | None


@dataclass(frozen=True)
class Profile:
    """Costs of a network, per layer and in total; ``print`` shows them as a table.

    Args:
        layers: one row per module that holds parameters or does arithmetic.
        params, macs, activation_bytes: totals; a shared parameter counts once.
        latency: seconds of one pass without any instrumentation; None when not measured.
        backward: whether MACs include the backward pass.
        not_counted: operators without a MAC formula, with their number of calls.
        target, machine: where latency was measured.
    """

    layers: tuple[LayerCost, ...]
    params: int
    macs: int
    activation_bytes: int
    latency: Timing | None
    backward: bool
    not_counted: dict[str, int]
    target: str
    machine: dict[str, str | int]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, ready for JSON; latencies in seconds."""
        return asdict(self)

    def __str__(self) -> str:
        header = ["layer", "kind", "calls", "groups", "width", "params", "MACs", "act. KiB", "ms"]
        rows = [
            [
                layer.name,
                layer.kind,
                str(layer.calls),
                _or_dash(layer.groups),
                _or_dash(layer.width),
                f"{layer.params:,}",
                f"{layer.macs:,}",
                f"{layer.activation_bytes / 1024:,.0f}",
                _ms(layer.latency),
            ]
            for layer in self.layers
        ]
        total = ["total", "", "", "", "", f"{self.params:,}", f"{self.macs:,}"]
        rows.append([*total, f"{self.activation_bytes / 1024:,.0f}", _ms(self.latency)])
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        passes = "forward and backward" if self.backward else "forward"
        lines.append(f"MACs: {passes}, one multiply-add each, bias not counted.")
        if self.not_counted:
            listed = ", ".join(f"{op} x{n}" for op, n in sorted(self.not_counted.items()))
            lines.append(f"Not counted: {listed}.")
        return "\n".join(lines)


def profile(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    target: str = "eager",
    backward: bool = False,
    latency: bool = True,
    seconds: float = 2.0,
) -> Profile:
    """Count and time every layer of a network.

    The network runs as it is (training or evaluation mode, device, dtype) and is left as it was.

    Args:
        model: any module.
        example_inputs: a tensor such as ``(N, C, H, W)``, or a tuple of the forward's arguments.
        target: runtime whose latency is measured; "eager".
        backward: count the backward pass of the summed outputs too (parameters and inputs that
            require grad).
        latency: whether to measure time.
        seconds: time to spend on measuring.

    Returns:
        Profile

    Raises:
        ArgumentError: unknown target, or example_inputs are not tensors.
    """
    runtime = get_target(target)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ArgumentError(
            f"profile: example_inputs={example_inputs!r} must be a tensor or a tuple of tensors"
        )
    with _untouched(model):
        counter = _MacCounter(model)
        counter.count(inputs, backward)
        times: dict[str, Timing] = {}
        whole = None
        if latency:
            whole, times = _measure(
                runtime.build(model, inputs), model, inputs, counter.calls, seconds
            )
    layers = tuple(
        LayerCost(
            name=name or type(model).__name__,
            kind=type(module).__name__,
            calls=counter.calls[name],
            groups=getattr(module, "groups", None) if _is_conv(module) else None,
            width=module.in_channels // module.groups if _is_conv(module) else None,
            params=sum(p.numel() for p in module.parameters(recurse=False)),
            macs=counter.macs[name],
            activation_bytes=counter.output_bytes[name],
            latency=times.get(name),
        )
        for name, module in model.named_modules()
        if counter.calls[name] and (counter.macs[name] or _has_parameters(module))
    )
    return Profile(
        layers=layers,
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.macs.total(),
        activation_bytes=sum(layer.activation_bytes for layer in layers),
        latency=whole,
        backward=backward,
        not_counted=dict(counter.not_counted),
        target=target,
        machine=machine(),
    )


def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-adds of one forward pass; the model is left as it was."""
    counter = _MacCounter(model)
    with _untouched(model):
        counter.count(inputs, backward=False)
    return counter.macs.total()


class _MacCounter(TorchDispatchMode):
    """Counts MACs by the innermost module that caused them, module calls and output bytes.

    A backward operator belongs to the module whose forward pass made its autograd node; the nodes
    of one thread are numbered in order, so every module call owns a range of numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.output_bytes: Counter[str] = Counter()
        self.not_counted: Counter[str] = Counter()
        self._formulas = {**flop_registry, torch.ops.aten.convolution_backward: _conv_backward}
        self._model = model
        self._running: list[tuple[str, int]] = []
        self._ranges: list[tuple[int, int, str]] = []

    def count(self, inputs: tuple[Tensor, ...], backward: bool) -> None:
        # Leaves of their own, so that the caller's tensors gather no gradient.
        inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(partial(self._leave, name)))
        try:
            # Not inference_mode: there composite operators arrive undecomposed.
            with torch.set_grad_enabled(backward), self:
                outputs = [t for t in tensors_in(self._model(*inputs)) if t.requires_grad]
                if backward:
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._running.append((name, torch._C._autograd._get_sequence_nr()))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        _, start = self._running.pop()
        self._ranges.append((start, torch._C._autograd._get_sequence_nr(), name))
        self.calls[name] += 1
        self.output_bytes[name] += sum(t.numel() * t.element_size() for t in tensors_in(output))

    def _where(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._running[-1][0] if self._running else ""
        number = node._sequence_nr()
        inside = [(end - start, name) for start, end, name in self._ranges if start <= number < end]
        return min(inside)[1] if inside else ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func._overloadpacket
        if op in self._formulas:
            flops = self._formulas[op](*args, **(kwargs or {}), out_val=out)
            self.macs[self._where()] += flops // 2
        elif op.__name__ not in _FREE:
            self.not_counted[op.__name__] += 1
        return out


def _conv_backward(grad_output: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any) -> int:
    """FLOPs of both gradients: each meets every weight as often as the forward pass does.

    torch's own formula takes the shapes of the gradients for those of dense layers.
    """
    transposed, wanted = args[4], args[7]
    shapes = (list(x.shape), list(weight.shape), list(grad_output.shape))
    return sum(wanted[:2]) * conv_flop_count(*shapes, transposed)


def _measure(
    plain: Callable[[], object],
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    calls: Counter[str],
    seconds: float,
) -> tuple[Timing, dict[str, Timing]]:
    """Time the network without hooks and its modules with hooks, in turn, in one run."""
    started: dict[str, float] = {}
    spent: defaultdict[str, float] = defaultdict(float)
    samples: dict[str, list[float]] = {}

    def before(name: str, module: nn.Module, args: Any) -> None:
        started[name] = time.perf_counter()

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        spent[name] += time.perf_counter() - started[name]

    def hooked() -> None:
        spent.clear()
        handles = []
        for name, module in model.named_modules():
            if calls[name]:
                handles.append(module.register_forward_pre_hook(partial(before, name)))
                handles.append(module.register_forward_hook(partial(after, name)))
        try:
            with torch.inference_mode():
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        for name, value in spent.items():
            samples.setdefault(name, []).append(value)

    whole = interleave({"plain": plain, "hooked": hooked}, seconds=seconds)["plain"]
    # The first two runs of each are warm-up.
    return whole, {name: Timing.of(values[2:]) for name, values in samples.items()}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Bring back buffers (batch norm's statistics) and gradients as they were."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for p, grad in grads:
            p.grad = grad


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.median * 1e3:.3f}"
