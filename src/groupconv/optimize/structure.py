"""What may stand in place of a convolution: a new structure is one small class here.

A linear layer is a convolution on no axes; it has no groups, and of the pairs only the low rank.

A structure says which convolutions it is made of, which gives its cost, and builds them. How the
weights are found is in :mod:`~groupconv.optimize.fit` and :mod:`~groupconv.optimize.pair`.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError, DataError
from groupconv.kernels.spec import ConvSpec, check_groups
from groupconv.nn import ChannelShuffle
from groupconv.nn.dense import expanded

# What a structure may stand in place of.
Layer = nn.modules.conv._ConvNd | nn.Linear


def channels(layer: Layer) -> tuple[int, int]:
    """Input and output channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def dense_weight(layer: Layer) -> Tensor:
    """``(C_out, C_in, *k)``: the weight of a layer that is not transposed, 0 between its groups."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    return weight if groups == 1 else expanded(weight, groups)


@dataclass(frozen=True)
class Grouped:
    """One convolution in groups.

    Args:
        groups: divides both channel counts; 1 is a dense convolution.
    """

    groups: int

    def __str__(self) -> str:
        return "dense" if self.groups == 1 else f"groups={self.groups}"

    def check(self, where: str, layer: Layer) -> None:
        """Raise ArgumentError unless the structure can stand in place of a layer."""
        if self.groups != 1:
            _check_axes(where, layer, self)
        check_groups(where, *channels(layer), self.groups)

    def specs(self, layer: ConvSpec) -> tuple[ConvSpec, ...]:
        """Its convolutions in place of a layer, in the order in which they run."""
        return (replace(layer, groups=self.groups),)

    def build(self, conv: Layer, bias: bool) -> OrderedDict[str, nn.Module]:
        """Its modules, in their order, the weights zero.

        The convolution itself is cut, so that all else that a user set on it stays.

        Args:
            conv: the layer to replace.
            bias: whether there must be a bias.
        """
        return OrderedDict(conv=_emptied(conv, *channels(conv), self.groups, bias))


@dataclass(frozen=True)
class Narrowed:
    """The layer itself with fewer channels.

    Args:
        inputs, outputs: channels that are left.
        groups: 1, or of a depthwise convolution as many as inputs.
    """

    inputs: int
    outputs: int
    groups: int = 1

    def __str__(self) -> str:
        depthwise = ", depthwise" * (self.groups > 1)
        return f"{self.inputs} to {self.outputs} channels{depthwise}"

    def check(self, where: str, layer: Layer) -> None:
        """Raise ArgumentError unless the structure can stand in place of a layer."""
        for side, left, now in zip(
            ("inputs", "outputs"), (self.inputs, self.outputs), channels(layer), strict=True
        ):
            if not 1 <= left <= now:
                raise ArgumentError(f"{where}: {side}={left} must be 1 to {now}, which it has now")
        depthwise = getattr(layer, "groups", 1) > 1
        if self.groups != (self.inputs if depthwise else 1):
            raise ArgumentError(
                f"{where}: groups={self.groups} must be "
                + (f"{self.inputs}, one for each input" if depthwise else "1")
            )
        check_groups(where, self.inputs, self.outputs, self.groups)

    def specs(self, layer: ConvSpec) -> tuple[ConvSpec, ...]:
        """Its convolution in place of a layer."""
        return (
            replace(layer, in_channels=self.inputs, out_channels=self.outputs, groups=self.groups),
        )

    def build(self, conv: Layer, bias: bool) -> OrderedDict[str, nn.Module]:
        """The convolution itself, cut, the weights zero.

        Args:
            conv: the layer to replace.
            bias: whether there must be a bias.
        """
        return OrderedDict(conv=_emptied(conv, self.inputs, self.outputs, self.groups, bias))


@dataclass(frozen=True)
class Pair:
    """Two convolutions: the first with the layer's kernel, the second pointwise.

    Low rank, depthwise-separable, grouped + pointwise and the grouped pair with shuffle are all of
    this kind.

    Args:
        middle: channels between them, M.
        groups: of the first; divides its input channels and M.
        pointwise_groups: of the second; divides M and its output channels.
        shuffle: whether the middle channels are shuffled, as ``torch.nn.ChannelShuffle(groups)``.
    """

    middle: int
    groups: int
    pointwise_groups: int
    shuffle: bool

    def __str__(self) -> str:
        if self.groups == self.pointwise_groups == 1:
            return f"rank {self.middle}"
        shuffled = ", shuffled," * self.shuffle
        first = f"groups={self.groups} to {self.middle} channels{shuffled}"
        return f"{first} + pointwise groups={self.pointwise_groups}"

    def check(self, where: str, layer: Layer) -> None:
        """Raise ArgumentError unless the structure can stand in place of a layer."""
        reads, writes = channels(layer)
        if self.groups != 1 or self.pointwise_groups != 1:
            _check_axes(where, layer, self)
        check_groups(f"{where}: first of the pair", reads, self.middle, self.groups)
        check_groups(f"{where}: second of it", self.middle, writes, self.pointwise_groups)

    def specs(self, layer: ConvSpec) -> tuple[ConvSpec, ...]:
        """Its convolutions in place of a layer, in the order in which they run."""
        first = replace(layer, out_channels=self.middle, groups=self.groups)
        ones = (1,) * len(layer.input_size)
        second = ConvSpec(
            batch=layer.batch,
            in_channels=self.middle,
            out_channels=layer.out_channels,
            input_size=layer.output_size,
            kernel_size=ones,
            stride=ones,
            padding=((0, 0),) * len(ones),
            dilation=ones,
            groups=self.pointwise_groups,
        )
        return first, second

    def order(self) -> Tensor:
        """``(M,)``: for each input of the second, the output of the first that it is."""
        plain = torch.arange(self.middle)
        return plain.reshape(self.groups, -1).T.flatten() if self.shuffle else plain

    def build(self, conv: Layer, bias: bool) -> OrderedDict[str, nn.Module]:
        """Its modules, in their order, the weights zero.

        Args:
            conv: the layer to replace.
            bias: whether there must be a bias.
        """
        on: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        bias = bias or conv.bias is not None
        first: nn.Module
        second: nn.Module
        if isinstance(conv, nn.Linear):
            first = nn.Linear(conv.in_features, self.middle, bias=False, **on)
            second = nn.Linear(self.middle, conv.out_features, bias, **on)
        else:
            kind: Any = type(conv)
            first = kind(
                conv.in_channels, self.middle, conv.kernel_size, conv.stride, conv.padding,
                conv.dilation, self.groups, False, conv.padding_mode, **on,
            )  # fmt: skip
            second = kind(
                self.middle, conv.out_channels, 1, groups=self.pointwise_groups, bias=bias, **on
            )
        steps: OrderedDict[str, nn.Module] = OrderedDict(conv=first)
        if self.shuffle:
            steps["shuffle"] = ChannelShuffle(self.groups)
        steps["pointwise"] = second
        first.to(memory_format=layout(conv.weight))
        for parameter in (*first.parameters(), *second.parameters()):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(conv.weight.requires_grad)
        return steps


def _emptied(conv: Layer, inputs: int, outputs: int, groups: int, bias: bool) -> Layer:
    """The layer itself, its weights zero and of other sizes."""
    weight = conv.weight
    size = (outputs, inputs // groups, *weight.shape[2:])
    fresh = weight.new_zeros(size).contiguous(memory_format=layout(weight))
    if isinstance(conv, nn.Linear):
        conv.in_features, conv.out_features = inputs, outputs
    else:
        conv.in_channels, conv.out_channels, conv.groups = inputs, outputs, groups
    conv.weight = nn.Parameter(fresh, weight.requires_grad)
    if conv.bias is None and bias:
        conv.bias = nn.Parameter(weight.new_zeros(outputs), weight.requires_grad)
    elif conv.bias is not None and len(conv.bias) != outputs:
        conv.bias = nn.Parameter(weight.new_zeros(outputs), conv.bias.requires_grad)
    return conv


def _check_axes(where: str, layer: Layer, structure: "Structure") -> None:
    if isinstance(layer, nn.Linear):
        raise ArgumentError(
            f"{where}: {structure} can't stand in place of a linear layer; a low rank can: a pair "
            "with groups=1 and pointwise_groups=1"
        )


def layout(weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's weight."""
    if weight.ndim > 3 and not weight.is_contiguous():
        return torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


