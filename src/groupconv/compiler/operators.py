"""PyTorch's operators as ours: for each a function that adds its nodes, or leaves it to PyTorch."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.elementwise import elementwise
from groupconv.compiler.graph import (
    AdaptivePool,
    Concat,
    Convolution,
    Instruction,
    LayerNorm,
    Map,
    Pad,
    Pool,
    Sides,
    Softmax,
    Upsample,
    Value,
)
from groupconv.compiler.views import Lazy, ViewOf
from groupconv.kernels.parts import parts
from groupconv.kernels.spec import ConvSpec

aten = torch.ops.aten

_VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.slice,
    aten.select, aten.squeeze, aten.unsqueeze, aten.split, aten.split_with_sizes, aten.chunk,
    aten.unbind, aten.narrow, aten.expand, aten.flatten, aten.movedim, aten.channel_shuffle,
    aten.native_channel_shuffle,
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
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Lazy) for leaf in leaves):
        # What depends on no input is computed now.
        return target(*args, **kwargs)
    packet = target.overloadpacket
    if packet in _VIEWS:
        return _view(target, args, kwargs, like)
    if packet in _SAME or (packet is aten._to_copy and like.dtype == args[0].dtype):
        return args[0]
    # Nothing but what functionalization says of memory: the numbers are the same.
    if packet is aten.as_strided_ and tuple(like.shape) == args[0].shape:
        return args[0]
    reason = f"{target} is not native"
    if all(leaf.dtype == torch.float32 for leaf in leaves if isinstance(leaf, Lazy | Tensor)):
        try:
            lowered = _LOWERINGS.get(packet, elementwise)
            found = lowered(builder, node, *args, **kwargs)
            if found is not None:
                return found
        except UnsupportedError as error:
            reason = f"{target}: {error}"
    else:
        reason = f"{target} on other numbers than float32"
    if isinstance(like, tuple | list):
        return [
            None if part is None else builder.host(target, args, kwargs, part, reason, item)
            for item, part in enumerate(like)
        ]
    return builder.host(target, args, kwargs, like, reason)


def _view(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> Any:
    held, rest = args[0], tuple(args[1:])
    if target.overloadpacket in (aten.view, aten._unsafe_view):
        # The same, whatever the order in memory.
        target = aten.reshape.default
    if isinstance(like, tuple | list):
        return [held.then(ViewOf(target, rest, kwargs, i, part)) for i, part in enumerate(like)]
    return held.then(ViewOf(target, rest, kwargs, None, like))


def images(builder: Builder, held: Lazy) -> Value:
    """``(N, C, H, W)`` with its channels innermost."""
    value = builder.value(held)
    if len(value.shape) != 4:
        raise UnsupportedError(f"the input has {len(value.shape)} axes, not 4")
    return builder.laid_out(value, 1)


def fixed(tensor: Any, what: str) -> Tensor:
    """A constant tensor."""
    if not isinstance(tensor, Tensor):
        raise UnsupportedError(f"the {what} is computed by the network")
    return tensor.detach()


def named(builder: Builder, node: fx.Node, *tensors: Any) -> str:
    """The module that owns one of ``tensors``, else the operator's name."""
    for tensor in tensors:
        name = builder.names.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        if name is not None:
            return name.rpartition(".")[0] or name
    return str(node.target).removeprefix("aten.").partition(".")[0]


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
    pads = tuple((p, p) for p in _each(padding, dims))
    conv = ConvSpec(
        value.shape[0], value.shape[1], whole.shape[1] * groups if transposed else whole.shape[0],
        value.shape[2:], tuple(whole.shape[2:]), _each(stride, dims), pads, _each(dilation, dims),
        groups, transposed, _each(output_padding, dims) if transposed else (),
    )  # fmt: skip
    if parts(conv).sparse:
        raise UnsupportedError("no tap of the kernel reaches some of the outputs")
    made = Convolution(
        conv, whole.contiguous(), None if bias is None else fixed(bias, "bias").contiguous()
    )
    return Lazy.of(builder.add(name, made, [value], _shape(node)))


