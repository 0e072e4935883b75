"""Whole programs: what their native code computes, in memory that shows every wrong access."""

import pytest
import torch
from compiler.build import Builder
from compiler.evaluate import evaluate
from compiler.random_graphs import graphs
from hypothesis import given, settings
from torch import nn

import groupconv
from groupconv.compiler.graph import Graph
from groupconv.compiler.library import Library
from groupconv.compiler.passes import optimize
from groupconv.compiler.program import Program
from groupconv.compiler.session import Session

_MARGIN = 64


@pytest.fixture(autouse=True)
def _first_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")


def check(graph: Graph, threads: int = 1, expected: Graph | None = None) -> None:
    """The outputs of the graph's program against PyTorch in float64; guards and poison around.

    Args:
        expected: a graph that computes the same, where this one is not one of PyTorch's operators.
    """
    program = Program(graph, Library())
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
        for x in program.example()
    ]
    session = guarded(program, threads)
    arena = session.arena
    found = session(inputs)
    assert session.whole[:_MARGIN].isnan().all(), "written before the arena"
    assert session.whole[_MARGIN + len(arena) :].isnan().all(), "written past the arena"
    correct = evaluate(expected or graph, [x.double() for x in inputs])
    for y, z in zip(found, correct, strict=True):
        assert y.shape == z.shape
        scale = max(1.0, z.abs().max().item()) if z.numel() else 1.0
        assert (y - z).abs().max().item() <= 1e-4 * scale


def guarded(program: Program, threads: int) -> Session:
    """A session whose arena is full of NaN, and lies in the middle of more of it."""
    size = max(1, program.memory.arena // 4)
    whole = torch.full((size + 2 * _MARGIN,), torch.nan)
    arena = whole[_MARGIN : _MARGIN + size]
    session = Session(program.graph, program.memory, program.steps, threads, arena)
    session.whole = whole
    return session


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs(graph: Graph) -> None:
    check(graph)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs_after_all_passes(graph: Graph) -> None:
    check(optimize(graph))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs())
def test_many_random_graphs(graph: Graph) -> None:
    check(graph)
    check(optimize(graph))


@pytest.mark.parametrize(("size", "alone"), [(4, True), (64, False)])
def test_little_work_does_not_wake_other_threads(size: int, alone: bool) -> None:
    b = Builder((1, 32, size, size))
    program = Program(b.graph(b.conv(b.inputs[0], 32, 3)), Library())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert program.session().threads == (1 if alone else 2)
    finally:
        torch.set_num_threads(before)


class Cumulative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def test_what_pytorch_runs_counts_as_much_work() -> None:
    """How long it takes isn't known."""
    compiled = groupconv.compile(Cumulative().eval(), torch.zeros(1, 4))
    assert not compiled.program(torch.zeros(1, 4)).alone
