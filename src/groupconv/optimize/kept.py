"""Layers with fewer channels: which of them stay, and parameters cut to those.

A strand (see :mod:`~groupconv.optimize.spaces`) leaves with every index of a parameter that runs
along it, so that the network that is left is an ordinary smaller one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groupconv.errors import DataError
from groupconv.optimize.spaces import Axis
from groupconv.optimize.structure import Layer, Narrowed, layout
from groupconv.optimize.trace import Trace

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase
# Modules whose sizes follow from the shapes of their tensors.
RESIZABLE = (_Conv, _Norm, nn.Linear, nn.PReLU)

# Module to parameter to its shape.
Shapes = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Kept:
    """The channels that a layer keeps, in their order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int = 1

    @property
    def structure(self) -> Narrowed:
        """The layer with so many channels."""
        return Narrowed(len(self.inputs), len(self.outputs), self.groups)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Kept":
        """What ``dataclasses.asdict`` gave, or JSON made of it."""
        inputs, outputs = (tuple(int(i) for i in values[key]) for key in ("inputs", "outputs"))
        return cls(inputs, outputs, int(values["groups"]))


def kept_by_layers(trace: Trace, strands: Mapping[int, Sequence[int]]) -> dict[str, Kept]:
    """What every traced layer keeps that touches a space which loses strands.

    Args:
        trace: of the network.
        strands: space to the strands that stay; other spaces stay whole.
    """
    result = {}
    for conv in trace.convs:
        if strands.keys().isdisjoint((*conv.inputs.spaces, *conv.outputs.spaces)):
            continue
        inputs, outputs = (tuple(stays(a, strands).tolist()) for a in (conv.inputs, conv.outputs))
        groups = conv.spec.groups
        result[conv.name] = Kept(inputs, outputs, len(inputs) if groups > 1 else 1)
    return result


def strands_kept(trace: Trace, layers: Mapping[str, Kept]) -> dict[int, tuple[int, ...]]:
    """The strands that stay of every space that loses some.

    Raises:
        DataError: layers that share channels keep different ones.
    """
    gone: dict[int, set[int]] = {}
    for conv in trace.convs:
        if conv.name not in layers:
            continue
        kept = layers[conv.name]
        for axis, left in ((conv.inputs, kept.inputs), (conv.outputs, kept.outputs)):
            for place in sorted(set(range(len(axis.spaces))) - set(left)):
                gone.setdefault(axis.spaces[place], set()).add(axis.strands[place])
    strands = {
        space: tuple(s for s in range(trace.spaces[space].channels) if s not in some)
        for space, some in gone.items()
    }
    expected = kept_by_layers(trace, strands)
    wrong = [name for name in {**layers, **expected} if layers.get(name) != expected.get(name)]
    if wrong:
        raise DataError(
            f"layers that share channels must keep the same ones: {', '.join(sorted(wrong))}"
        )
    return strands


def stays(axis: Axis, strands: Mapping[int, Sequence[int]]) -> NDArray[np.int64]:
    """The positions on an axis that stay."""
    left = np.ones(len(axis.spaces), dtype=bool)
    for space, positions in axis.parts.items():
        if space in strands:
            left[positions] = False
            left[positions[list(strands[space])]] = True
    return np.flatnonzero(left)


@torch.no_grad()
def cut(net: nn.Module, trace: Trace, strands: Mapping[int, Sequence[int]]) -> Shapes:
    """Take strands out of a network, in place; its weights are otherwise as they were.

    Args:
        net: a copy of the traced network, its channels in the original order.
        trace: of it.
        strands: space to those that stay; other spaces stay whole.

    Returns:
        of every module that is smaller now its parameters and buffers that are, and their shapes.
    """
    shapes: dict[str, dict[str, Sequence[int]]] = {}
    for member in trace.members:
        if strands.keys().isdisjoint(member.runs.spaces):
            continue
        tensor: Tensor = getattr(net.get_submodule(member.module), member.parameter)
        index = torch.from_numpy(stays(member.runs, strands)).to(tensor.device)
        # Its data, so that modules that share the tensor go on sharing it.
        fewer = tensor.data.index_select(member.axis, index)
        tensor.data = fewer.contiguous(memory_format=layout(tensor))
        shapes.setdefault(member.module, {})[member.parameter] = tuple(tensor.shape)
    for module in net.modules():
        _resize(module)
    return shapes


@torch.no_grad()
def shrink(model: nn.Module, shapes: Shapes) -> None:
    """Give modules the shapes that :func:`cut` told, with no values yet, in place.

    Raises:
        AttributeError: the model has no such module or tensor.
    """
    for name, tensors in shapes.items():
        module = model.get_submodule(name)
        for parameter, shape in tensors.items():
            tensor: Tensor = getattr(module, parameter)
            tensor.data = tensor.data.new_zeros(tuple(shape))
        _resize(module)


def _resize(module: nn.Module) -> None:
    """Set a module's sizes by the shapes of its tensors."""
    if isinstance(module, _Conv):
        rows, width = module.weight.shape[:2]
        if module.groups > 1:
            # Its groups are as many as before for each row, whether whole or depthwise.
            before = module.in_channels if module.transposed else module.out_channels
            module.groups = rows * module.groups // before
        sizes = (rows, width * module.groups)
        module.in_channels, module.out_channels = sizes if module.transposed else sizes[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, _Norm):
        vectors = [v for v in (module.weight, module.running_mean) if v is not None]
        module.num_features = len(vectors[0]) if vectors else module.num_features


def give_bias(layer: Layer) -> None:
    """Give a layer that has none a bias of 0."""
    if layer.bias is None:
        weight = layer.weight
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(weight.new_zeros(count), weight.requires_grad)
