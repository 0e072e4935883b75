"""A choice of partitions applied to a model: an edited copy, its permutations absorbed.

Each space of channels (see :mod:`groupconv.optimize.spaces`) takes the order of the first planned
layer that touches it; every weight and batch norm on the space is reordered once, at no cost when
the network runs. Only a layer whose order the space doesn't have gets a
:class:`~groupconv.nn.ChannelPermutation` of its own.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from groupconv.errors import DataError
from groupconv.kernels.spec import check_groups
from groupconv.nn import ChannelPermutation
from groupconv.optimize.fold import reorder
from groupconv.optimize.partition import Partition
from groupconv.optimize.trace import Trace, TracedConv

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Edit:
    """What stands in place of one convolution.

    Args:
        groups: of the new convolution.
        bias: whether it has a bias.
        order_in, order_out: explicit permutation before and after it, or None.
    """

    groups: int
    bias: bool
    order_in: tuple[int, ...] | None = None
    order_out: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Edit":
        orders = (values.get("order_in"), values.get("order_out"))
        return cls(
            int(values["groups"]),
            bool(values["bias"]),
            *(None if order is None else tuple(int(i) for i in order) for order in orders),
        )


@dataclass(frozen=True)
class Placed:
    """A planned layer in the converted network.

    Args:
        conv: the traced layer of the original network.
        module: name of the new convolution, ``name`` or ``name.conv``.
        channels_in, channels_out: original channel at each position of its input and output.
    """

    conv: TracedConv
    module: str
    channels_in: tuple[int, ...]
    channels_out: tuple[int, ...]


@dataclass(frozen=True)
class Converted:
    """A converted copy of a network, the edits that made it, and where each layer went."""

    model: nn.Module
    edits: dict[str, Edit]
    placed: tuple[Placed, ...]


@torch.no_grad()
def convert(model: nn.Module, trace: Trace, partitions: Mapping[str, Partition]) -> Converted:
    """Cut the planned layers into groups; weights are those of the original, cut, not refitted.

    Args:
        model: left as it was.
        trace: of the model.
        partitions: layer name to partition; earlier entries claim the order of a space first.

    Raises:
        ArgumentError: a partition does not divide its layer's channels.
        DataError: a name is not a traced dense convolution.
    """
    convs = {conv.name: conv for conv in trace.convs}
    for name, partition in partitions.items():
        if name not in convs:
            reason = trace.skipped.get(name, "no such convolution")
            raise DataError(f"plan: layer {name!r} can't be converted: {reason}")
        spec = convs[name].spec
        if spec.groups != 1:
            raise DataError(f"plan: layer {name!r} already has groups={spec.groups}")
        check_groups(f"plan: {name}", spec.in_channels, spec.out_channels, partition.groups)
        listed = (len(partition.in_order), len(partition.out_order))
        if listed != (spec.in_channels, spec.out_channels):
            raise DataError(
                f"plan: {name}: {listed[0]} input and {listed[1]} output channels listed; the "
                f"layer has {spec.in_channels} and {spec.out_channels}"
            )
    orders = space_orders(trace, partitions)
    net = copy.deepcopy(model)
    for index, order in orders.items():
        reorder(net, trace.spaces[index], order)
    edits, placed = {}, []
    for conv in trace.convs:
        if conv.name not in partitions:
            continue
        partition = partitions[conv.name]
        before = orders.get(conv.input_space, tuple(range(conv.spec.in_channels)))
        after = orders.get(conv.output_space, tuple(range(conv.spec.out_channels)))
        order_in = order_out = None
        channels_in, channels_out = before, after
        if not _same_groups(before, partition.in_order, partition.groups):
            channels_in = partition.in_order
            order_in = _positions(before, channels_in)
        if not _same_groups(after, partition.out_order, partition.groups):
            channels_out = partition.out_order
            order_out = _positions(channels_out, after)
        dense = model.get_submodule(conv.name)
        assert isinstance(dense, nn.modules.conv._ConvNd)
        # Without a batch norm to take it, the refit needs a bias for the mean of what is lost.
        bias = dense.bias is not None or conv.batch_norm is None
        edit = Edit(partition.groups, bias, order_in, order_out)
        edits[conv.name] = edit
        apply_edits(net, {conv.name: edit})
        split = order_in is not None or order_out is not None
        where = Placed(conv, conv.name + ".conv" * split, channels_in, channels_out)
        _cut(dense, net.get_submodule(where.module), where, partition.groups)
        placed.append(where)
    return Converted(net, edits, tuple(placed))


def space_orders(trace: Trace, partitions: Mapping[str, Partition]) -> dict[int, tuple[int, ...]]:
    """The order of every space that a planned layer claims, by index of the space."""
    convs = {conv.name: conv for conv in trace.convs}
    orders: dict[int, tuple[int, ...]] = {}
    for name, partition in partitions.items():
        sides = (
            (convs[name].input_space, partition.in_order),
            (convs[name].output_space, partition.out_order),
        )
        for space, order in sides:
            if trace.spaces[space].fixed is None:
                orders.setdefault(space, order)
    return orders


def apply_edits(model: nn.Module, edits: Mapping[str, Edit]) -> None:
    """Replace the edited layers in place; the new convolutions have fresh weights.

    Raises:
        DataError: a layer is missing or is not a convolution that can be cut so.
    """
    for name, edit in edits.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise DataError(f"the model has no layer {name!r}, which the plan converts") from error
        if not isinstance(old, nn.modules.conv._ConvNd) or old.transposed:
            raise DataError(
                f"layer {name!r} is a {type(old).__name__}; the plan expects a convolution"
            )
        check_groups(name, old.in_channels, old.out_channels, edit.groups)
        conv = _CONVS[old.weight.ndim](
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            stride=old.stride,  # type: ignore[arg-type]
            padding=old.padding,  # type: ignore[arg-type]
            dilation=old.dilation,  # type: ignore[arg-type]
            groups=edit.groups,
            bias=edit.bias,
            padding_mode=old.padding_mode,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        conv.train(old.training)
        new: nn.Module = conv
        if edit.order_in is not None or edit.order_out is not None:
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            if edit.order_in is not None:
                steps["order_in"] = ChannelPermutation(edit.order_in)
            steps["conv"] = conv
            if edit.order_out is not None:
                steps["order_out"] = ChannelPermutation(edit.order_out)
            new = nn.Sequential(steps).to(old.weight.device).train(old.training)
        model.set_submodule(name, new)


def _cut(dense: nn.modules.conv._ConvNd, conv: nn.Module, where: Placed, groups: int) -> None:
    """Copy the blocks of the dense weight that the groups keep."""
    assert isinstance(conv, nn.modules.conv._ConvNd)
    device = dense.weight.device
    rows = torch.tensor(where.channels_out, device=device)
    columns = torch.tensor(where.channels_in, device=device)
    blocks = zip(dense.weight[rows].chunk(groups, 0), columns.chunk(groups), strict=True)
    conv.weight.copy_(torch.cat([block[:, inputs] for block, inputs in blocks]))
    if conv.bias is not None:
        conv.bias.copy_(dense.bias[rows]) if dense.bias is not None else conv.bias.zero_()


def _same_groups(a: Sequence[int], b: Sequence[int], groups: int) -> bool:
    """Whether two orders put the same channels into every group, in any order inside."""
    width = len(a) // groups
    return all(set(a[i : i + width]) == set(b[i : i + width]) for i in range(0, len(a), width))


def _positions(have: Sequence[int], want: Sequence[int]) -> tuple[int, ...]:
    """Where each wanted channel stands in ``have``."""
    place = {channel: i for i, channel in enumerate(have)}
    return tuple(place[channel] for channel in want)
