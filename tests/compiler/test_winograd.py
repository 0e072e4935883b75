"""Convolutions in three parts, after Winograd, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from compiler.build import Builder
from compiler.test_program import check

from groupconv.compiler import algorithms
from groupconv.compiler.graph import Convolution, FromTiles, Graph, Node, Value
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.kernels.spec import ACTIVATIONS, ConvSpec

# (batch, in, out, rows, columns, padding of rows, of columns)
CASES = [
    (1, 32, 32, 8, 8, (1, 1), (1, 1)),
    (2, 33, 47, 7, 9, (1, 1), (1, 1)),
    (1, 5, 3, 3, 3, (0, 0), (0, 0)),
    (3, 1, 17, 1, 1, (1, 1), (1, 1)),
    (1, 64, 7, 1, 12, (1, 2), (3, 0)),
    (2, 20, 16, 13, 4, (0, 1), (2, 1)),
]


def graph(case: tuple, activation: str | None = None, residual: str | None = None) -> Graph:
    """One convolution, with a bias; its second input is the residual."""
    batch, into, out, height, width, rows, columns = case
    torch.manual_seed(0)
    conv = ConvSpec(batch, into, out, (height, width), (3, 3), (1, 1), (rows, columns), (1, 1), 1)
    weight = torch.randn(out, into, 3, 3) / (9 * into) ** 0.5
    operator = Convolution(conv, weight, torch.randn(out), activation, 0.2, residual)
    x = Value("x", (batch, into, height, width))
    y = Value("y", (batch, out, *conv.output_size))
    inputs = (x, Value("r", y.shape)) if residual else (x,)
    return Graph(inputs, (y,), [Node("y", operator, inputs, y)])


def split(whole: Graph) -> Graph:
    (node,) = whole.nodes
    assert isinstance(node.operator, Convolution)
    return whole.replace(list(algorithms.split(node, node.operator)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("threads", [1, 2])
def test_against_float64(case: tuple, residual: str | None, threads: int) -> None:
    whole = graph(case, "relu", residual)
    check(split(whole), threads, expected=whole)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation: str | None) -> None:
    whole = graph(CASES[1], activation, "before")
    check(split(whole), expected=whole)


@pytest.mark.parametrize("channels", [32, 256, 512])
def test_error_is_not_much_more_than_pytorchs(channels: int) -> None:
    whole = graph((1, channels, channels, 14, 14, (1, 1), (1, 1)))
    operator = whole.nodes[0].operator
    assert isinstance(operator, Convolution)
    program = Program(split(whole), Library())
    (x,) = program.example()
    exact = F.conv2d(x.double(), operator.weight.double(), operator.bias.double(), padding=1)
    theirs = F.conv2d(x, operator.weight, operator.bias, padding=1)
    error, bound = ((y - exact).square().mean().sqrt() for y in (program([x])[0], theirs))
    assert error <= 4 * bound


def test_parts_of_wider_values() -> None:
    # The input is a slice, the result a part of a concatenation.
    b = Builder((1, 64, 9, 9))
    left, right = b.split(b.inputs[0], 32)
    y = b.concat(b.conv(right, 40, 3, padding=1), left)
    whole = b.graph(y)
    nodes = []
    for node in whole.nodes:
        if isinstance(node.operator, Convolution):
            nodes += algorithms.split(node, node.operator)
        else:
            nodes.append(node)
    assert any(isinstance(node.operator, FromTiles) for node in nodes)
    check(whole.replace(nodes), expected=whole)


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graph(CASES[0])
    for faster in (True, False):
        monkeypatch.setattr(algorithms, "_is_faster", lambda *_, answer=faster: answer)
        chosen = algorithms.choose(whole, Library())
        assert len(chosen.nodes) == (3 if faster else 1)


def test_never_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    assert len(algorithms.choose(graph(CASES[0]), Library()).nodes) == 1
