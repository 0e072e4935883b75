"""Convolutions as tasks: kernels with their packed weights."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler.graph import Convolution, Node, Products, Value
from groupconv.compiler.library import Library, shared
from groupconv.compiler.memory import Place
from groupconv.compiler.packed import Packed, pack
from groupconv.compiler.task import Pointer, Task
from groupconv.kernels import module
from groupconv.kernels.parts import Part, parts
from groupconv.kernels.spec import ConvSpec


def convolve(
    node: Node, operator: Convolution, places: dict[Value, Place], library: Library, alone: bool
) -> Iterator[Task]:
    """One task for each kernel that the convolution needs; ``alone`` as in ``Library.kernel``."""
    x, *added = node.inputs
    source, target = places[x], places[node.output]
    residual = places[added[0]] if added else None
    # Only a whole image can be one of planes; of a linear layer the output's channels are last too.
    last = x.axis == 1 or node.output.axis != 1
    whole = parts(
        operator.conv,
        channels_last_input=last,
        bias=operator.bias is not None,
        residual=operator.residual,
        activation=operator.activation,
        slope=operator.slope,
        ordered=operator.order is not None,
        input_pixel=source.pixel if last else None,
        output_pixel=target.pixel,
        residual_pixel=residual.pixel if residual else None,
    )
    assert not whole.sparse
    order = None if operator.order is None else torch.tensor(operator.order)
    for part in whole.parts:
        kernel = library.kernel(part.spec, operator.conv.batch, alone=alone)
        packed = Packed(shared(pack(kernel, part, operator.weight)), kernel, part)
        yield _task(node, operator, packed, (source, residual, target), order)


def multiply(
    node: Node, operator: Products, places: dict[Value, Place], library: Library, alone: bool
) -> Task:
    """One task: each matrix is an image, with weights of its own."""
    (x,), y = node.inputs, node.output
    conv, packed = products(
        operator.weight, operator.rows, operator.groups, operator.chain, library, alone
    )
    images = Convolution(conv, operator.weight)
    return _task(
        node, images, packed, (places[x], None, places[y]), None,
        x_image=x.shape[1] * x.channels, y_image=y.shape[1] * y.channels,
        w_image=packed.kernel.packed_size,
    )  # fmt: skip


def products(
    weight: Tensor, rows: int, groups: int, chain: int, library: Library, alone: bool
) -> tuple[ConvSpec, Packed]:
    """What multiplies matrices of so many rows by those of ``weight``: see :class:`Products`."""
    count, out, width = weight.shape[:3]
    conv = ConvSpec(
        count, groups * width, out, (1, rows), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), groups
    )
    (part,) = parts(conv).parts
    part = replace(part, spec=replace(part.spec, chain=chain))
    kernel = library.kernel(part.spec, count, alone=alone)
    return conv, Packed(shared(pack(kernel, part, weight)), kernel, part)


def _task(
    node: Node,
    operator: Convolution,
    packed: Packed,
    places: tuple[Place, Place | None, Place],
    order: Tensor | None,
    **strides: int,
) -> Task:
    """The task of one kernel.

    Args:
        places: of input, residual and output.
        strides: those of ``module.RECORD`` from one image to the next, where they are not usual.
    """
    source, residual, target = places
    kernel, part, images = packed.kernel, packed.part, operator.conv.batch
    bias = None if operator.bias is None else operator.bias.contiguous()
    arguments: dict[str, int | Pointer] = {
        "x": Pointer.to(source),
        "w": packed.tensor.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "residual": Pointer.to(residual, part.residual_offset) if residual else 0,
        "order": 0 if order is None else order.data_ptr(),
        "y": Pointer.to(target, part.offset),
        "buffer": Pointer(None),
        "images": images,
        "rows": kernel.tile.rows,
        "blocks": kernel.tile.blocks,
        "share": kernel.buffer,
        "x_image": part.spec.input_image,
        "y_image": part.spec.output_image,
        "w_image": 0,
    }
    arguments |= strides
    conv = part.spec.conv
    return Task(
        name=node.name,
        kind=_kind(operator),
        function=kernel.work,
        record=tuple(arguments[name] for name in module.RECORD),
        seconds=kernel.seconds * images,
        macs=images * conv.macs,
        bytes=4 * (images * _elements(part) + packed.tensor.numel()),
        inputs=node.inputs,
        output=node.output,
        scratch=4 * kernel.buffer,
        packed=packed,
        keep=tuple(t for t in (bias, order) if t is not None),
    )


def _elements(part: Part) -> int:
    """Of one image: input, output and residual."""
    conv = part.spec.conv
    outputs = conv.out_channels * math.prod(conv.output_size)
    inputs = conv.in_channels * math.prod(conv.input_size)
    return inputs + outputs * (2 if part.spec.residual else 1)


def _kind(operator: Convolution) -> str:
    if operator.weight.ndim == 5:
        return "products"
    conv = operator.conv
    size = "x".join(map(str, conv.kernel_size))
    groups = f", {conv.groups} groups" if conv.groups > 1 else ""
    return f"{'transposed ' * conv.transposed}convolution {size}{groups}"
