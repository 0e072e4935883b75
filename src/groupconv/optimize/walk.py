"""The state of a walk over a model's graphs: values, parameters, and what was left out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.capture import Region
from groupconv.optimize.ties import Cells, Hashes, Ties, mix
from groupconv.optimize.values import Channels, Scattered, Value, gather, spread


@dataclass(frozen=True)
class Call:
    """One run of a convolution module.

    Args:
        node: the call.
        name: qualified name of the module.
        layer: sizes of the layer, or why another layer can't take its place.
        reads, writes: cells of the input and output channels.
    """

    node: fx.Node
    name: str
    layer: ConvSpec | str
    reads: Cells
    writes: Cells


class Walk:
    """What the rules of :mod:`groupconv.optimize.rules` read and write, node by node."""

    def __init__(self, model: nn.Module) -> None:
        self.ties = Ties()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.skipped: dict[str, str] = {}
        self.calls: list[Call] = []
        self._values: dict[fx.Node, Value | list[Value]] = {}
        self._written: dict[fx.Node, str] = {}
        self._tensors: dict[fx.Node, Tensor] = {}
        self._names: dict[int, str] = {}
        self._axes: dict[tuple[int, int, int], Cells] = {}
        self._frozen: dict[int, str] = {}
        self._prefix = ""
        self._numbers: dict[fx.Node, int] = {}

    def enter(self, region: Region) -> None:
        """Prepare for the nodes of a region."""
        self._prefix = prefix = region.name + "." if region.name else ""
        signature, program = region.program.graph_signature, region.program
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            self._numbers[node] = len(self._numbers)
            if node.op != "placeholder":
                continue
            if node.name in held:
                name = prefix + held[node.name]
                owner, _, parameter = name.rpartition(".")
                module = self.modules[owner]
                self._tensors[node] = tensor = getattr(module, parameter)
                # What a hook computes anew on every pass can't be reordered.
                if parameter in module._parameters or parameter in module._buffers:
                    self._names.setdefault(id(tensor), name)
            elif node.name in constants:
                self._tensors[node] = program.constants[constants[node.name]]
            else:
                self._written[node] = f"input of {region.name or 'the network'}"

    def tensor(self, node: Any) -> Tensor | None:
        """The parameter, buffer or constant that a node stands for."""
        return self._tensors.get(node) if isinstance(node, fx.Node) else None

    def name(self, node: Any) -> str | None:
        """The qualified name of the parameter or buffer that a node stands for."""
        tensor = self.tensor(node)
        return None if tensor is None else self._names.get(id(tensor))

    def value(self, node: fx.Node) -> Value:
        """What is known of the channels of a node's tensor."""
        tensor = self.tensor(node)
        if tensor is not None:
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
            return Channels(long[0], self.parameter(node, long[0])) if len(long) == 1 else None
        value = self._values.get(node)
        assert not isinstance(value, list)
        return value

    def values(self, node: fx.Node) -> list[Value]:
        """The same for a node that makes a list of tensors."""
        found = self._values.get(node)
        return found if isinstance(found, list) else []

    def put(self, node: fx.Node, value: Value | list[Value]) -> None:
        self._values[node] = value

    def read(self, node: fx.Node, axis: int) -> Cells:
        """The cells along an axis of a node's tensor."""
        if self.tensor(node) is not None:
            return self.parameter(node, axis)
        value, size = self.value(node), shape(node)
        axis %= len(size)
        if value is None:
            cells = self.ties.open(size[axis])
            self.ties.fix(cells, self._written.get(node, f"written by {self.label(node)}"))
            value = Channels(axis, cells)
            self.put(node, value)
        if isinstance(value, Channels) and value.axis == axis:
            return value.cells
        return gather(self.ties, spread(value, size), axis)

    def write(self, node: fx.Node, axis: int, sources: Cells) -> None:
        """The node's channels are made from others, one from one, all alike."""
        cells = self.ties.open(len(sources))
        self.ties.tie(cells, sources, mix(0))
        self.put(node, Channels(axis, cells))

    def parameter(self, node: fx.Node, axis: int, groups: int = 1) -> Cells:
        """The cells of an axis of a parameter; see
        :class:`~groupconv.optimize.spaces.Member` for the groups."""
        tensor = self._tensors[node]
        key = (id(tensor), axis % tensor.ndim, groups)
        if key not in self._axes:
            self._axes[key] = self.ties.open(groups * tensor.shape[axis])
            if id(tensor) not in self._names:
                self.ties.fix(self._axes[key], "a constant of the forward pass")
            if any(k[:2] == key[:2] and k != key for k in self._axes):
                self.freeze(node, "used with different groups")
        return self._axes[key]

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Leave the order of a parameter, all axes of it, as it is."""
        self._frozen.setdefault(id(self._tensors[node]), reason)

    def forget(self, node: fx.Node) -> None:
        """The node's operator isn't understood: nothing that it reads may move."""
        self.fix(node.all_input_nodes, f"read by {self.label(node)}")
        self.put(node, None)

    def fix(self, nodes: Iterable[fx.Node], reason: str) -> None:
        """Forbid to move any channel of these nodes."""
        for node in nodes:
            if self.tensor(node) is not None:
                self.freeze(node, reason)
                continue
            for value in self.values(node) or [self.value(node)]:
                if isinstance(value, Channels):
                    self.ties.fix(value.cells, reason)
                elif isinstance(value, Scattered):
                    for layer in value.layers:
                        cells = layer.cells.unique().numpy()
                        self.ties.fix(cells[cells >= 0], reason)

    def before(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a node runs before another."""
        return self._numbers[node] < self._numbers[other]

    def call(self, node: fx.Node) -> Hashes:
        """A number of this call, to tell several calls of one weight apart."""
        return mix(self._numbers[node], 4)

    def caller(self, node: fx.Node) -> str:
        """The innermost module in whose forward pass the node was made."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = stack[-1][0].partition("@")[0] if stack else ""
        return (self._prefix + name).rstrip(".")

    def label(self, node: fx.Node) -> str:
        """The operator and the module that it runs in, for people."""
        name = self.caller(node)
        return f"{operator(node)} in {name}" if name else operator(node)

    def members(self) -> list[tuple[str, int, int, Cells]]:
        """Name, axis, groups and cells of every axis of a parameter; to be asked last."""
        found = []
        for (tensor, axis, groups), cells in self._axes.items():
            if tensor in self._frozen:
                self.ties.fix(cells, self._frozen[tensor])
            if tensor in self._names:
                found.append((self._names[tensor], axis, groups, cells))
        return found


def shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def operator(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    given |= {a.name: value for a, value in zip(declared, node.args, strict=False)}
    return given | dict(node.kwargs)


def flat(values: Any) -> list[Any]:
    """The items of nested lists."""
    if not isinstance(values, (list, tuple)):
        return [values]
    return [item for value in values for item in flat(value)]
