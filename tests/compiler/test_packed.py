"""Weights of programs: each is kept once, packed, and comes back as it was."""

import pytest
import torch
from compiler.build import Builder
from compiler.random_graphs import graphs
from compiler.test_winograd import CASES, WAYS, graph, split
from hypothesis import given, settings

from groupconv.compiler.algorithms import Way
from groupconv.compiler.graph import Bands, Convolution, Graph, Products
from groupconv.compiler.library import Library
from groupconv.compiler.passes import optimize
from groupconv.compiler.program import Program


@pytest.fixture(autouse=True)
def _first_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")


def check(graph: Graph) -> int:
    """All weights of the graph's program are those of the graph, bit by bit; how many there are."""
    program = Program(graph, Library())
    unpacked, count = program.graph_with_weights(), 0
    for kept, node, back in zip(program.graph.nodes, graph.nodes, unpacked.nodes, strict=True):
        if isinstance(node.operator, Convolution | Products | Bands):
            assert kept.operator.weight.is_meta
            assert kept.operator.weight.shape == node.operator.weight.shape
            assert torch.equal(back.operator.weight, node.operator.weight)
            count += 1
        else:
            assert back.operator is node.operator
    return count


@settings(max_examples=40, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs(graph: Graph) -> None:
    check(optimize(graph))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(way: Way, case: tuple) -> None:
    assert check(split(graph(case), way)) == 1


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2), (4, 2), (5, 3)])
def test_transposed(groups: int, kernel: int, stride: int) -> None:
    b = Builder((2, 12, 5, 7))
    y = b.conv(b.inputs[0], 18, kernel, stride=stride, padding=0, groups=groups, transposed=True)
    assert check(b.graph(y)) == 1


def test_taps_that_no_output_sees_come_back_as_zero() -> None:
    """Two of the three rows and columns of the kernel only meet padding."""
    b = Builder((1, 4, 1, 1))
    y = b.conv(b.inputs[0], 6, 3, stride=3, padding=1, transposed=True)
    whole = b.graph(y)
    assert y.shape == (1, 6, 1, 1)
    (node,) = Program(whole, Library()).graph_with_weights().nodes
    weight = whole.nodes[0].operator.weight
    assert torch.equal(node.operator.weight[:, :, 1, 1], weight[:, :, 1, 1])
    assert node.operator.weight.count_nonzero() == weight[:, :, 1, 1].numel()


def test_one_operand_packed_once() -> None:
    """Not once more for the graph: what a program keeps is about the bytes of its weights."""
    b = Builder((1, 64, 8, 8))
    program = Program(b.graph(b.conv(b.inputs[0], 64, 3)), Library())
    assert program.weights == 4 * (64 * 64 * 9 + 64)
