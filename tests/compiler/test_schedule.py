"""Threads that run ahead of each other as far as the schedule lets them."""

import ctypes

import pytest
import torch
from compiler.build import Builder
from compiler.evaluate import evaluate
from compiler.random_graphs import graphs
from compiler.test_program import guarded
from compiler.test_winograd import CASES, graph, split
from hypothesis import given, settings

from groupconv.compiler import schedule
from groupconv.compiler.algorithms import Way
from groupconv.compiler.graph import Graph
from groupconv.compiler.library import Library
from groupconv.compiler.passes import optimize
from groupconv.compiler.program import Program
from groupconv.compiler.session import Run, Session

_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@pytest.fixture(autouse=True)
def _all_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    monkeypatch.setattr(schedule, "WORTH_SHARING", 0.0)


def check(whole: Graph, threads: int = 3, expected: Graph | None = None) -> None:
    """Whichever thread is the first to run as far as it may, the outputs are the same."""
    program = Program(whole, Library())
    inputs = [torch.empty_like(x).copy_(torch.randn(x.shape)) for x in program.example()]
    correct = evaluate(expected or whole, [x.double() for x in inputs])
    for order in (range(threads), reversed(range(threads))):
        found = _run(guarded(program, threads), inputs, list(order))
        for y, z in zip(found, correct, strict=True):
            assert (y - z).abs().max().item() <= 1e-4 * max(1.0, z.abs().max().item())


def _run(session: Session, inputs: list[torch.Tensor], order: list[int]) -> list[torch.Tensor]:
    """All that a thread does before it must wait, then all of the next one."""
    frame = session._begin(inputs)
    for part in session.parts:
        if not isinstance(part, Run):
            frame.call(part)
            continue
        waiting: list[tuple[int, int, int]] = []
        for function, record, threads, meet in session.steps[part.first : part.stop].tolist():
            waiting.append((function, record, threads))
            if meet:
                _advance(waiting, order)
                waiting = []
        _advance(waiting, order)
    return frame.results()


def _advance(steps: list[tuple[int, int, int]], order: list[int]) -> None:
    for thread in order:
        for function, record, threads in steps:
            if thread < threads:
                _WORK(function)(record, thread, threads)


def meetings(whole: Graph, threads: int = 2) -> list[bool]:
    session = guarded(Program(whole, Library()), threads)
    return [bool(meet) for *_, meet in session.steps.tolist()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs(whole: Graph) -> None:
    check(whole)
    check(optimize(whole))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("way", [Way(4), Way(4, 1)])
def test_winograd(case: tuple, residual: str | None, way: Way) -> None:
    whole = graph(case, "relu", residual)
    check(split(whole, way), expected=whole)


def test_one_step_after_another_meets() -> None:
    b = Builder((1, 8, 6, 6))
    y = b.conv(b.conv(b.inputs[0], 8, 3, padding=1), 8, 3, padding=1)
    assert meetings(b.graph(y)) == [True, False]


def test_parts_of_a_concatenation_do_not() -> None:
    b = Builder((1, 8, 6, 6))
    x = b.conv(b.inputs[0], 8, 1, padding=0)
    y = b.concat(b.conv(x, 8, 1, padding=0), b.conv(x, 8, 3, padding=1))
    assert meetings(b.graph(b.conv(y, 4, 1, padding=0))) == [True, False, True, False]


def test_rows_seen_as_longer_ones_are_the_same_memory() -> None:
    """The slice begins where the channels of the first row end: it is the second row."""
    b = Builder((2, 6))
    rows = b.linear(b.inputs[0], 4)
    _, second = b.split(b.view(rows, (1, 8)), 4)
    assert meetings(b.graph(b.linear(second, 3))) == [True, False]


def test_phases_of_a_transposed_convolution_do_not() -> None:
    b = Builder((1, 8, 6, 6))
    y = b.conv(b.inputs[0], 8, 4, stride=2, padding=1, transposed=True)
    assert meetings(b.graph(y)) == [False] * 4


def test_what_one_thread_does_alone_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "WORTH_SHARING", 1.0)
    b = Builder((1, 8, 6, 6))
    y = b.conv(b.conv(b.inputs[0], 8, 3, padding=1), 8, 3, padding=1)
    assert meetings(b.graph(y)) == [False, False]
