"""Convolutions whose weights depend on the image, as dense ones with constant weights.

StyleGAN2 (Karras et al. 2020, https://arxiv.org/abs/1912.04958) scales the weights of a layer by a
style, and again to unit norm, for every image, and runs the images as the groups of one
convolution. No format holds that: the number of groups is not known, and weights must be constant.
But a factor for each input channel may as well scale the input, and one for each output channel
the output, so that what is left is one dense convolution of the batch; and the norm of scaled
weights is a product of squared styles and constants.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_COPIES = {_aten.contiguous.default, _aten.clone.default}
# Where the other arguments stand, after input, weight and bias, and their defaults.
_CONVOLUTIONS = {
    _aten.conv2d.default: ("stride", "padding", "dilation"),
    _aten.conv_transpose2d.input: ("stride", "padding", "output_padding", "dilation"),
}
_TRANSPOSED = _aten.conv_transpose2d.input


@dataclass(frozen=True)
class _Weights:
    """Weights of every image, as a product.

    Args:
        base: the same for all images, the axis of images being of size 1.
        inputs, outputs: one number for each image and input or output channel.
    """

    base: Tensor
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def replace_modulated(graph_module: fx.GraphModule) -> int:
    """Rewrite 2-d convolutions, transposed ones too, that have a group and weights for each image.

    Args:
        graph_module: of ``torch.export``, for one batch or any.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        if node.target in _CONVOLUTIONS and _replace_convolution(graph_module, node):
            found += 1
    if found:
        for node in list(graph_module.graph.nodes):
            if node.target is _aten.sum.dim_IntList:
                _replace_energy(graph_module, node)
        graph_module.graph.eliminate_dead_code()
        _forget_unused(graph_module)
        graph_module.recompile()
    return found


def _forget_unused(graph_module: fx.GraphModule) -> None:
    """Weights that no node reads any more would be written to the file."""
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    owned = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name in (name for name, _ in owned if name not in used):
        owner, _, attribute = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), attribute)


def _replace_convolution(graph_module: fx.GraphModule, conv: fx.Node) -> bool:
    """Whether the convolution was one of these."""
    transposed = conv.target is _TRANSPOSED
    merged, kernels = conv.args[:2]
    bias, *rest = conv.args[2:] or (None,)
    names = _CONVOLUTIONS[conv.target]  # type: ignore[index]
    # In the schema of a transposed convolution groups come before the dilation.
    order = (*names[:-1], "groups", names[-1]) if transposed else (*names, "groups")
    options = dict(zip(order, rest, strict=False))
    groups = options.pop("groups", 1)
    if bias is not None or not isinstance(merged, fx.Node) or merged.target not in _VIEWS:
        return False
    x = merged.args[0]
    assert isinstance(x, fx.Node)
    split = _before_merging(kernels, transposed)
    if split is None or len(_shape(x)) != 4 or not _same(_value(groups), _shape(x)[0]):
        return False
    product, axes = split
    weights = _factors(graph_module, product, axes)
    if weights is None or not (weights.inputs or weights.outputs):
        return False
    base = weights.base[0] if axes == (2, 1) else weights.base[0].transpose(0, 1)
    # (out, in, k, k) for a convolution, (in, out, k, k) for a transposed one.
    constant = base.transpose(0, 1) if transposed else base
    graph = graph_module.graph
    with graph.inserting_before(conv):
        name = f"{conv.name}_base"
        graph_module.register_buffer(name, constant.contiguous())
        arguments = (x, graph.get_attr(name), weights.inputs, weights.outputs, transposed, options)
        new = graph.call_function(modulated, arguments)
        flat = graph.call_function(_merged, (new,))
    # For the layers that follow.
    new.meta["val"] = conv.meta["val"].reshape(_shape(x)[0], len(base), *_shape(conv)[2:])
    flat.meta["val"] = conv.meta["val"]
    conv.replace_all_uses_with(flat)
    for user in list(flat.users):
        if user.target in _VIEWS and _equal(_shape(user), _shape(new)):
            user.replace_all_uses_with(new)
    return True


def modulated(
    x: Tensor,
    weight: Tensor,
    inputs: list[Tensor],
    outputs: list[Tensor],
    transposed: bool,
    options: dict[str, Any],
) -> Tensor:
    """The convolution of a batch whose input and output channels are scaled.

    Args:
        x: ``(N, C, H, W)``.
        weight: of a dense convolution.
        inputs, outputs: ``(N, C)``, with any further axes of size 1.
        transposed: whether the convolution is.
        options: its stride, padding and dilation.
    """
    for scale in inputs:
        x = x * _of_channels(scale)
    y = (F.conv_transpose2d if transposed else F.conv2d)(x, weight, None, **options)
    for scale in outputs:
        y = y * _of_channels(scale)
    return y


def _of_channels(scale: Tensor) -> Tensor:
    return scale.flatten(1).unsqueeze(2).unsqueeze(3)


def _merged(y: Tensor) -> Tensor:
    """The images as the groups of one."""
    return y.reshape(1, -1, *y.shape[2:])


