"""Which convolutions are computed after Winograd, and which gather their channels first: those
where the clock says so.

A convolution can bring channels into its own order on the way, for each block of its results again.
Winograd takes them as they lie.
"""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler.filtering import TAPS, filtering, tiles
from groupconv.compiler.graph import (
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
from groupconv.kernels.tuning import tuning
from groupconv.timing import interleave

# Channels of a group, on both sides, below which the transforms cost more than they save.
_WIDE = 16
# Results of a tile, and the products that are added in turn: with more results products grow
# larger than what they sum up to, and shorter chains keep the rounding error below four times that
# of PyTorch.
_CHAINS = {2: 128, 4: 32}
# Instead of results of a tile: one step, of channels that are gathered before it.
_GATHERED = 0
# Bytes after which the lines of the cache next to the core begin again.
_SAME_LINES = 4096
# Seconds for which the ways are compared, and by how much a new one must win.
_COMPARING, _MARGIN = 0.15, 1.05


def choose(graph: Graph, library: Library) -> Graph:
    """The graph with some convolutions in three parts."""
    nodes: list[Node] = []
    for node in graph.nodes:
        operator = node.operator
        if isinstance(operator, Convolution) and (ways := _ways(node, operator)):
            way = _fastest(node, operator, ways, library)
            nodes += [node] if way is None else split(node, operator, way)
        else:
            nodes.append(node)
    return graph.replace(nodes)


def _ways(node: Node, operator: Convolution) -> tuple[int, ...]:
    """In which other ways it can be computed."""
    conv = operator.conv
    if reads_planes(node):
        return ()
    gathered = () if operator.order is None else (_GATHERED,)
    winograd = (
        not conv.transposed
        and conv.kernel_size == (TAPS, TAPS)
        and conv.stride == conv.dilation == (1, 1)
        and min(min(pair) for pair in conv.padding) >= 0
        and min(conv.in_channels, conv.out_channels) // conv.groups >= _WIDE
        and node.inputs[0].axis == 1
    )
    return (*gathered, *_CHAINS) if winograd else gathered


def split(node: Node, operator: Convolution, results: int) -> Iterator[Node]:
    """The three parts of a convolution; each tile has ``results`` to a side. A gather before them
    where the convolution takes channels in another order."""
    conv, (x, *added) = operator.conv, node.inputs
    if operator.order is not None:
        gathered = Value(f"{node.name}.gathered", x.shape, x.axis)
        yield Node(node.name, Gather(operator.order), (x,), gathered)
        x = gathered
    if results == _GATHERED:
        yield Node(node.name, replace(operator, order=None), (x, *added), node.output)
        return
    count = conv.batch * math.prod(tiles(conv.output_size, results))
    before = (conv.padding[0][0], conv.padding[1][0])
    weight = _transformed(operator.weight, results)
    inward, products = (
        Value(f"{node.name}.{name}", (len(weight), _rows(count, channels), channels), 2)
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


def _rows(tiles: int, channels: int) -> int:
    """Of a matrix: one more than the tiles where all matrices would else begin on the same lines
    of the cache. Those who write and read them go through all of them at once."""
    return min(tiles, tiles + 1, key=lambda rows: math.gcd(4 * rows * channels, _SAME_LINES))


def _transformed(weight: Tensor, results: int) -> Tensor:
    """((results + 2)**2, out, in, 1, 1) of (out, in, 3, 3), computed in float64."""
    taps = torch.tensor(filtering(results).taps, dtype=torch.float64)
    both = torch.kron(taps, taps)
    flat = weight.detach().double().flatten(2).permute(2, 0, 1)
    return (both @ flat.flatten(1)).unflatten(1, (*flat.shape[1:], 1, 1)).float()


def _fastest(
    node: Node, operator: Convolution, ways: tuple[int, ...], library: Library
) -> int | None:
    """One of ``ways`` by the clock, on the layer alone, or None; remembered with the code."""
    if not tuning():
        return None
    plain = replace(operator, bias=None, activation=None, residual=None)
    key = cache.key("algorithm", plain.conv, ways, library.machine, openmp.threads())
    entry = cache.read(key)
    if entry is not None:
        return json.loads(entry)
    x = Value("x", node.inputs[0].shape)
    y = Value("y", node.output.shape)
    alone = Node("y", plain, (x,), y)
    nodes: dict[int | None, list[Node]] = {None: [alone]}
    nodes.update((m, list(split(alone, plain, m))) for m in ways)
    programs = {m: Program(Graph((x,), (y,), each), library) for m, each in nodes.items()}
    example = programs[None].example()
    times = interleave(
        {str(m): functools.partial(program, example) for m, program in programs.items()},
        seconds=_COMPARING,
        max_runs=50,
    )
    seconds = {m: times[str(m)].q1 * (1 if m is None else _MARGIN) for m in programs}
    result = min(seconds, key=seconds.__getitem__)
    cache.write(key, json.dumps(result).encode())
    return result
