"""The convolutions and linear layers of a model and how their channels are tied together.

:mod:`~groupconv.optimize.capture` gives the graphs, :mod:`~groupconv.optimize.rules` says what each
operator does to the channels, and :mod:`~groupconv.optimize.ties` finds which of them may change
places (see :mod:`~groupconv.optimize.spaces`). What is not understood, and the network's inputs
and outputs, keep their order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.capture import Captured, Region, capture
from groupconv.optimize.rules import Rule, apply
from groupconv.optimize.spaces import Axis, Member, Space
from groupconv.optimize.ties import Cells
from groupconv.optimize.walk import Call, Walk, arguments, operator, shape


@dataclass(frozen=True)
class Addend:
    """A tensor by the module that it passes; the module runs once per forward pass.

    Args:
        module: qualified name.
        output: whether it is what the module writes, or else what it reads.
    """

    module: str
    output: bool


@dataclass(frozen=True)
class TracedConv:
    """A convolution module that runs once per forward pass, or a linear one of inputs ``(N, C)``.

    Args:
        name: qualified name of the module.
        spec: sizes, at the example's batch.
        batch_norm: name of the batch norm that alone reads the output, or None.
        then: the operators that follow, each the only reader of what is before it.
        inputs, outputs: what stands on its channel axes.
        added: what is added to its output, or to its batch norm's, and known before it runs; None
            if nothing is.
    """

    name: str
    spec: ConvSpec
    batch_norm: str | None
    then: tuple[str, ...]
    inputs: Axis
    outputs: Axis
    added: Addend | None = None


@dataclass(frozen=True)
class Trace:
    """Layers as they run, how channels are tied, and what was left out.

    Args:
        convs: in the order in which they run.
        spaces: of interchangeable channels.
        members: every axis of a parameter that channels run along.
        skipped: name to why a layer, or a part of the model, is left as it is.
        ends: modules whose outputs show what a change has done; the model itself is named "".
    """

    convs: tuple[TracedConv, ...]
    spaces: tuple[Space, ...]
    members: tuple[Member, ...]
    skipped: dict[str, str]
    ends: tuple[str, ...]


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Map the channels of ``model``, in evaluation mode.

    A model that torch.export and torch.fx refuse as a whole, or that finds objects in the images,
    is mapped submodule by submodule; its own forward must then not read a submodule's parameters.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Raises:
        GroupConvError: no part of the model can be exported.
    """
    captured = capture(model, inputs)
    walk = Walk(model)
    walk.skipped.update(captured.skipped)
    for region in captured.regions:
        follow(walk, region)
    return _assemble(walk, captured)


def follow(walk: Walk, region: Region, rule: Rule = apply) -> None:
    """Apply a rule to a region's nodes, in their order."""
    walk.enter(region)
    for node in region.program.graph.nodes:
        if node.op == "call_function":
            rule(walk, node)
        elif node.op == "output":
            walk.fix(node.all_input_nodes, f"output of {region.name or 'the network'}")


def members_of(
    walk: Walk, axes: Sequence[Cells]
) -> tuple[tuple[Space, ...], list[Axis], tuple[Member, ...]]:
    """The spaces after the walk, what stands on some axes, and on those of all parameters."""
    members = walk.members()
    spaces, runs = walk.ties.solve([*axes, *(cells for *_, cells in members)])
    owned = []
    for (name, axis, groups, _), on_axis in zip(members, runs[len(axes) :], strict=True):
        module, _, parameter = name.rpartition(".")
        owned.append(Member(module, parameter, axis, groups, on_axis))
    return spaces, runs[: len(axes)], tuple(owned)


def _assemble(walk: Walk, captured: Captured) -> Trace:
    repeats = {region.name: region.calls for region in captured.regions}
    calls = Counter[nn.Module | None]()
    for call in walk.calls:
        calls[walk.modules.get(call.name)] += max(
            n for name, n in repeats.items() if not name or f"{call.name}.".startswith(name + ".")
        )
    found: list[Call] = []
    for call in walk.calls:
        if isinstance(call.layer, str):
            walk.skipped[call.name] = call.layer
        elif (times := calls[walk.modules[call.name]]) > 1:
            walk.skipped[call.name] = f"called {times} times in one pass"
        else:
            found.append(call)
    axes = [cells for call in found for cells in (call.reads, call.writes)]
    spaces, runs, members = members_of(walk, axes)
    convs = tuple(
        TracedConv(
            call.name,
            call.layer,
            _following_norm(walk, call.node),
            _then(call.node),
            a,
            b,
            _added(walk, call, found),
        )
        for call, a, b in zip(found, runs[0::2], runs[1::2], strict=True)
        if isinstance(call.layer, ConvSpec)
    )
    return Trace(convs, spaces, members, walk.skipped, captured.ends)


def _following_norm(walk: Walk, node: fx.Node) -> str | None:
    """The batch norm whose mean a refit may move: nothing else must notice."""
    users = list(node.users)
    if len(users) != 1 or operator(users[0]) != "batch_norm":
        return None
    mean = users[0].args[3]
    if not isinstance(mean, fx.Node) or len(mean.users) != 1:
        return None
    owner, _, parameter = (walk.name(mean) or "").rpartition(".")
    return owner if parameter == "running_mean" else None


def _added(walk: Walk, call: Call, calls: Sequence[Call]) -> Addend | None:
    """What is added to the output of a layer, behind its batch norm if it has one."""
    end = call.node if _following_norm(walk, call.node) is None else next(iter(call.node.users))
    (reader, *others) = end.users or (end,)
    if others or operator(reader).rstrip("_") != "add" or arguments(reader)["alpha"] != 1:
        return None
    terms = [node for node in reader.all_input_nodes if node is not end]
    if len(terms) != 1 or shape(terms[0]) != shape(end):
        return None
    (term,) = terms
    # Seen too early, a tensor that is changed in place would be another.
    if any(operator(user).endswith("_") and user is not reader for user in term.users):
        return None
    for other in calls:
        if other.node is call.node or walk.before(other.node, call.node):
            norm = _following_norm(walk, other.node)
            if other.node.args[0] is term and walk.caller(term) != other.name:
                return Addend(other.name, output=False)
            if norm is None and other.node is term:
                return Addend(other.name, output=True)
            if norm is not None and term in other.node.users:
                return Addend(norm, output=True)
    return None


def _then(node: fx.Node) -> tuple[str, ...]:
    """Batch norm and activations after a convolution."""
    names: list[str] = []
    while len(node.users) == 1:
        (node,) = node.users
        tags = getattr(node.target, "tags", ())
        pointwise = torch.Tag.pointwise in tags and len(node.all_input_nodes) == 1
        if not pointwise and operator(node) not in (
            "batch_norm",
            "prelu",
            "hardswish_",
            "hardswish",
        ):
            break
        names.append(operator(node).rstrip("_"))
    return tuple(names)