def energy(inputs: list[Tensor], outputs: list[Tensor], squares: Tensor, keepdim: bool) -> Tensor:
    """Squares of scaled weights, summed for each image and output channel.

    Args:
        inputs, outputs: as for :func:`modulated`.
        squares: ``(C, O)``, of the constant weights, summed over the kernel.
        keepdim: whether there are axes for what was summed.
    """
    total = _product(inputs).square() @ squares if inputs else squares.sum(0, keepdim=True)
    if outputs:
        total = total * _product(outputs).square()
    return total[:, :, None, None, None] if keepdim else total


def _product(scales: list[Tensor]) -> Tensor:
    result = scales[0].flatten(1)
    for scale in scales[1:]:
        result = result * scale.flatten(1)
    return result


def _replace_energy(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A sum of squares of such weights, over input channels and kernel."""
    squared, dims, *rest = node.args
    assert isinstance(squared, fx.Node)
    source = _squared(squared)
    if source is None or len(_shape(source)) != 5:
        return
    if not isinstance(dims, list) or sorted(axis % 5 for axis in dims) != [2, 3, 4]:
        return
    weights = _factors(graph_module, source, (2, 1))
    if weights is None or not weights.inputs:
        return
    with graph_module.graph.inserting_before(node):
        name = f"{node.name}_squares"
        squares = weights.base[0].square().sum((2, 3)).T.contiguous()
        graph_module.register_buffer(name, squares)
        constant = graph_module.graph.get_attr(name)
        keepdim = bool(rest and rest[0])
        new = graph_module.graph.call_function(
            energy, (weights.inputs, weights.outputs, constant, keepdim)
        )
    node.replace_all_uses_with(new)


def _squared(node: fx.Node) -> fx.Node | None:
    """What a node is the square of."""
    if node.target is _aten.square.default:
        return _node(node.args[0])
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 2:
        return _node(node.args[0])
    if node.target is _aten.mul.Tensor and node.args[0] is node.args[1]:
        return _node(node.args[0])
    return None


def _before_merging(kernels: Any, transposed: bool) -> tuple[fx.Node, tuple[int, int]] | None:
    """The weights in five axes, and which of these are input and output channels.

    What leads from them to the four axes of the convolution are views, and a transposition of the
    channels in five axes.
    """
    turned = transposed
    node = _node(kernels)
    product, shape = None, None
    while node is not None and len(_shape(node)) in (4, 5):
        if len(_shape(node)) == 5:
            if shape is not None and not _equal(_shape(node), shape):
                return None
            product, shape = node, _shape(node)
        if node.target is _aten.transpose.int:
            if shape is None or sorted(axis % 5 for axis in node.args[1:]) != [1, 2]:  # type: ignore[operator]
                return None
            turned = not turned
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        elif node.target not in _VIEWS | _COPIES:
            break
        node = _node(node.args[0])
    if product is None:
        return None
    return product, ((1, 2) if turned else (2, 1))


def _factors(
    graph_module: fx.GraphModule, product: fx.Node, axes: tuple[int, int]
) -> _Weights | None:
    """The factors of weights in five axes, if all are of the known kinds.

    Args:
        axes: those of input and output channels.
    """
    base = torch.ones(())
    scales: dict[int, list[fx.Node]] = {axis: [] for axis in axes}
    waiting: list[Any] = [product]
    while waiting:
        factor = waiting.pop()
        constant = _constant(graph_module, factor)
        if constant is not None:
            base = base * constant
            continue
        others = [i for i, n in enumerate(_shape(factor)) if i and not _same(n, 1)]
        if len(_shape(factor)) == 5 and len(others) == 1 and others[0] in axes:
            scales[others[0]].append(_unviewed(factor))
        elif factor.target is _aten.mul.Tensor:
            waiting += factor.args
        else:
            return None
    sizes = _shape(product)[1:]
    base = base.reshape((1,) * (5 - base.ndim) + tuple(base.shape))
    if len(base) != 1 or not all(_same(n, m) for n, m in zip(base.shape[1:], sizes, strict=True)):
        return None
    return _Weights(base.detach(), scales[axes[0]], scales[axes[1]])


def _unviewed(scale: fx.Node) -> fx.Node:
    """A scale before it got axes of size 1: formats have no more than four."""
    while scale.target in _VIEWS and _same(_shape(source := scale.args[0])[0], _shape(scale)[0]):  # type: ignore[arg-type]
        scale = source  # type: ignore[assignment]
    return scale


def _constant(graph_module: fx.GraphModule, value: Any) -> Tensor | None:
    """What a value is if no input of the network has a part in it."""
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        return operator.attrgetter(str(value.target))(graph_module)
    if value.op != "call_function" or not isinstance(value.target, torch._ops.OpOverload):
        return None
    if value.kwargs or torch.Tag.nondeterministic_seeded in value.target.tags:
        return None
    arguments = []
    for argument in value.args:
        if isinstance(argument, fx.Node):
            argument = _constant(graph_module, argument)
            if argument is None:
                return None
        elif any(isinstance(a, fx.Node) for a in (argument if isinstance(argument, list) else ())):
            return None
        arguments.append(argument)
    with torch.no_grad():
        result = value.target(*arguments)
    return result if isinstance(result, Tensor) else None


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _value(argument: Any) -> Any:
    """The number that an argument is, or stands for."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _same(a: Any, b: Any) -> bool:
    # Imported here: it brings SymPy, which takes seconds, and every command reads this module.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def _equal(shape: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(shape) == len(other) and all(map(_same, shape, other))
