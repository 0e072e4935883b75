"""Convolutions in three parts, after Winograd, against PyTorch in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from compiler.build import Builder
from compiler.test_program import check

from groupconv.compiler import algorithms
from groupconv.compiler.algorithms import Way
from groupconv.compiler.filtering import rows as rows_for
from groupconv.compiler.graph import Bands, Convolution, FromTiles, Graph, Node, Value
from groupconv.compiler.library import Library
from groupconv.compiler.program import Program
from groupconv.kernels.spec import ACTIVATIONS, ConvSpec

# (batch, in, out, groups, rows, columns, padding of rows, of columns)
CASES = [
    (1, 32, 32, 1, 8, 8, (1, 1), (1, 1)),
    (2, 33, 47, 1, 7, 9, (1, 1), (1, 1)),
    (1, 5, 3, 1, 3, 3, (0, 0), (0, 0)),
    (3, 1, 17, 1, 1, 1, (1, 1), (1, 1)),
    (1, 64, 7, 1, 1, 12, (1, 2), (3, 0)),
    (2, 20, 16, 4, 13, 4, (0, 1), (2, 1)),
    (1, 48, 72, 3, 14, 10, (1, 1), (1, 1)),
]
# In three steps, and in bands of one line of tiles.
WAYS = [Way(2), Way(4), Way(2, 1), Way(4, 1)]


def graph(case: tuple, activation: str | None = None, residual: str | None = None) -> Graph:
    """One convolution, with a bias; its second input is the residual."""
    batch, into, out, groups, height, width, rows, columns = case
    torch.manual_seed(0)
    conv = ConvSpec(
        batch, into, out, (height, width), (3, 3), (1, 1), (rows, columns), (1, 1), groups
    )
    weight = torch.randn(out, into // groups, 3, 3) / (9 * into / groups) ** 0.5
    operator = Convolution(conv, weight, torch.randn(out), activation, 0.2, residual)
    x = Value("x", (batch, into, height, width))
    y = Value("y", (batch, out, *conv.output_size))
    inputs = (x, Value("r", y.shape)) if residual else (x,)
    return Graph(inputs, (y,), [Node("y", operator, inputs, y)])


def split(whole: Graph, way: Way) -> Graph:
    """With every convolution computed in another way."""
    nodes: list[Node] = []
    for node in whole.nodes:
        if isinstance(node.operator, Convolution):
            nodes += algorithms.split(node, node.operator, way)
        else:
            nodes.append(node)
    assert any(isinstance(node.operator, FromTiles | Bands) for node in nodes)
    return whole.replace(nodes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("threads", [1, 2])
def test_against_float64(way: Way, case: tuple, residual: str | None, threads: int) -> None:
    whole = graph(case, "relu", residual)
    check(split(whole, way), threads, expected=whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(way: Way, activation: str | None) -> None:
    whole = graph(CASES[1], activation, "before")
    check(split(whole, way), expected=whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [32, 256, 512])
def test_error_is_not_much_more_than_pytorchs(way: Way, channels: int) -> None:
    whole = graph((1, channels, channels, 1, 14, 14, (1, 1), (1, 1)))
    operator = whole.nodes[0].operator
    assert isinstance(operator, Convolution)
    program = Program(split(whole, way), Library())
    (x,) = program.example()
    exact = F.conv2d(x.double(), operator.weight.double(), operator.bias.double(), padding=1)
    theirs = F.conv2d(x, operator.weight, operator.bias, padding=1)
    error, bound = ((y - exact).square().mean().sqrt() for y in (program([x])[0], theirs))
    assert error <= 4 * bound


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_wider_values(way: Way) -> None:
    # The input is a slice, the result a part of a concatenation.
    b = Builder((1, 64, 9, 9))
    left, right = b.split(b.inputs[0], 32)
    y = b.concat(b.conv(right, 40, 3, padding=1), left)
    whole = b.graph(y)
    check(split(whole, way), expected=whole)


@pytest.mark.parametrize("way", [Way(), *WAYS])
def test_channels_in_another_order_are_gathered(way: Way) -> None:
    b = Builder((2, 24, 7, 9))
    (node,) = b.graph(b.conv(b.inputs[0], 16, 3, padding=1, groups=2)).nodes
    assert isinstance(node.operator, Convolution)
    order = tuple(torch.randperm(24, generator=b.random).tolist())
    ordered = dataclasses.replace(node.operator, order=order)
    node = dataclasses.replace(node, operator=ordered)
    whole = Graph(b.inputs, (node.output,), [node])
    nodes = list(algorithms.split(node, ordered, way))
    assert len(nodes) == (4 if way.results and not way.lines else 2)
    check(whole.replace(nodes), expected=whole)


@pytest.mark.parametrize("lines", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_bands_of_several_lines(lines: int, threads: int) -> None:
    """Those of two images."""
    whole = graph((2, 20, 24, 2, 14, 9, (1, 1), (1, 1)), "relu", "after")
    check(split(whole, Way(4, lines)), threads, expected=whole)


def test_bands_are_near_and_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(channels: int, size: int, batch: int = 1) -> int | None:
        operator = (
            graph((batch, channels, channels, 1, size, size, (1, 1), (1, 1))).nodes[0].operator
        )
        assert isinstance(operator, Convolution)
        return algorithms._lines(operator.conv, 4)

    monkeypatch.setattr(algorithms.openmp, "threads", lambda: 1)
    # 36 numbers of 14 tiles of 128 channels before and after: 258 kB.
    assert lines(64, 56) == 2
    assert lines(64, 28) == 1
    assert lines(16, 56) == 7
    assert lines(256, 56) is None
    monkeypatch.setattr(algorithms.openmp, "threads", lambda: 4)
    assert lines(16, 56) == 2
    assert lines(16, 4) is None


def test_planes_are_not_gathered() -> None:
    """Their channels don't lie in pixels."""
    x, y = Value("x", (1, 32, 8, 8), 3), Value("y", (1, 32, 8, 8))
    operator = graph(CASES[0]).nodes[0].operator
    assert isinstance(operator, Convolution)
    ordered = dataclasses.replace(operator, order=tuple(reversed(range(32))))
    assert algorithms._ways(Node("y", ordered, (x,), y), ordered) == []
    assert algorithms._ways(Node("y", ordered, (y,), y), ordered) == [
        Way(), Way(2), Way(4), Way(4, 1)
    ]  # fmt: skip


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graph(CASES[0])
    for fastest in (None, *WAYS):
        monkeypatch.setattr(algorithms, "_fastest", lambda *_, answer=fastest: answer)
        chosen = algorithms.choose(whole, Library())
        (results,) = [n.operator for n in chosen.nodes if n.output in whole.outputs]
        kind = Convolution if fastest is None else Bands if fastest.lines else FromTiles
        assert isinstance(results, kind)


def test_never_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    assert len(algorithms.choose(graph(CASES[0]), Library()).nodes) == 1


@pytest.mark.parametrize(
    ("tiles", "channels", "rows"),
    [(16, 256, 17), (17, 256, 17), (64, 64, 65), (49, 64, 49), (4, 512, 5), (4, 1024, 4)],
)
def test_matrices_begin_on_different_lines_of_the_cache(
    tiles: int, channels: int, rows: int
) -> None:
    assert rows_for(tiles, channels) == rows
