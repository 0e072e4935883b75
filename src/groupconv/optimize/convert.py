"""A choice of partitions applied to a model: an edited copy, its permutations absorbed.

Each space of channels (see :mod:`groupconv.optimize.spaces`) takes the order of the first planned
layer that touches it; every weight and batch norm on the space is reordered once, at no cost when
the network runs. Only a layer whose channels can't be brought where it wants them gets a
:class:`~groupconv.nn.ChannelPermutation` of its own.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from groupconv.errors import DataError
from groupconv.kernels.spec import check_groups
from groupconv.nn import ChannelPermutation
from groupconv.optimize.fold import reorder
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.trace import Trace, TracedConv


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

    @property
    def permutations(self) -> tuple[str, ...]:
        """Names of the modules that permute channels because nothing else could."""
        return tuple(
            f"{name}.{side}"
            for name, edit in self.edits.items()
            for side in ("order_in", "order_out")
            if getattr(edit, side) is not None
        )


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
    orders = Orders(trace.spaces)
    settled = {name: orders.place(convs[name], p) for name, p in partitions.items()}
    net = copy.deepcopy(model)
    reorder(net, trace.members, orders.orders)
    edits, placed = {}, []
    for conv in trace.convs:
        if conv.name not in partitions:
            continue
        partition, absorbed_in, absorbed_out = settled[conv.name]
        before, after = orders.channels(conv.inputs), orders.channels(conv.outputs)
        order_in = order_out = None
        channels_in, channels_out = before, after
        if not absorbed_in:
            channels_in = partition.in_order
            order_in = _positions(before, channels_in)
        if not absorbed_out:
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


def apply_edits(model: nn.Module, edits: Mapping[str, Edit]) -> None:
    """Cut the edited layers in place; the convolutions have no weights yet.

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
        _regroup(old, edit)
        if edit.order_in is not None or edit.order_out is not None:
            model.set_submodule(name, _between(old, edit))


def _regroup(conv: nn.modules.conv._ConvNd, edit: Edit) -> None:
    """Give a convolution its groups, in place: all else that a user set stays as it is."""
    weight, layout = conv.weight, torch.contiguous_format
    if weight.ndim == 4 and not weight.is_contiguous():
        layout = torch.channels_last
    size = (conv.out_channels, conv.in_channels // edit.groups, *conv.kernel_size)
    fresh = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    conv.groups = edit.groups
    conv.weight = nn.Parameter(fresh.contiguous(memory_format=layout), weight.requires_grad)
    if edit.bias and conv.bias is None:
        bias = torch.zeros(conv.out_channels, dtype=weight.dtype, device=weight.device)
        conv.bias = nn.Parameter(bias, weight.requires_grad)


def _between(conv: nn.Module, edit: Edit) -> nn.Sequential:
    """The convolution between its permutations; hooks see the channels as they did before."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    if edit.order_in is not None:
        steps["order_in"] = ChannelPermutation(edit.order_in)
    steps["conv"] = conv
    if edit.order_out is not None:
        steps["order_out"] = ChannelPermutation(edit.order_out)
    device = next(conv.parameters()).device
    new = nn.Sequential(steps).to(device).train(conv.training)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(new, hooks, getattr(conv, hooks))
        setattr(conv, hooks, OrderedDict())
    return new


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


def _positions(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[int, ...]:
    """Where each wanted channel stands in ``have``."""
    place = {channel: i for i, channel in enumerate(have)}
    return tuple(place[channel] for channel in want)
