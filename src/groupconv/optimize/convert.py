"""A choice of structures applied to a model: an edited copy, its permutations absorbed.

Each space of channels (see :mod:`groupconv.optimize.spaces`) takes the order of the first planned
layer that touches it; every weight and batch norm on the space is reordered once, at no cost when
the network runs. Only a layer whose channels can't be brought where it wants them gets a
:class:`~groupconv.nn.ChannelPermutation` of its own.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from groupconv.errors import ArgumentError, DataError
from groupconv.nn import ChannelPermutation
from groupconv.optimize.fold import reorder
from groupconv.optimize.kept import (
    Kept,
    Shapes,
    cut,
    give_bias,
    kept_by_layers,
    stays,
    strands_kept,
)
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.prune import obstacles
from groupconv.optimize.structure import (
    Grouped,
    Layer,
    Structure,
    dense_weight,
    from_dict,
    to_dict,
)
from groupconv.optimize.trace import Trace, TracedConv
from groupconv.recovery import Feature

# What stands in place of a layer: a grouped convolution with the channels of its groups, the layer
# with fewer channels, or another structure, which takes the channels as they come.
Settled = Partition | Kept | Structure


@dataclass(frozen=True)
class Edit:
    """What stands in place of one convolution.

    Args:
        structure: of what stands there.
        bias: whether it has a bias.
        order_in, order_out: explicit permutation before and after it, or None.
    """

    structure: Structure
    bias: bool
    order_in: tuple[int, ...] | None = None
    order_out: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        orders = {"order_in": self.order_in, "order_out": self.order_out}
        return {**to_dict(self.structure), "bias": self.bias, **orders}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Edit":
        orders = (values.get("order_in"), values.get("order_out"))
        return cls(
            from_dict(values),
            bool(values["bias"]),
            *(None if order is None else tuple(int(i) for i in order) for order in orders),
        )


@dataclass(frozen=True)
class Placed:
    """A convolution of the original network in the converted one.

    Args:
        conv: the traced layer of the original network.
        module: name of the new convolution, ``name`` or ``name.conv``; of a pair the first.
        channels_in, channels_out: original channel at each position of its input and output; of
            a pair, the output of the second.
        channels_after: the same for what follows, an explicit permutation included.
    """

    conv: TracedConv
    module: str
    channels_in: tuple[int, ...]
    channels_out: tuple[int, ...]
    channels_after: tuple[int, ...]


@dataclass(frozen=True)
class Converted:
    """A converted copy of a network.

    Args:
        model: the copy.
        edits: layer name to what stands there now.
        shapes: of modules that have fewer channels now.
        convs: every traced convolution, changed or not, in the order in which they run.
    """

    model: nn.Module
    edits: dict[str, Edit]
    shapes: Shapes
    convs: tuple[Placed, ...]

    @property
    def placed(self) -> tuple[Placed, ...]:
        """Those that were changed."""
        return tuple(where for where in self.convs if where.conv.name in self.edits)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What the changed layers write, or the batch norms after them, in both networks."""
        found = []
        for where in self.placed:
            module = where.conv.batch_norm or where.conv.name
            found.append(Feature(module, module, where.channels_after))
        return tuple(found)

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
def convert(model: nn.Module, trace: Trace, layers: Mapping[str, Settled]) -> Converted:
    """Put structures in place of layers, not refitted yet.

    Grouped convolutions and layers with fewer channels hold the weights of the original that they
    keep; others hold zeros.

    Args:
        model: left as it was.
        trace: of the model.
        layers: layer name to what stands there; earlier entries claim the order of a space first.

    Raises:
        DataError: names that are not traced convolutions, or depthwise ones, or structures that
            do not divide their channels.
    """
    check(model, trace, layers)
    convs = {conv.name: conv for conv in trace.convs}
    orders = Orders(trace.spaces)
    places = {
        name: orders.place(convs[name], partition)
        for name, partition in layers.items()
        if isinstance(partition, Partition)
    }
    strands = _strands(trace, layers)
    net = copy.deepcopy(model)
    reorder(net, trace.members, orders.orders)
    shapes = cut(net, trace, strands)
    edits, placed = {}, []
    for conv in trace.convs:
        before, after = (
            tuple(orders.channels(axis)[i] for i in stays(axis, strands))
            for axis in (conv.inputs, conv.outputs)
        )
        here = Placed(conv, conv.name, before, after, after)
        if conv.name in layers:
            here, edits[conv.name] = _put(
                model, net, here, layers[conv.name], places.get(conv.name)
            )
        placed.append(here)
    others = {name: shape for name, shape in shapes.items() if name not in edits}
    return Converted(net, edits, others, tuple(placed))


