"""Channels of a convolution scaled, shifted or put into another order, by way of its weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler.graph import Convolution, Node
from groupconv.kernels.spec import ConvSpec


def reads_planes(node: Node) -> bool:
    """Whether a convolution reads a contiguous tensor as images, so that the channels that it sums
    over are not those of the value."""
    return node.inputs[0].axis != 1 and node.output.axis == 1


def scale_outputs(operator: Convolution, factor: Tensor) -> Convolution:
    """What ``factor`` (out_channels,) times the results is; it has no activation or residual."""
    conv = operator.conv
    rows = factor.double().reshape(conv.groups, -1, 1, 1, 1)
    bias = None if operator.bias is None else (operator.bias.double() * factor).float()
    return replace(operator, weight=_whole(conv, _split(operator).double() * rows), bias=bias)


def shift_outputs(operator: Convolution, amount: Tensor) -> Convolution:
    """``amount`` (out_channels,) more, before the activation."""
    if operator.bias is not None:
        amount = operator.bias.double() + amount
    return replace(operator, bias=amount.float())


def scale_inputs(operator: Convolution, factor: Tensor) -> Convolution:
    """The same for an input that still is to be multiplied by ``factor`` (in_channels,)."""
    conv = operator.conv
    columns = _taken(operator, factor).double().reshape(conv.groups, 1, -1, 1, 1)
    return replace(operator, weight=_whole(conv, _split(operator).double() * columns))


def shift_inputs(operator: Convolution, amount: Tensor) -> Convolution:
    """The same for an input to which ``amount`` (in_channels,) still is to be added.

    Only where every output sees every tap: without padding, and not transposed.
    """
    conv = operator.conv
    columns = _taken(operator, amount).double().reshape(conv.groups, 1, -1, 1, 1)
    return shift_outputs(operator, (_split(operator).double() * columns).sum((2, 3, 4)).flatten())


def may_select(operator: Convolution, order: Sequence[int]) -> bool:
    """Whether its groups permit :func:`select_outputs`: each must keep its outputs."""
    conv = operator.conv
    width = conv.out_channels // conv.groups
    return conv.groups == 1 or (
        len(order) == conv.out_channels
        and all(new // width == old // width for new, old in enumerate(order))
    )


def select_outputs(operator: Convolution, order: Sequence[int]) -> Convolution:
    """Its output i is what output ``order[i]`` was."""
    assert may_select(operator, order)
    conv, index = replace(operator.conv, out_channels=len(order)), torch.tensor(order)
    rows = _split(operator).flatten(0, 1)[index]
    split = rows.unflatten(0, (conv.groups, -1))
    bias = None if operator.bias is None else operator.bias[index]
    return replace(operator, conv=conv, weight=_whole(conv, split), bias=bias)


def order_of_outputs(operator: Convolution, order: Sequence[int]) -> tuple[int, ...] | None:
    """The order of the outputs for an input whose channel i is what channel ``order[i]`` was.

    Whole groups that trade places, as in a depthwise convolution, take their outputs with them;
    otherwise they stay where they are. None for what :func:`reorder_inputs` can't do.
    """
    conv = operator.conv
    groups = _moved_groups(operator, order)
    if groups is None:
        return None if conv.transposed else tuple(range(conv.out_channels))
    width = conv.out_channels // conv.groups
    return tuple(group * width + i for group in groups for i in range(width))


def reorder_inputs(operator: Convolution, order: Sequence[int]) -> Convolution:
    """The same for an input whose channel i is what channel ``order[i]`` was.

    Its outputs are then in the order :func:`order_of_outputs`. Groups that would share channels
    read them in an order of their own, which only plain convolutions can.
    """
    conv = operator.conv
    width = conv.in_channels // conv.groups
    groups, taken = _moved_groups(operator, order), _taken_from(operator, order)
    if groups is None:
        assert not conv.transposed
        return replace(operator, order=taken)
    # Column i of the weights was for what is now channel taken[i]: they move there, and with them
    # the groups that are theirs.
    column = torch.tensor(taken).argsort().reshape(conv.groups, width) % width
    split = _split(operator)[torch.tensor(groups)]
    split = split.gather(2, column[:, None, :, None, None].expand(split.shape))
    bias = operator.bias
    if bias is not None:
        bias = bias.unflatten(0, (conv.groups, -1))[torch.tensor(groups)].flatten()
    return replace(operator, weight=_whole(conv, split), bias=bias, order=None)


def _taken_from(operator: Convolution, order: Sequence[int]) -> tuple[int, ...]:
    """Which channel of the reordered input each column of the weights is for."""
    place = {old: new for new, old in enumerate(order)}
    return tuple(place[i] for i in operator.order or range(operator.conv.in_channels))


def _moved_groups(operator: Convolution, order: Sequence[int]) -> list[int] | None:
    """Which group comes to each place; None where their channels mix."""
    conv = operator.conv
    width = conv.in_channels // conv.groups
    taken = _taken_from(operator, order)
    places = [i // width for i in taken[::width]]
    if any(new // width != places[i // width] for i, new in enumerate(taken)):
        return None
    return torch.tensor(places).argsort().tolist()


def _taken(operator: Convolution, channels: Tensor) -> Tensor:
    return channels if operator.order is None else channels[torch.tensor(operator.order)]


def _split(operator: Convolution) -> Tensor:
    """The weights as (groups, outputs, inputs, rows, columns)."""
    split = operator.weight.unflatten(0, (operator.conv.groups, -1))
    return split.transpose(1, 2) if operator.conv.transposed else split


def _whole(conv: ConvSpec, split: Tensor) -> Tensor:
    """The weights as ``conv`` has them, float32, from :func:`_split`."""
    split = split.transpose(1, 2) if conv.transposed else split
    return split.flatten(0, 1).float().contiguous()
