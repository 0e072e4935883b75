"""The clock: who is called when and how often, and what is made of the samples."""

import itertools
import json

import pytest
import torch
from torch import nn

from groupconv import timing
from groupconv.errors import ArgumentError
from groupconv.targets import get_target
from groupconv.timing import Timing, interleave, machine


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_calls_take_turns() -> None:
    calls: list[str] = []
    result = interleave(
        {name: lambda name=name: calls.append(name) for name in "AB"}, seconds=0, min_runs=3
    )
    # Twice untimed, then in turn.
    assert "".join(calls) == "AABB" + 3 * "AB"
    assert list(result) == ["A", "B"]
    assert [t.runs for t in result.values()] == [3, 3]


@pytest.mark.parametrize(
    ("seconds", "runs"),
    # Each round takes three seconds of the fake clock; a round begun is finished.
    [(0, 5), (15.5, 6), (30, 11), (1000, 20)],
)
def test_number_of_runs(clock: Clock, seconds: float, runs: int) -> None:
    def wait(duration: float) -> None:
        clock.now += duration

    result = interleave(
        {"short": lambda: wait(1), "long": lambda: wait(2)}, seconds=seconds, max_runs=20
    )
    assert result == {"short": Timing(1, 1, 1, runs), "long": Timing(2, 2, 2, runs)}


def test_workers_of_one_call_are_waited_for(clock: Clock) -> None:
    """An untimed pass wakes those of the next, which is timed for as long as they rested."""
    calls: list[tuple[str, float]] = []

    def call(name: str) -> None:
        calls.append((name, clock.now))
        clock.now += 2

    result = interleave(
        {name: lambda name=name: call(name) for name in "AB"}, seconds=0, min_runs=2, rest=5
    )
    names = "".join(name for name, _ in calls)
    assert names == "AABB" + 2 * "AAAABBBB"
    assert result["A"] == Timing(2, 2, 2, 6)
    starts = [now for _, now in calls]
    assert starts[4] - starts[3] == 2 + 5
    assert starts[8] - starts[7] == 2 + 5


def test_a_turn_of_many_passes(clock: Clock) -> None:
    """After one untimed pass, as many as its time has room for; the next is not waited for."""
    calls: list[tuple[str, float]] = []

    def call(name: str) -> None:
        calls.append((name, clock.now))
        clock.now += 2

    result = interleave(
        {name: lambda name=name: call(name) for name in "AB"}, seconds=0, min_runs=2, turn=5
    )
    assert "".join(name for name, _ in calls) == "AABB" + 2 * "AAAABBBB"
    assert result["B"] == Timing(2, 2, 2, 6)
    assert {later - now for (_, now), (_, later) in itertools.pairwise(calls)} == {2}


def test_what_happens_between_two_passes() -> None:
    """Is done before each timed pass; the turn begins with a pass that is not timed."""
    calls: list[str] = []
    result = interleave(
        {name: lambda name=name: calls.append(name) for name in "AB"},
        seconds=0,
        min_runs=2,
        between=lambda: calls.append("-"),
    )
    assert "".join(calls) == "AABB" + 2 * "A-AB-B"
    assert result["A"].runs == 2


def test_a_slow_first_call_is_not_counted(clock: Clock) -> None:
    durations = iter([500.0, 400.0, 3.0, 1.0, 2.0, 5.0, 4.0])

    def wait() -> None:
        clock.now += next(durations)

    assert interleave({"only": wait}, max_runs=5) == {"only": Timing(3, 2, 4, 5)}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([7.0], (7, 7, 7, 1)),
        ([1.0, 2.0], (1.5, 1.25, 1.75, 2)),
        ([4.0, 1.0, 3.0, 2.0, 100.0], (3, 2, 4, 5)),
        ([1.0, 2.0, 3.0, 4.0], (2.5, 1.75, 3.25, 4)),
    ],
)
def test_quartiles(samples: list[float], expected: tuple[float, ...]) -> None:
    assert Timing.of(samples) == Timing(*expected)


def test_a_failing_call_is_heard() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"fine": lambda: None, "broken": fail})


def test_machine() -> None:
    described = machine()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert machine() == {**described, "threads": before + 1}
    finally:
        torch.set_num_threads(before)
    assert machine() == described


def test_eager_target() -> None:
    target = get_target("eager")
    assert target.why_not() is None
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    out = target.build(layer, (x,))()
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, layer(x))
    assert out.is_inference()


def test_unknown_and_unusable_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="target='abacus' must be one of eager"):
        get_target("abacus")
    monkeypatch.setattr(type(get_target("eager")), "why_not", lambda self: "it is Sunday")
    with pytest.raises(ArgumentError, match="target='eager' can't be used here: it is Sunday"):
        get_target("eager")
