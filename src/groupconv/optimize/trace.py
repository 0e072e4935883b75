"""The convolutions of a model and how their channels are tied together.

``torch.export`` gives the graph. Batch norm, activations, pooling and depthwise layers keep the
space of channels of their input (see :mod:`groupconv.optimize.spaces`); an addition joins two. A
space that touches something not understood here, or the network's inputs or outputs, is fixed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupconv.errors import GroupConvError
from groupconv.kernels.spec import ConvSpec, same_padding
from groupconv.nn import ChannelPermutation
from groupconv.optimize.spaces import Member, Space, Spaces

_CONVS = ("conv1d", "conv2d", "conv3d")
# Operators that act on each channel alike, so the order of channels passes through them.
# fmt: off
_CHANNELWISE = frozenset((
    "relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_", "silu", "silu_", "sigmoid",
    "sigmoid_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "gelu", "leaky_relu",
    "leaky_relu_", "elu", "elu_", "tanh", "mish", "mish_", "softplus", "dropout", "dropout_",
    "feature_dropout", "clone", "contiguous", "detach", "identity",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d",
))
_TYING = frozenset(("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"))
# fmt: on


@dataclass(frozen=True)
class TracedConv:
    """A convolution module that runs once per forward pass.

    Args:
        name: qualified name of the module.
        spec: sizes, at the example's batch.
        batch_norm: name of the batch norm that alone reads the output, or None.
        input_space, output_space: indices into :attr:`Trace.spaces`.
    """

    name: str
    spec: ConvSpec
    batch_norm: str | None
    input_space: int
    output_space: int


@dataclass(frozen=True)
class TracedPermutation:
    """A module that only reorders channels: output channel ``i`` is input channel ``order[i]``.

    Args:
        name: qualified name of the module.
        order: of its channels.
        input_space, output_space: indices into :attr:`Trace.spaces`.
        free_in, free_out: whether that space would be free if the module weren't there.
    """

    name: str
    order: tuple[int, ...]
    input_space: int
    output_space: int
    free_in: bool
    free_out: bool


@dataclass(frozen=True)
class Trace:
    """Convolutions and permutations as they run, the spaces between them, and what was left out."""

    convs: tuple[TracedConv, ...]
    permutations: tuple[TracedPermutation, ...]
    spaces: tuple[Space, ...]
    skipped: dict[str, str]


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Map the channels of ``model``, in evaluation mode.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Raises:
        GroupConvError: the model can't be exported by torch.export.
    """
    with evaluation_mode(model):
        try:
            program = torch.export.export(model, inputs, strict=False)
        except Exception as error:
            raise GroupConvError(
                f"{type(model).__name__} can't be traced by torch.export: {error}"
            ) from error
    return _Tracer(model, program).run()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Tracer:
    """Walks the graph once; ``space_of`` holds the space of each value's channel axis."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.graph = program.graph
        signature = program.graph_signature
        self.parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.modules = dict(model.named_modules())
        self.spaces = Spaces()
        self.space_of: dict[fx.Node, int] = {}
        self.found: dict[str, tuple[ConvSpec, str | None, int, int]] = {}
        self.moved: dict[str, tuple[tuple[int, ...], int, int]] = {}
        self.skipped: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def run(self) -> Trace:
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name not in self.parameters:
                self._open(node, "input of the network")
            elif node.op == "output":
                self._fix(node.all_input_nodes, "output of the network")
            elif node.op == "call_function":
                self._visit(node)
        for name, calls in self.calls.items():
            if calls > 1 and name in self.found:
                self._skip(name, f"called {calls} times in one pass")
        self.spaces.fix_shared()
        number, spaces = self.spaces.numbered()
        convs = tuple(
            TracedConv(name, spec, bn, number[a], number[b])
            for name, (spec, bn, a, b) in self.found.items()
        )
        # A space between two permutations can't be reordered without changing the other one too.
        touched = Counter(number[side] for _, *sides in self.moved.values() for side in sides)

        def free(name: str, space: int) -> bool:
            alone = touched[space] == 1 and self.calls[name] == 1
            return alone and spaces[space].fixed is None

        permutations = tuple(
            TracedPermutation(
                name, order, number[a], number[b], free(name, number[a]), free(name, number[b])
            )
            for name, (order, a, b) in self.moved.items()
        )
        for moved in permutations:
            for space in (spaces[moved.input_space], spaces[moved.output_space]):
                space.fixed = space.fixed or f"permuted by {moved.name}"
        return Trace(convs, permutations, spaces, self.skipped)

    def _visit(self, node: fx.Node) -> None:
        op = _operator(node)
        if op in _CONVS:
            self._convolution(node, len(_CONVS) - _CONVS[::-1].index(op))
        elif op == "batch_norm":
            self._batch_norm(node)
        elif op == "linear":
            self._linear(node)
        elif op in _CHANNELWISE or (op == "mean" and _over_spatial_axes(node)):
            self._keep_space(node)
        elif op in _TYING:
            self._tie(node)
        elif self._permutation(node, op):
            pass
        elif op in ("flatten", "view", "reshape") and _drops_unit_axes(node):
            self._keep_space(node)
        else:
            self._fix(node.all_input_nodes, f"read by {op}")
            self._open(node, f"written by {op}")

    def _convolution(self, node: fx.Node, dims: int) -> None:
        x, weight = node.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        if x not in self.space_of:
            self._open(x, "a parameter")
        name = self._module_of(weight, "weight")
        module = self.modules.get(name) if name is not None else None
        if name is None or not isinstance(module, nn.modules.conv._ConvNd):
            self.skipped[node.name] = "weight is not the parameter of a convolution module"
            self._fix([x], f"read by {node.name}")
            self._open(node, f"written by {node.name}")
            return
        self.calls[name] += 1
        size = tuple(x.meta["val"].shape)
        readers = [user.name for user in weight.users if _caller(user) != name]
        if readers or len(size) != dims + 2 or module.padding_mode != "zeros":
            self.skipped[name] = f"input of shape {size}, padding_mode={module.padding_mode!r}"
            if readers:
                self.skipped[name] = f"its weight is read by {readers[0]} too, outside the module"
            self._fix([x], f"read by {name}")
            self._open(node, f"written by {name}")
            return
        spec = _spec(module, size)
        depthwise = spec.groups == spec.in_channels == spec.out_channels > 1
        if spec.groups == 1:
            self._member(x, name, "weight", 1)
            self._open(node, None)
        elif depthwise:
            self._keep_space(node)
        else:
            self._fix([x], f"read by {name}, already in {spec.groups} groups")
            self._open(node, f"written by {name}, already in {spec.groups} groups")
        if spec.groups == 1 or depthwise:
            self._member(node, name, "weight", 0)
            if module.bias is not None:
                self._member(node, name, "bias", 0)
        self.found[name] = (spec, self._following_norm(node), self.space_of[x], self.space_of[node])

    def _permutation(self, node: fx.Node, op: str) -> bool:
        """Whether the node is all that a module does which only reorders channels."""
        source = node.args[0] if node.args else None
        name = _caller(node)
        if op not in ("channel_shuffle", "index_select") or name is None:
            return False
        if not isinstance(source, fx.Node) or source not in self.space_of:
            return False
        module = self.modules.get(name)
        channels = int(node.meta["val"].shape[1])
        if isinstance(module, nn.ChannelShuffle):
            order = torch.arange(channels).view(module.groups, -1).T.flatten()
        elif isinstance(module, ChannelPermutation):
            order = module.order
        else:
            return False
        self.calls[name] += 1
        self._open(node, None)
        self.moved[name] = (tuple(order.tolist()), self.space_of[source], self.space_of[node])
        return True

    def _following_norm(self, node: fx.Node) -> str | None:
        users = list(node.users)
        if len(users) != 1 or _operator(users[0]) != "batch_norm":
            return None
        mean = users[0].args[3]
        # The refit may move the mean, which no other layer must notice.
        alone = isinstance(mean, fx.Node) and len(mean.users) == 1
        return self._module_of(mean, "running_mean") if alone else None

    def _batch_norm(self, node: fx.Node) -> None:
        self._keep_space(node)
        name = self._module_of(node.args[3], "running_mean")
        if name is None or self._module_of(node.args[1], "weight") not in (name, None):
            self._fix([node], "batch norm without a module")
            return
        for parameter in ("weight", "bias", "running_mean", "running_var"):
            if getattr(self.modules[name], parameter, None) is not None:
                self._member(node, name, parameter, 0)

    def _linear(self, node: fx.Node) -> None:
        x, weight = node.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        name = self._module_of(weight, "weight")
        if name is not None and x.meta["val"].ndim == 2:
            self._member(x, name, "weight", 1)
        else:
            self._fix([x], f"read by {node.name}")
        self._open(node, f"written by {node.name}")

    def _tie(self, node: fx.Node) -> None:
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        shapes = [tuple(t.meta["val"].shape) for t in tensors]
        known = all(t in self.space_of for t in tensors)
        if not known or len({(len(s), s[1]) for s in shapes if len(s) > 1}) != 1:
            self._fix(tensors, f"read by {node.name}")
            self._open(node, f"written by {node.name}")
            return
        self._keep_space(node)
        for other in tensors[1:]:
            self.spaces.join(self.space_of[tensors[0]], self.space_of[other])

    def _keep_space(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source not in self.space_of:
            self._open(node, f"written by {node.name}")
            return
        shape = node.meta["val"].shape
        if len(shape) < 2 or shape[1] != self.spaces[self.space_of[source]].channels:
            # Without a batch axis: what stands second is not the channels.
            self._fix([source], f"read by {node.name}")
            self._open(node, f"written by {node.name}")
            return
        self.space_of[node] = self.space_of[source]

    def _open(self, node: fx.Node, fixed: str | None) -> None:
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        self.space_of[node] = self.spaces.open(int(shape[1]) if len(shape) > 1 else 0, fixed)

    def _fix(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for node in nodes:
            if node in self.space_of:
                self.spaces.fix(self.space_of[node], reason)

    def _member(self, node: fx.Node, module: str, parameter: str, axis: int) -> None:
        if node not in self.space_of:
            self._open(node, f"read by {module}")
        self.spaces.add(self.space_of[node], Member(module, parameter, axis))

    def _skip(self, name: str, reason: str) -> None:
        _, _, a, b = self.found.pop(name)
        self.skipped[name] = reason
        for space in (a, b):
            self.spaces.fix(space, f"{name} is {reason}")

    def _module_of(self, node: Any, parameter: str) -> str | None:
        """The module that holds a tensor under the usual name."""
        if not isinstance(node, fx.Node) or node.name not in self.parameters:
            return None
        owner, _, name = self.parameters[node.name].rpartition(".")
        return owner if name == parameter else None


def _caller(node: fx.Node) -> str | None:
    """The innermost module in whose forward pass the node was made."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else None


def _operator(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(node.target) if packet is None else packet.__name__


def _spec(module: nn.modules.conv._ConvNd, size: tuple[int, ...]) -> ConvSpec:
    if isinstance(module.padding, str):
        same = module.padding == "same"
        padding = (
            tuple(same_padding(module.kernel_size, module.dilation))
            if same
            else ((0, 0),) * (len(size) - 2)
        )
    else:
        padding = tuple((p, p) for p in module.padding)
    return ConvSpec(
        batch=int(size[0]),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        input_size=tuple(int(n) for n in size[2:]),
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding,
        dilation=tuple(module.dilation),
        groups=module.groups,
    )


def _over_spatial_axes(node: fx.Node) -> bool:
    source, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
    assert isinstance(source, fx.Node)
    ndim = source.meta["val"].ndim
    return isinstance(axes, (list, tuple)) and all(int(a) % ndim >= 2 for a in axes)


def _drops_unit_axes(node: fx.Node) -> bool:
    """Whether ``(N, C, 1, 1)`` becomes ``(N, C)``."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) > 2 and tuple(after) == tuple(before[:2]) and all(n == 1 for n in before[2:])