def _put(
    model: nn.Module,
    net: nn.Module,
    here: Placed,
    settled: Settled,
    place: tuple[Partition, bool, bool] | None,
) -> tuple[Placed, Edit]:
    """Put one structure in place.

    Args:
        model, net: the original network, and the copy in the new orders.
        here: the layer as the copy has it.
        settled: what is to stand there.
        place: of a partition, see :meth:`Orders.place`.
    """
    conv, layer = here.conv, model.get_submodule(here.conv.name)
    assert isinstance(layer, Layer)
    # Without a batch norm to take it, the refit needs a bias for the mean of what is lost.
    bias = layer.bias is not None or conv.batch_norm is None
    if isinstance(settled, Kept):
        smaller = net.get_submodule(conv.name)
        assert isinstance(smaller, Layer)
        if bias:
            give_bias(smaller)
        return here, Edit(settled.structure, bias)
    order_in = order_out = None
    channels_in, channels_out = here.channels_in, here.channels_out
    if place is not None:
        partition, absorbed_in, absorbed_out = place
        if not absorbed_in:
            channels_in = partition.in_order
            order_in = _positions(here.channels_in, channels_in)
        if not absorbed_out:
            channels_out = partition.out_order
            order_out = _positions(channels_out, here.channels_out)
    edit = Edit(structure_of(settled), bias, order_in, order_out)
    apply_edits(net, {conv.name: edit})
    split = isinstance(net.get_submodule(conv.name), nn.Sequential)
    where = Placed(
        conv, conv.name + ".conv" * split, channels_in, channels_out, here.channels_after
    )
    if isinstance(edit.structure, Grouped):
        _cut(layer, net.get_submodule(where.module), where, edit.structure.groups)
    return where, edit


def structure_of(settled: Settled) -> Structure:
    """What stands in place of a layer, whatever the channels of its groups."""
    if isinstance(settled, Kept):
        return settled.structure
    return Grouped(settled.groups) if isinstance(settled, Partition) else settled


def without(trace: Trace, layers: Mapping[str, Settled], name: str) -> dict[str, Settled]:
    """The layers but one, and if it has fewer channels those that share them as they were, too."""
    rest = {other: settled for other, settled in layers.items() if other != name}
    if isinstance(layers[name], Kept):
        convs = {conv.name: conv for conv in trace.convs}
        strands = _strands(trace, layers)
        mine = {*convs[name].inputs.spaces, *convs[name].outputs.spaces}
        left = kept_by_layers(trace, {s: some for s, some in strands.items() if s not in mine})
        rest = {n: s for n, s in rest.items() if not isinstance(s, Kept)} | left
    return {other: rest[other] for other in layers if other in rest}


def _strands(trace: Trace, layers: Mapping[str, Settled]) -> dict[int, tuple[int, ...]]:
    return strands_kept(trace, {n: s for n, s in layers.items() if isinstance(s, Kept)})