Structure = Grouped | Narrowed | Pair
_KINDS: dict[str, type[Structure]] = {"grouped": Grouped, "narrowed": Narrowed, "pair": Pair}
DENSE = Grouped(1)


def unchanged(layer: ConvSpec) -> Grouped:
    """The structure that a layer has before anything stands in its place."""
    return Grouped(layer.groups)


def kind(structure: Structure) -> str:
    """Its name in plans."""
    return next(name for name, cls in _KINDS.items() if type(structure) is cls)


def macs(structure: Structure, layer: ConvSpec) -> int:
    """Multiply-adds of one image."""
    return sum(spec.macs // max(spec.batch, 1) for spec in structure.specs(layer))


def weights(structure: Structure, layer: ConvSpec) -> int:
    """Number of weights; biases are not counted."""
    return sum(math.prod(spec.weight_shape) for spec in structure.specs(layer))


def to_dict(structure: Structure) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {"structure": kind(structure), **asdict(structure)}


def from_dict(values: Mapping[str, Any]) -> Structure:
    """The structure that :func:`to_dict` wrote; other keys are left to others.

    Raises:
        DataError: there is no structure of that kind.
    """
    name = str(values.get("structure", "grouped"))
    if name not in _KINDS:
        raise DataError(f"structure={name!r} must be one of {', '.join(_KINDS)}")
    if name == "grouped":
        return Grouped(int(values["groups"]))
    if name == "narrowed":
        return Narrowed(*(int(values[n]) for n in ("inputs", "outputs", "groups")))
    middle, groups, pointwise = (int(values[n]) for n in ("middle", "groups", "pointwise_groups"))
    return Pair(middle, groups, pointwise, bool(values["shuffle"]))
