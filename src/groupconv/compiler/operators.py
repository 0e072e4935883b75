"""PyTorch's operators as ours: for each a function that adds its nodes, or leaves it to PyTorch."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from groupconv.compiler import joins, spatial
from groupconv.compiler.arguments import each, fixed, named, shape_of
from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.elementwise import elementwise
from groupconv.compiler.graph import Convolution, Instruction, LayerNorm, Map, Softmax
from groupconv.compiler.views import Lazy, ViewOf
from groupconv.errors import GroupConvError
from groupconv.kernels.parts import parts
from groupconv.kernels.spec import ConvSpec

aten = torch.ops.aten

_VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.slice,
    aten.select, aten.squeeze, aten.unsqueeze, aten.split, aten.split_with_sizes, aten.chunk,
    aten.unbind, aten.narrow, aten.expand, aten.flatten, aten.movedim, aten.channel_shuffle,
    aten.native_channel_shuffle, aten.pixel_shuffle, aten.pixel_unshuffle,
}  # fmt: skip
# Views that change what PyTorch knows of a tensor; the graph has the new one in its place.
_IN_PLACE = {
    aten.squeeze_: aten.squeeze, aten.unsqueeze_: aten.unsqueeze, aten.t_: aten.t,
    aten.transpose_: aten.transpose,
}  # fmt: skip
# Made of the shape of a tensor alone.
_MADE = {
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones,
    aten.new_full, aten.new_empty,
}  # fmt: skip
_SAME = {aten.clone, aten.alias, aten.detach, aten.contiguous, aten.lift_fresh_copy, aten.dropout}


def lower(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator makes of ``args``: a :class:`Lazy`, a constant, or several of them.

    Args:
        args, kwargs: with tensors of the network as Lazy, constant ones as tensors.
    """
    target: Any = node.target
    like: Any = node.meta.get("val")
    if target is operator.getitem:
        return args[0][args[1]]
    _refuse_unknown_sizes(target, like)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    if not drawn and not any(isinstance(leaf, Lazy) for leaf in leaves):
        # What depends on no input is computed now, but for random numbers.
        return target(*args, **kwargs)
    packet = target.overloadpacket
    if packet in _IN_PLACE:
        packet = _IN_PLACE[packet]
        target = getattr(packet, target._overloadname)
    if packet in _MADE:
        return target(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
    if packet in _VIEWS or _takes_fixed_places(packet, args):
        return _view(target, args, kwargs, like)
    if packet in _SAME or (packet is aten._to_copy and like.dtype == args[0].dtype):
        return args[0]
    if packet is aten.copy and _alike(args[1], like):
        return args[1]
    # Nothing but what functionalization says of memory: the numbers are the same.
    if packet is aten.as_strided_ and tuple(like.shape) == args[0].shape:
        return args[0]
    reason = f"{target} is not native"
    try:
        _check(node, leaves)
        lowered = _LOWERINGS.get(packet, elementwise)
        found = lowered(builder, node, *args, **kwargs)
        if found is not None:
            return found
    except UnsupportedError as error:
        reason = f"{target}: {error}"
    if isinstance(like, tuple | list):
        return [
            None if part is None else builder.host(target, args, kwargs, part, reason, item)
            for item, part in enumerate(like)
        ]
    return builder.host(target, args, kwargs, like, reason)


def _takes_fixed_places(packet: Any, args: tuple[Any, ...]) -> bool:
    """Whether it picks numbers by indices that never change: as good as a view."""
    if packet not in (aten.index_select, aten.index):
        return False
    indices = args[2:] if packet is aten.index_select else [i for i in args[1] if i is not None]
    return all(
        isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) for index in indices
    )


def _refuse_unknown_sizes(target: Any, like: Any) -> None:
    for part in torch.utils._pytree.tree_leaves(like):
        if isinstance(part, Tensor) and not all(isinstance(n, int) for n in part.shape):
            raise GroupConvError(
                f"compile: the network can't be recorded: the size of what {target} returns "
                "depends on numbers"
            )


