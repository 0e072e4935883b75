"""Which convolutions are computed after Winograd, and which gather their channels first: those
where the clock says so.

A convolution can bring channels into its own order on the way, for each block of its results again.
Winograd takes them as they lie.
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from groupconv.compiler.filtering import TAPS, filtering, rows, tiles
from groupconv.compiler.graph import (
    Bands,
    Convolution,
    FromTiles,
    Gather,
    Graph,
    Node,
    Products,
    ToTiles,
    Value,
)
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.compiler.weights import reads_planes
from groupconv.kernels import cache, openmp
from groupconv.kernels.spec import ConvSpec
from groupconv.kernels.tuning import tuning
from groupconv.timing import interleave

# Channels of a group, on both sides, below which the transforms cost more than they save.
_WIDE = 16
# Results of a tile, and the products that are added in turn: with more results products grow
# larger than what they sum up to, and shorter chains keep the rounding error below four times that
# of PyTorch.
_CHAINS = {2: 128, 4: 32}
# Bytes that a thread has between the steps of a band: half of what its own cache holds.
_NEAR = 2**19
# Seconds for which the ways are compared, and by how much a new one must win.
_COMPARING, _MARGIN = 0.15, 1.05


class Way(NamedTuple):
    """How a convolution is computed, other than in one step on channels as they are taken.

    Args:
        results: of a tile of minimal filtering, along each side; 0 for one step, of channels that
            are gathered before it.
        lines: of tiles in a band; 0 where all tiles are done by one step after another.
    """

    results: int = 0
    lines: int = 0


def choose(graph: Graph, library: Library) -> Graph:
    """The graph with every convolution computed in the way that is the fastest."""
    nodes: list[Node] = []
    for node in graph.nodes:
        operator = node.operator
        if isinstance(operator, Convolution) and (ways := _ways(node, operator)):
            way = _fastest(node, operator, ways, library)
            nodes += [node] if way is None else split(node, operator, way)
        else:
            nodes.append(node)
    return graph.replace(nodes)


def _ways(node: Node, operator: Convolution) -> list[Way]:
    """In which other ways it can be computed."""
    conv = operator.conv
    if reads_planes(node):
        return []
    ways = [] if operator.order is None else [Way()]
    winograd = (
        not conv.transposed
        and conv.kernel_size == (TAPS, TAPS)
        and conv.stride == conv.dilation == (1, 1)
        and min(min(pair) for pair in conv.padding) >= 0
        and min(conv.in_channels, conv.out_channels) // conv.groups >= _WIDE
        and node.inputs[0].axis == 1
    )
    if winograd:
        ways += map(Way, _CHAINS)
        # Where there are many tiles, large ones are faster anyway.
        if lines := _lines(conv, max(_CHAINS)):
            ways.append(Way(max(_CHAINS), lines))
    return ways


def _lines(conv: ConvSpec, results: int) -> int | None:
    """Of a band: as many as are near and leave bands for all threads, or None."""
    down, across = tiles(conv.output_size, results)
    line = 4 * (results + TAPS - 1) ** 2 * across * (conv.in_channels + conv.out_channels)
    total = conv.batch * down
    shared = max(2, openmp.threads())
    fitting = [n for n in range(1, total // shared + 1) if total % n == 0 and n * line <= _NEAR]
    return max(fitting, default=None)


def split(node: Node, operator: Convolution, way: Way) -> Iterator[Node]:
    """The steps of a convolution; the first one a gather where it takes channels in another
    order."""
    conv, results, (x, *added) = operator.conv, way.results, node.inputs
    if operator.order is not None:
        gathered = Value(f"{node.name}.gathered", x.shape, x.axis)
        yield Node(node.name, Gather(operator.order), (x,), gathered)
        x = gathered
    if not results:
        yield Node(node.name, replace(operator, order=None), (x, *added), node.output)
        return
    weight = _transformed(operator.weight, results)
    if way.lines:
        bands = Bands(
            conv, weight, _CHAINS[results], results, way.lines, operator.bias, operator.activation,
            operator.slope, operator.residual,
        )  # fmt: skip
        yield Node(node.name, bands, (x, *added), node.output)
        return
    count = conv.batch * math.prod(tiles(conv.output_size, results))
    before = (conv.padding[0][0], conv.padding[1][0])
    inward, products = (
        Value(f"{node.name}.{name}", (len(weight), rows(count, channels), channels), 2)
        for name, channels in (("tiles", conv.in_channels), ("products", conv.out_channels))
    )
    height, width = conv.output_size
    first = ToTiles(results, before, (height, width))
    last = FromTiles(results, operator.bias, operator.activation, operator.slope, operator.residual)
    yield Node(node.name, first, (x,), inward)
    yield Node(
        node.name, Products(weight, count, conv.groups, _CHAINS[results]), (inward,), products
    )
    yield Node(node.name, last, (products, *added), node.output)


def _transformed(weight: Tensor, results: int) -> Tensor:
    """((results + 2)**2, out, in, 1, 1) of (out, in, 3, 3), computed in float64."""
    taps = torch.tensor(filtering(results).taps, dtype=torch.float64)
    both = torch.kron(taps, taps)
    flat = weight.detach().double().flatten(2).permute(2, 0, 1)
    return (both @ flat.flatten(1)).unflatten(1, (*flat.shape[1:], 1, 1)).float()


def _fastest(
    node: Node, operator: Convolution, ways: Sequence[Way], library: Library
) -> Way | None:
    """One of ``ways`` by the clock, on the layer alone, or None; remembered with the code."""
    if not tuning():
        return None
    plain = replace(operator, bias=None, activation=None, residual=None)
    key = cache.key("algorithm", plain.conv, ways, library.machine, openmp.threads())
    entry = cache.read(key)
    if entry is not None:
        kept = json.loads(entry)
        return None if kept is None else Way(*kept)
    x = Value("x", node.inputs[0].shape)
    y = Value("y", node.output.shape)
    alone = Node("y", plain, (x,), y)
    nodes: dict[Way | None, list[Node]] = {None: [alone]}
    nodes.update((way, list(split(alone, plain, way))) for way in ways)
    programs = {way: Program(Graph((x,), (y,), each), library) for way, each in nodes.items()}
    example = programs[None].example()
    times = interleave(
        {str(way): functools.partial(program, example) for way, program in programs.items()},
        seconds=_COMPARING,
        max_runs=50,
    )
    seconds = {way: times[str(way)].q1 * (_MARGIN if way else 1) for way in programs}
    result = min(seconds, key=seconds.__getitem__)
    cache.write(key, json.dumps(result).encode())
    return result
