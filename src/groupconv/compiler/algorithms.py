"""Which convolutions are computed after Winograd: those where the clock says so."""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler.graph import (
    Convolution,
    FromTiles,
    Graph,
    Node,
    Products,
    ToTiles,
    Value,
)
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.compiler.steps.winograd import tiles
from groupconv.kernels import cache, openmp
from groupconv.kernels.tuning import tuning
from groupconv.timing import interleave

# Channels, on both sides, below which the transforms cost more than they save.
_WIDE = 32
# Seconds for which the two ways are compared, and by how much the new one must win.
_COMPARING, _MARGIN = 0.1, 1.05
# Of a row of the weights: G in Lavin and Gray's notation.
_WEIGHTS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def choose(graph: Graph, library: Library) -> Graph:
    """The graph with some convolutions in three parts."""
    nodes: list[Node] = []
    for node in graph.nodes:
        operator = node.operator
        if (
            isinstance(operator, Convolution)
            and _is_suited(node, operator)
            and _is_faster(node, operator, library)
        ):
            nodes += split(node, operator)
        else:
            nodes.append(node)
    return graph.replace(nodes)


def _is_suited(node: Node, operator: Convolution) -> bool:
    conv = operator.conv
    return (
        not conv.transposed
        and conv.groups == 1
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and min(min(pair) for pair in conv.padding) >= 0
        and min(conv.in_channels, conv.out_channels) >= _WIDE
        and operator.order is None
        and node.inputs[0].axis == 1
    )


def split(node: Node, operator: Convolution) -> Iterator[Node]:
    """The three parts of a convolution."""
    conv, (x, *added) = operator.conv, node.inputs
    down, across = tiles(conv.output_size)
    count = conv.batch * down * across
    before = (conv.padding[0][0], conv.padding[1][0])
    inward = Value(f"{node.name}.tiles", (16, count, conv.in_channels), 2)
    products = Value(f"{node.name}.products", (16, count, conv.out_channels), 2)
    height, width = conv.output_size
    last = FromTiles(operator.bias, operator.activation, operator.slope, operator.residual)
    yield Node(node.name, ToTiles(before, (height, width)), (x,), inward)
    yield Node(node.name, Products(_transformed(operator.weight)), (inward,), products)
    yield Node(node.name, last, (products, *added), node.output)


def _transformed(weight: Tensor) -> Tensor:
    """(16, out, in) of (out, in, 3, 3), computed in float64."""
    matrix = torch.tensor(_WEIGHTS, dtype=torch.float64)
    found = torch.einsum("ia,jb,ocab->ijoc", matrix, matrix, weight.double())
    return found.reshape(16, *weight.shape[:2]).float().contiguous()


def _is_faster(node: Node, operator: Convolution, library: Library) -> bool:
    """By the clock, on the layer alone; remembered with the code."""
    if not tuning():
        return False
    plain = replace(operator, bias=None, activation=None, residual=None)
    key = cache.key("winograd", plain.conv, library.machine, openmp.threads())
    entry = cache.read(key)
    if entry is not None:
        return json.loads(entry)
    x = Value("x", node.inputs[0].shape)
    y = Value("y", node.output.shape)
    alone = Node("y", plain, (x,), y)
    programs = {
        "direct": Program(Graph((x,), (y,), [alone]), library),
        "winograd": Program(Graph((x,), (y,), list(split(alone, plain))), library),
    }
    example = programs["direct"].example()
    times = interleave(
        {name: functools.partial(program, example) for name, program in programs.items()},
        seconds=_COMPARING,
        max_runs=50,
    )
    result = times["direct"].q1 > _MARGIN * times["winograd"].q1
    cache.write(key, json.dumps(result).encode())
    return result