def _linear(builder: Builder, node: fx.Node, x: Lazy, weight: Tensor, bias: Any) -> Lazy:
    """``x @ weight.T + bias`` over the last axis; ``weight`` is (out, in)."""
    bias = None if bias is None else fixed(bias, "bias").reshape(-1).contiguous()
    name, shape, out = named(builder, node, weight), _shape(node), weight.shape[0]
    base = x.base
    if len(base.shape) == 4 and base.axis == 1 and base.pixels > base.shape[0] and x.is_flat():
        # A kernel as large as the image.
        n, c, h, w = base.shape
        conv = ConvSpec(n, c, out, (h, w), (h, w), (1, 1), ((0, 0),) * 2, (1, 1), 1)
        made = Convolution(conv, weight.detach().reshape(out, c, h, w).contiguous(), bias)
        whole = Lazy.of(builder.add(name, made, [base], (n, out, 1, 1)))
        return whole.then(ViewOf(aten.flatten.using_ints, (1,), {}, None, node.meta["val"]))
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


def _max_pool(
    builder: Builder, node: fx.Node, x: Lazy, kernel: Any, stride: Any = (),
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    value, shape = images(builder, x), tuple(node.meta["val"][0].shape)
    kernel, dilation = _both(kernel), _both(dilation)
    stride = _both(stride or kernel)
    sides = _sides(value.shape[2:], shape[2:], kernel, stride, _both(padding), dilation)
    pool = Pool("max", kernel, stride, sides, dilation)
    return [Lazy.of(builder.add("max_pool", pool, [value], shape)), None]


def _average_pool(
    builder: Builder, node: fx.Node, x: Lazy, kernel: Any, stride: Any = (),
    padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Lazy:  # fmt: skip
    if divisor_override is not None:
        raise UnsupportedError(f"divisor_override={divisor_override}")
    value, shape, pads = images(builder, x), _shape(node), _both(padding)
    kernel = _both(kernel)
    stride = _both(stride or kernel)
    sides = _sides(value.shape[2:], shape[2:], kernel, stride, pads, (1, 1))
    counted: Sides = ((0, 0), (0, 0))
    if count_include_pad:
        rows, columns = ((p, min(p, end)) for p, (_, end) in zip(pads, sides, strict=True))
        counted = (rows, columns)
    pool = Pool("average", kernel, stride, sides, counted=counted)
    return Lazy.of(builder.add("average_pool", pool, [value], shape))


def _sides(
    size: Sequence[int], out: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Sides:  # fmt: skip
    """Padding before and after, with what the last window of ceil_mode needs."""
    found = []
    for n, m, k, s, p, d in zip(size, out, kernel, stride, padding, dilation, strict=True):
        needed = (m - 1) * s + (k - 1) * d + 1
        found.append((p, max(0, needed - n - p)))
    return found[0], found[1]


def _adaptive(kind: str) -> Callable[..., Any]:
    def lowered(builder: Builder, node: fx.Node, x: Lazy, size: Any) -> Any:
        value, like = images(builder, x), node.meta["val"]
        several = isinstance(like, tuple | list)
        shape = tuple((like[0] if several else like).shape)
        result = Lazy.of(builder.add(f"{kind}_pool", AdaptivePool(kind), [value], shape))
        return [result, None] if several else result

    return lowered


def _reduced(kind: str) -> Callable[..., Any]:
    """The mean or maximum over rows and columns."""

    def lowered(
        builder: Builder, node: fx.Node, x: Lazy, dims: Any = None, keepdim: bool = False,
        **kwargs: Any,
    ) -> Lazy:  # fmt: skip
        axes = sorted(d % len(x.shape) for d in _each(dims if dims is not None else (), None))
        if len(x.shape) != 4 or axes != [2, 3] or kwargs:
            raise UnsupportedError("it is not over rows and columns")
        value = images(builder, x)
        result = Lazy.of(builder.add(kind, AdaptivePool(kind), [value], (*value.shape[:2], 1, 1)))
        if keepdim:
            return result
        return result.then(ViewOf(aten.flatten.using_ints, (1,), {}, None, node.meta["val"]))

    return lowered


def _upsample(mode: str) -> Callable[..., Any]:
    def lowered(builder: Builder, node: fx.Node, x: Lazy, size: Any, *rest: Any) -> Lazy:
        align = bool(rest[0]) if mode == "bilinear" else False
        given = list(rest[1:] if mode == "bilinear" else rest)
        if len(given) == 1 and isinstance(given[0], list | tuple):
            given = list(given[0])
        given = [*given, None, None] if not given or given == [None] else given
        scales = (given[0], given[1])
        made = Upsample(mode, align, scales)
        return Lazy.of(builder.add("upsample", made, [images(builder, x)], _shape(node)))

    return lowered


def _pad(builder: Builder, node: fx.Node, x: Lazy, pad: Sequence[int], value: float = 0) -> Lazy:
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    if len(x.shape) != 4 or any(side != (0, 0) for side in sides[2:]):
        raise UnsupportedError("it pads more than rows and columns")
    columns, rows = [*sides, (0, 0), (0, 0)][:2]
    made = Pad((rows, columns), float(value))
    return Lazy.of(builder.add("pad", made, [images(builder, x)], _shape(node)))


def _layer_norm(
    builder: Builder, node: fx.Node, x: Lazy, shape: Sequence[int], weight: Any, bias: Any,
    eps: float,
) -> Any:  # fmt: skip
    if len(shape) != 1:
        raise UnsupportedError(f"it is over {len(shape)} axes")
    value = builder.value(x)
    value = builder.laid_out(value, len(value.shape) - 1)
    made = LayerNorm(eps, *(None if t is None else fixed(t, "weight") for t in (weight, bias)))
    name = named(builder, node, weight)
    return [Lazy.of(builder.add(name, made, [value], value.shape, value.axis)), None, None]


def _softmax(builder: Builder, node: fx.Node, x: Lazy, dim: int, half: bool = False) -> Lazy:
    value = builder.value(x)
    value = builder.laid_out(value, dim % len(value.shape))
    return Lazy.of(builder.add("softmax", Softmax(), [value], value.shape, value.axis))


def _cat(builder: Builder, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> Lazy:
    shape = _shape(node)
    axis = dim % len(shape)
    if axis not in (1, len(shape) - 1) or axis == 0:
        raise UnsupportedError(f"it is along axis {dim}")
    if len(shape) == 4 and axis != 1:
        raise UnsupportedError(f"it is along axis {dim}")
    values = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            values.append(builder.constant(tensor, axis))
        else:
            values.append(builder.laid_out(builder.value(tensor), axis))
    kept = [value for value in values if value.shape != (0,) and value.channels]
    return Lazy.of(builder.add("cat", Concat(), kept, shape, axis))


def _each(value: Any, dims: int | None) -> tuple[int, ...]:
    """A number for each axis."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if dims is not None and len(values) == 1 else values


def _both(value: Any) -> tuple[int, int]:
    """A number for rows and one for columns."""
    rows, columns = _each(value, 2)
    return rows, columns


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    aten.convolution: _convolution,
    aten.addmm: _addmm,
    aten.mm: _mm,
    aten.linear: _linear_op,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.cudnn_batch_norm: _batch_norm,
    aten.max_pool2d_with_indices: _max_pool,
    aten.avg_pool2d: _average_pool,
    aten._adaptive_avg_pool2d: _adaptive("average"),
    aten.adaptive_max_pool2d: _adaptive("max"),
    aten.mean: _reduced("average"),
    aten.amax: _reduced("max"),
    aten.upsample_nearest2d: _upsample("nearest"),
    aten.upsample_bilinear2d: _upsample("bilinear"),
    aten.constant_pad_nd: _pad,
    aten.native_layer_norm: _layer_norm,
    aten._softmax: _softmax,
    aten.softmax: _softmax,
    aten.cat: _cat,
}
