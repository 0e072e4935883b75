"""PyTorch's operators on the rows and columns of images: pooling, means, interpolation, padding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from groupconv.compiler.arguments import both, each, images, shape_of
from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.graph import (
    AdaptivePool,
    Instruction,
    Map,
    Pad,
    Pool,
    Sides,
    Upsample,
    Value,
)
from groupconv.compiler.views import Lazy

aten = torch.ops.aten


def max_pool(
    builder: Builder, node: fx.Node, x: Lazy, kernel: Any, stride: Any = (),
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    value, shape = images(builder, x), tuple(node.meta["val"][0].shape)
    kernel, dilation = both(kernel), both(dilation)
    stride = both(stride or kernel)
    sides = _sides(value.shape[2:], shape[2:], kernel, stride, both(padding), dilation)
    pool = Pool("max", kernel, stride, sides, dilation)
    return [Lazy.of(builder.add("max_pool", pool, [value], shape)), None]


def average_pool(
    builder: Builder, node: fx.Node, x: Lazy, kernel: Any, stride: Any = (),
    padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor: int | None = None,
) -> Lazy:  # fmt: skip
    value, shape, pads = images(builder, x), shape_of(node), both(padding)
    kernel = both(kernel)
    stride = both(stride or kernel)
    sides = _sides(value.shape[2:], shape[2:], kernel, stride, pads, (1, 1))
    counted: Sides = ((0, 0), (0, 0))
    if divisor is not None:
        counted = sides
    elif count_include_pad:
        rows, columns = ((p, min(p, end)) for p, (_, end) in zip(pads, sides, strict=True))
        counted = (rows, columns)
    pool = Pool("average", kernel, stride, sides, counted=counted)
    result = builder.add("average_pool", pool, [value], shape)
    if divisor is not None:
        result = _mapped(builder, result, Instruction("mul", (0, math.prod(kernel) / divisor)))
    return Lazy.of(result)


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


def adaptive(kind: str) -> Callable[..., Any]:
    def lowered(builder: Builder, node: fx.Node, x: Lazy, size: Any) -> Any:
        value, like = images(builder, x), node.meta["val"]
        several = isinstance(like, tuple | list)
        shape = tuple((like[0] if several else like).shape)
        result = Lazy.of(builder.add(f"{kind}_pool", AdaptivePool(kind), [value], shape))
        return [result, None] if several else result

    return lowered


def reduced(kind: str) -> Callable[..., Any]:
    """The mean or maximum over rows and columns."""

    def lowered(
        builder: Builder, node: fx.Node, x: Lazy, dims: Any = None, keepdim: bool = False,
        **kwargs: Any,
    ) -> Lazy:  # fmt: skip
        if kwargs:
            raise UnsupportedError(", ".join(f"{name}={value}" for name, value in kwargs.items()))
        value, _ = _spread_out(builder, x, dims)
        return _back(_pooled(builder, kind, value), node)

    return lowered


def total(
    builder: Builder, node: fx.Node, x: Lazy, dims: Any = None, keepdim: bool = False
) -> Lazy:
    """The sum over rows and columns, from the mean."""
    value, count = _spread_out(builder, x, dims)
    mean = _pooled(builder, "average", value)
    return _back(_mapped(builder, mean, Instruction("mul", (0, float(count)))), node)


def norm(
    builder: Builder, node: fx.Node, x: Lazy, order: float = 2, dims: Any = None,
    keepdim: bool = False,
) -> Lazy:  # fmt: skip
    """The Euclidean norm over rows and columns, from the mean of the squares."""
    if order != 2:
        raise UnsupportedError(f"ord={order}")
    value, count = _spread_out(builder, x, dims)
    mean = _pooled(builder, "average", _mapped(builder, value, Instruction("mul", (0, 0))))
    product = Instruction("mul", (0, float(count)))
    return _back(_mapped(builder, mean, product, Instruction("sqrt", (-1,))), node)


def _spread_out(builder: Builder, x: Lazy, dims: Any) -> tuple[Value, int]:
    """What is reduced as rows and columns of an image, and how many numbers it is.

    It may be all axes of ``(N, C, H, W)`` or ``(N, H, W, C)`` but N and C, and one of three.
    """
    count = len(x.shape)
    axes = {d % count for d in each(dims, None)} if dims not in (None, []) else set(range(count))
    kept = [axis for axis in range(count) if axis not in axes]
    if count not in (3, 4) or len(kept) != 2 or kept[0] != 0 or kept[1] not in (1, count - 1):
        raise UnsupportedError("it is not over rows and columns")
    image = x.seen(aten.movedim.int, kept[1], 1)
    if count == 3:
        image = image.seen(aten.unsqueeze.default, 2)
    return images(builder, image), math.prod(image.shape[2:])


def _pooled(builder: Builder, kind: str, value: Value) -> Value:
    return builder.add(kind, AdaptivePool(kind), [value], (*value.shape[:2], 1, 1))


def _mapped(builder: Builder, value: Value, *program: Instruction) -> Value:
    return builder.add(program[-1].function, Map(program), [value], value.shape, value.axis)


def _back(value: Value, node: fx.Node) -> Lazy:
    """``(N, C, 1, 1)`` in the shape of the result."""
    return Lazy.of(value).seen(aten.reshape.default, shape_of(node))


def upsample(mode: str) -> Callable[..., Any]:
    def lowered(builder: Builder, node: fx.Node, x: Lazy, size: Any, *rest: Any) -> Lazy:
        align = bool(rest[0]) if mode == "bilinear" else False
        given = list(rest[1:] if mode == "bilinear" else rest)
        if len(given) == 1 and isinstance(given[0], list | tuple):
            given = list(given[0])
        given = [*given, None, None] if not given or given == [None] else given
        scales = (given[0], given[1])
        made = Upsample(mode, align, scales)
        return Lazy.of(builder.add("upsample", made, [images(builder, x)], shape_of(node)))

    return lowered


def pad(builder: Builder, node: fx.Node, x: Lazy, pad: Sequence[int], value: float = 0) -> Lazy:
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    if len(x.shape) != 4 or any(side != (0, 0) for side in sides[2:]):
        raise UnsupportedError("it pads more than rows and columns")
    columns, rows = [*sides, (0, 0), (0, 0)][:2]
    made = Pad((rows, columns), float(value))
    return Lazy.of(builder.add("pad", made, [images(builder, x)], shape_of(node)))
