"""Minimal filtering in bands as a task: a step that calls three others."""

from groupconv.compiler.convolve import products
from groupconv.compiler.filtering import rows, tiles
from groupconv.compiler.graph import Bands, Node, Value
from groupconv.compiler.library import Library
from groupconv.compiler.memory import Place
from groupconv.compiler.steps.bands import BandsStep
from groupconv.compiler.steps.from_tiles import FromTilesStep
from groupconv.compiler.steps.to_tiles import ToTilesStep
from groupconv.compiler.task import Pointer, Task


def filtered(node: Node, operator: Bands, places: dict[Value, Place], library: Library) -> Task:
    """The task of a convolution in bands. Each band is one thread's."""
    conv, (x, *added), y = operator.conv, node.inputs, node.output
    down, across = tiles(conv.output_size, operator.results)
    count, matrices = operator.lines * across, len(operator.weight)
    x_image, y_image = (n * rows(count, n) for n in (conv.in_channels, conv.out_channels))
    residual = places[added[0]] if added else None
    (height, width), (top, left) = conv.output_size, (sides[0] for sides in conv.padding)
    inward = ToTilesStep(
        operator.results, conv.in_channels, (x.shape[2], x.shape[3]), (top, left), (height, width),
        places[x].pixel, x_image,
    )  # fmt: skip
    strides = (residual.pixel if residual else 0, places[y].pixel)
    outward = FromTilesStep(
        operator.results, conv.out_channels, (height, width), strides, operator.bias is not None,
        operator.residual, operator.activation, operator.slope, y_image,
    )  # fmt: skip
    product, packed = products(
        operator.weight, count, conv.groups, operator.chain, library, alone=True
    )
    kernel = packed.kernel
    step = BandsStep(
        down, operator.lines, count * conv.in_channels, count * conv.out_channels, matrices,
        kernel.tile.rows, kernel.tile.blocks, x_image, y_image, kernel.packed_size,
    )  # fmt: skip
    bias = None if operator.bias is None else operator.bias.detach().contiguous()
    bands = conv.batch * down // operator.lines
    moved = conv.batch * (inward.bytes + outward.bytes)
    return Task(
        name=node.name,
        kind="convolution 3x3, in bands",
        function=library.function(step),
        record=(
            library.function(inward),
            kernel.work,
            library.function(outward),
            Pointer(None),
            Pointer.to(places[x]),
            packed.tensor.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            Pointer.to(residual) if residual else 0,
            Pointer.to(places[y]),
            conv.batch,
        ),
        seconds=bands * matrices * kernel.seconds,
        macs=bands * product.macs,
        bytes=moved + 4 * packed.tensor.numel(),
        inputs=node.inputs,
        output=y,
        scratch=4 * step.share,
        packed=packed,
        keep=() if bias is None else (bias,),
    )