def check(model: nn.Module, trace: Trace, layers: Mapping[str, Settled]) -> None:
    """Raise DataError naming every layer that can't be converted as asked, and why."""
    wrong = []
    convs = {conv.name: conv for conv in trace.convs}
    for name, settled in layers.items():
        if name not in convs:
            reason = trace.skipped.get(name, "no such layer")
            wrong.append(f"layer {name!r} can't be converted: {reason}")
            continue
        spec = convs[name].spec
        if 1 < spec.groups == spec.in_channels and not isinstance(settled, Kept):
            wrong.append(f"layer {name!r} is depthwise already, groups={spec.groups}")
            continue
        try:
            layer = model.get_submodule(name)
            assert isinstance(layer, Layer)
            structure_of(settled).check(name, layer)
        except ArgumentError as error:
            wrong.append(str(error))
            continue
        if isinstance(settled, Partition):
            listed = (len(settled.in_order), len(settled.out_order))
            if listed != (spec.in_channels, spec.out_channels):
                wrong.append(
                    f"{name}: {listed[0]} input and {listed[1]} output channels listed; the "
                    f"layer has {spec.in_channels} and {spec.out_channels}"
                )
        if isinstance(settled, Kept):
            wrong += [
                f"{name}: kept {side} must be some of 0 to {count - 1}, ascending"
                for side, kept, count in (
                    ("inputs", settled.inputs, spec.in_channels),
                    ("outputs", settled.outputs, spec.out_channels),
                )
                if list(kept) != sorted(set(kept) & set(range(count)))
            ]
    if not wrong:
        try:
            strands = _strands(trace, layers)
            reasons = obstacles(model, trace) if strands else {}
            wrong += [
                f"channels that layers share can't be taken out: {reasons[space]}"
                for space in strands
                if space in reasons
            ]
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError("plan: " + "; ".join(wrong))


def apply_edits(model: nn.Module, edits: Mapping[str, Edit]) -> None:
    """Put the edited structures in place; their convolutions have no weights yet.

    Raises:
        DataError: a layer is missing or is not a convolution that can be replaced so.
    """
    for name, edit in edits.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise DataError(f"the model has no layer {name!r}, which the plan converts") from error
        if not isinstance(old, Layer) or getattr(old, "transposed", False):
            raise DataError(
                f"layer {name!r} is a {type(old).__name__}; the plan expects a convolution or a "
                "linear layer"
            )
        edit.structure.check(name, old)
        hooks = {key: getattr(old, key) for key in ("_forward_hooks", "_forward_pre_hooks")}
        steps = edit.structure.build(old, edit.bias)
        if edit.order_in is not None:
            steps["order_in"] = ChannelPermutation(edit.order_in)
            steps.move_to_end("order_in", last=False)
        if edit.order_out is not None:
            steps["order_out"] = ChannelPermutation(edit.order_out)
        if len(steps) == 1:
            continue
        device = next(old.parameters()).device
        new = nn.Sequential(steps).to(device).train(old.training)
        # Hooks see the channels as they did before.
        for key, registered in hooks.items():
            setattr(old, key, OrderedDict())
            setattr(new, key, registered)
        model.set_submodule(name, new)


def _cut(layer: Layer, conv: nn.Module, where: Placed, groups: int) -> None:
    """Copy the blocks of the layer's weight that the groups keep."""
    assert isinstance(conv, Layer)
    dense = dense_weight(layer)
    device = dense.device
    rows = torch.tensor(where.channels_out, device=device)
    columns = torch.tensor(where.channels_in, device=device)
    blocks = zip(dense[rows].chunk(groups, 0), columns.chunk(groups), strict=True)
    conv.weight.copy_(torch.cat([block[:, inputs] for block, inputs in blocks]))
    if conv.bias is not None:
        conv.bias.copy_(layer.bias[rows]) if layer.bias is not None else conv.bias.zero_()


def _positions(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[int, ...]:
    """Where each wanted channel stands in ``have``."""
    place = {channel: i for i, channel in enumerate(have)}
    return tuple(place[channel] for channel in want)