def _check(node: fx.Node, leaves: Sequence[Any]) -> None:
    """Raise UnsupportedError where no operator of ours takes such tensors."""
    like: Any = node.meta["val"]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Lazy | Tensor)]
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise UnsupportedError("it is on other numbers than float32")
    if any(isinstance(tensor, Lazy) and not tensor.shape for tensor in tensors):
        raise UnsupportedError("it is on a single number")
    if isinstance(like, tuple | list):
        if any(user.args[1] != 0 and user.users for user in node.users):
            raise UnsupportedError("its other results are used")
        like = like[0]
    joined = node.target.overloadpacket in _JOINS  # type: ignore[union-attr]
    if 0 in like.shape or (not joined and any(0 in tensor.shape for tensor in tensors)):
        raise UnsupportedError("it is on an empty tensor")


def _alike(held: Any, like: Tensor) -> bool:
    return tuple(held.shape) == tuple(like.shape) and held.dtype == like.dtype


def _view(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> Any:
    held, rest = args[0], tuple(args[1:])
    if target.overloadpacket in (aten.view, aten._unsafe_view):
        # The same, whatever the order in memory.
        target = aten.reshape.default
    if isinstance(like, tuple | list):
        return [held.then(ViewOf(target, rest, kwargs, i, part)) for i, part in enumerate(like)]
    return held.then(ViewOf(target, rest, kwargs, None, like))


def _convolution(
    builder: Builder, node: fx.Node, x: Lazy, weight: Any, bias: Any, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Lazy:  # fmt: skip
    name, whole = named(builder, node, weight), fixed(weight, "weight")
    dims = whole.ndim - 2
    if dims > 2:
        raise UnsupportedError(f"it has {dims} spatial axes")
    value = builder.value(x)
    if len(value.shape) != dims + 2:
        raise UnsupportedError("the input is not batched")
    if value.axis not in (1, dims + 1):
        value = builder.laid_out(value, 1)
    # Those of one axis are images of one row.
    row = (1,) * (2 - dims)
    none = (0,) * (2 - dims)
    whole = whole.reshape(*whole.shape[:2], *row, *whole.shape[2:])
    conv = ConvSpec(
        value.shape[0], value.shape[1], whole.shape[1] * groups if transposed else whole.shape[0],
        (*row, *value.shape[2:]), tuple(whole.shape[2:]), (*row, *each(stride, dims)),
        tuple((p, p) for p in (*none, *each(padding, dims))), (*row, *each(dilation, dims)),
        groups, transposed, (*none, *each(output_padding, dims)) if transposed else (),
    )  # fmt: skip
    if parts(conv).sparse:
        raise UnsupportedError("no tap of the kernel reaches some of the outputs")
    made = Convolution(
        conv, whole.contiguous(), None if bias is None else fixed(bias, "bias").contiguous()
    )
    return Lazy.of(builder.add(name, made, [value], shape_of(node)))


def _linear(builder: Builder, node: fx.Node, x: Lazy, weight: Tensor, bias: Any) -> Lazy:
    """``x @ weight.T + bias`` over the last axis; ``weight`` is (out, in)."""
    name, shape, out = named(builder, node, weight), shape_of(node), weight.shape[0]
    if bias is not None:
        if fixed(bias, "bias").shape not in ((out,), (1, out)):
            raise UnsupportedError("its bias is not one number for each channel")
        bias = bias.detach().reshape(-1).contiguous()
    base = x.base
    if len(base.shape) == 4 and base.axis == 1 and base.pixels > base.shape[0] and x.is_flat():
        # A kernel as large as the image.
        n, c, h, w = base.shape
        conv = ConvSpec(n, c, out, (h, w), (h, w), (1, 1), ((0, 0),) * 2, (1, 1), 1)
        made = Convolution(conv, weight.detach().reshape(out, c, h, w).contiguous(), bias)
        whole = Lazy.of(builder.add(name, made, [base], (n, out, 1, 1)))
        return whole.seen(aten.flatten.using_ints, 1)
    value = builder.value(x)
    value = builder.laid_out(value, len(value.shape) - 1)
    conv = ConvSpec(
        1, weight.shape[1], out, (1, value.pixels), (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 1
    )
    made = Convolution(conv, weight.detach().reshape(out, -1, 1, 1).contiguous(), bias)
    return Lazy.of(builder.add(name, made, [value], shape, len(shape) - 1))


def _addmm(
    builder: Builder, node: fx.Node, bias: Any, x: Any, weight: Any, *, beta: float = 1,
    alpha: float = 1,
) -> Lazy:  # fmt: skip
    if beta != 1 or alpha != 1 or not isinstance(x, Lazy):
        raise UnsupportedError("it is scaled, or the first matrix is constant")
    return _linear(builder, node, x, fixed(weight, "weight").t(), bias)


def _bmm(builder: Builder, node: fx.Node, x: Any, weight: Any) -> Lazy:
    """Of one matrix for all: what linear layers on tensors with gaps in memory are recorded as."""
    matrices = fixed(weight, "second matrix")
    if matrices.shape[0] > 1 and matrices.stride(0):
        raise UnsupportedError("its matrices differ")
    return _addmm(builder, node, None, x, matrices[0])


def _mm(builder: Builder, node: fx.Node, x: Any, weight: Any) -> Lazy:
    return _addmm(builder, node, None, x, weight)


def _linear_op(builder: Builder, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Lazy:
    if not isinstance(x, Lazy):
        raise UnsupportedError("the input is constant")
    fixed(weight, "weight")
    return _linear(builder, node, x, weight, bias)


def _batch_norm(
    builder: Builder, node: fx.Node, x: Lazy, weight: Any, bias: Any, mean: Any, variance: Any,
    *rest: Any,
) -> Any:  # fmt: skip
    training = rest[0] if len(rest) == 3 else False
    if training or mean is None or variance is None:
        raise UnsupportedError("it uses the statistics of the batch")
    eps = rest[-1]
    # In float64, rounded once.
    scale = (fixed(variance, "variance").double() + eps).rsqrt()
    if weight is not None:
        scale = scale * fixed(weight, "weight")
    shift = -fixed(mean, "mean").double() * scale
    if bias is not None:
        shift = shift + fixed(bias, "bias")
    value = builder.value(x)
    value = builder.laid_out(value, 1)
    program = (Instruction("mul", (0, 1)), Instruction("add", (-1, 2)))
    made = Map(program, (scale.float(), shift.float()))
    result = builder.add(named(builder, node, weight, mean), made, [value], value.shape)
    return [Lazy.of(result), None, None]


def _layer_norm(
    builder: Builder, node: fx.Node, x: Lazy, shape: Sequence[int], weight: Any, bias: Any,
    eps: float,
) -> Any:  # fmt: skip
    if len(shape) != 1:
        raise UnsupportedError(f"it is over {len(shape)} axes")
    made = LayerNorm(eps, *(None if t is None else fixed(t, "weight") for t in (weight, bias)))
    value = builder.value(x)
    value = builder.laid_out(value, len(value.shape) - 1)
    name = named(builder, node, weight)
    return [Lazy.of(builder.add(name, made, [value], value.shape, value.axis)), None, None]


def _softmax(builder: Builder, node: fx.Node, x: Lazy, dim: int, half: bool = False) -> Lazy:
    value = builder.value(x)
    value = builder.laid_out(value, dim % len(value.shape))
    return Lazy.of(builder.add("softmax", Softmax(), [value], value.shape, value.axis))


_JOINS: dict[Any, Callable[..., Any]] = {
    aten.cat: joins.cat,
    aten.stack: joins.stack,
    aten.slice_scatter: joins.slice_scatter,
    aten.select_scatter: joins.select_scatter,
}
_LOWERINGS: dict[Any, Callable[..., Any]] = {
    aten.convolution: _convolution,
    aten.addmm: _addmm,
    aten.mm: _mm,
    aten.bmm: _bmm,
    aten.linear: _linear_op,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.cudnn_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten._softmax: _softmax,
    aten.softmax: _softmax,
    aten.max_pool2d_with_indices: spatial.max_pool,
    aten.avg_pool2d: spatial.average_pool,
    aten._adaptive_avg_pool2d: spatial.adaptive("average"),
    aten.adaptive_max_pool2d: spatial.adaptive("max"),
    aten.mean: spatial.reduced("average"),
    aten.amax: spatial.reduced("max"),
    aten.sum: spatial.total,
    aten.linalg_vector_norm: spatial.norm,
    aten.upsample_nearest2d: spatial.upsample("nearest"),
    aten.upsample_bilinear2d: spatial.upsample("bilinear"),
    aten.constant_pad_nd: spatial.pad,
    **_JOINS,
}
