"""Measured time of every candidate of a layer, against the layer in the same run.

A candidate is timed as it runs in the network: with the activation that follows it, which most
runtimes make a part of its last convolution, and after as many bytes have passed through the caches
as the network has weights.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from groupconv import events
from groupconv.kernels.spec import ConvSpec, same_padding
from groupconv.nn import ChannelPermutation
from groupconv.optimize.structure import Structure
from groupconv.optimize.trace import TracedConv
from groupconv.targets import LatencyTable, Target

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADS: tuple[Callable[..., nn.Module], ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_SECONDS = 0.1
# What is more than the caches hold is as good as anything.
_MOST_BESIDE = 1 << 27
# By PyTorch's operators, without the underscore of those that work in place.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}

# A structure, and whether an explicit permutation stands before and after it.
Timed = tuple[Structure, bool, bool]


def layer_times(
    layers: Mapping[str, tuple[TracedConv, Sequence[Timed]]],
    table: LatencyTable,
    batch: int,
    beside: int,
) -> dict[str, list[float]]:
    """Seconds of structures in place of layers, for ``batch`` images per call.

    Args:
        layers: name to the layer and what may stand in its place; those of one layer are timed in
            one run.
        table: of times known already; grows.
        batch: images per call.
        beside: bytes that the network reads between two passes of a layer.

    Returns:
        layer name to one time per structure, explicit permutations included.
    """
    others = torch.ones(min(beside, _MOST_BESIDE) // 4)
    return {
        name: _times(replace(conv.spec, batch=batch), _activation(conv), structures, table, others)
        for name, (conv, structures) in events.followed("measure", layers.items(), len(layers))
    }


def _activation(conv: TracedConv) -> str | None:
    """The operator that follows a layer and its batch norm, if it is a known activation."""
    following = (name for name in conv.then if name != "batch_norm")
    return next((name if name in _ACTIVATIONS else None for name in following), None)


def _times(
    dense: ConvSpec,
    activation: str | None,
    structures: Sequence[Timed],
    table: LatencyTable,
    others: Tensor,
) -> list[float]:
    target, after = table.target, f" after {others.nbytes / 1e6:.1f} MB"
    builds: dict[str, Callable[[], Callable[[], object]]] = {}
    parts: list[list[str]] = []
    for structure, permute_in, permute_out in structures:
        key = f"{_describe(dense)} {structure}" + (f" + {activation}" if activation else "") + after
        builds[key] = lambda structure=structure: _build(  # type: ignore[misc]
            target, dense, structure, activation
        )
        used = [key]
        for wanted, channels, size in (
            (permute_in, dense.in_channels, dense.input_size),
            (permute_out, dense.out_channels, dense.output_size),
        ):
            if wanted:
                shape = (dense.batch, channels, *size)
                key = f"permute {'x'.join(map(str, shape))}{after}"
                builds[key] = lambda shape=shape: _build_permutation(target, shape)  # type: ignore[misc]
                used.append(key)
        parts.append(used)
    times = table.measure(builds, seconds=_SECONDS, between=others.sum)
    return [sum(times[key].median for key in used) for used in parts]


def _build(
    target: Target, dense: ConvSpec, structure: Structure, activation: str | None
) -> Callable[[], object]:
    reads = structure.specs(dense)[0]
    if dense.linear:
        linear = nn.utils.skip_init(nn.Linear, dense.in_channels, dense.out_channels)
        return _timed(target, reads, structure.build(linear, bias=True), activation)
    kind = len(dense.input_size) - 1
    padding, rest = dense.even_padding
    keeps_size = list(dense.padding) == same_padding(dense.kernel_size, dense.dilation)
    same = any(rest) and keeps_size and max(dense.stride) == 1
    conv = nn.utils.skip_init(
        _CONVS[kind],
        dense.in_channels,
        dense.out_channels,
        dense.kernel_size,
        stride=dense.stride,
        padding="same" if same else padding,
        dilation=dense.dilation,
    )
    assert isinstance(conv, nn.modules.conv._ConvNd)
    steps = structure.build(conv, bias=True)
    if any(rest) and not same:
        # As the layers do that pad to the size that TensorFlow's "same" gives.
        steps["pad"] = _PADS[kind](tuple(rest), 0.0)
        steps.move_to_end("pad", last=False)
    return _timed(target, reads, steps, activation)


def _timed(
    target: Target,
    reads: ConvSpec,
    steps: OrderedDict[str, nn.Module],
    activation: str | None,
) -> Callable[[], object]:
    if activation is not None:
        steps["activation"] = _ACTIVATIONS[activation]()
    net = nn.Sequential(steps)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.01)
    x = torch.randn(reads.batch, reads.in_channels, *reads.input_size)
    return target.build((net if len(net) > 1 else net[0]).eval(), (x,))


def _build_permutation(target: Target, shape: tuple[int, ...]) -> Callable[[], object]:
    # Reversed: an order that can't be served by one run of memory.
    permutation = ChannelPermutation(torch.arange(shape[1]).flip(0)).eval()
    return target.build(permutation, (torch.randn(shape),))


def _describe(spec: ConvSpec) -> str:
    def numbers(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    return (
        f"conv {spec.in_channels}->{spec.out_channels} k{numbers(spec.kernel_size)} "
        f"s{numbers(spec.stride)} p{numbers(tuple(n for ends in spec.padding for n in ends))} "
        f"d{numbers(spec.dilation)} @{spec.batch}x{numbers(spec.input_size)}"
    )
