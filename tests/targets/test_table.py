"""The table of times: kept, read again, and thrown away where it doesn't apply."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from groupconv.targets import table as table_module
from groupconv.targets.eager import Eager
from groupconv.targets.table import LatencyTable
from groupconv.timing import Timing


class Recorder:
    """Makes callables to time, and remembers what was asked for."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.called: list[str] = []

    def __call__(self, *names: str) -> dict[str, Callable[[], Callable[[], object]]]:
        def build(name: str) -> Callable[[], object]:
            self.built.append(name)
            return lambda: self.called.append(name)

        return {name: lambda name=name: build(name) for name in names}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table that holds A and B."""
    file = tmp_path / "latency.json"
    LatencyTable(Eager(), file).measure(Recorder()("A", "B"), seconds=0)
    return file


def test_measured_once_and_kept(path: Path) -> None:
    stored = json.loads(path.read_text())
    (stored,) = stored["tables"]
    assert list(stored["times"]) == ["A", "B"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again, recorder = LatencyTable(Eager(), path), Recorder()
    times = again.measure(recorder("B", "A"), seconds=0)
    assert times == {name: Timing(**stored["times"][name]) for name in "BA"}
    assert list(times) == ["B", "A"]
    assert recorder.built == recorder.called == []
    assert again.reused == {"A", "B"}


def test_those_compared_are_timed_together(path: Path) -> None:
    again, recorder = LatencyTable(Eager(), path), Recorder()
    times = again.measure(recorder("A", "new"), seconds=0)
    assert recorder.built == ["A", "new"]
    turns = "".join(name[0] for name in recorder.called)
    assert turns == "AAnn" + "An" * times["A"].runs
    assert again.reused == {"B"}
    assert LatencyTable(Eager(), path).times == {**times, "B": again.times["B"]}


def test_time_is_spent_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def interleave(calls: dict[str, object], *, seconds: float, **_: object) -> dict[str, Timing]:
        asked.append(seconds)
        return {name: Timing(1, 1, 1, 5) for name in calls}

    monkeypatch.setattr(table_module, "interleave", interleave)
    LatencyTable(Eager()).measure(Recorder()("A", "B", "C"), seconds=0.5)
    assert asked == [1.5]


@pytest.mark.parametrize(
    ("medians", "kept", "anyway"),
    [([1.4], 1.4, "0"), ([100, 1.2], 1.2, "0"), ([100, 3, 50, 7], 3, "0"), ([100], 100, "1")],
    ids=["quiet", "disturbed once", "never quiet", "nobody minds"],
)
def test_a_disturbed_run_is_repeated(
    medians: list[float],
    kept: float,
    anyway: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of it, so that those compared are still from one run; the quietest counts."""
    runs = iter(medians)
    monkeypatch.setenv("GROUPCONV_BUSY", anyway)

    def interleave(calls: dict[str, object], **_: object) -> dict[str, Timing]:
        return {"A": Timing(1, 1, 1, 5), "B": Timing(next(runs), 1, 200, 5)}

    monkeypatch.setattr(table_module, "interleave", interleave)
    times = LatencyTable(Eager()).measure(Recorder()("A", "B"), seconds=0.5)
    assert times["B"].median == kept
    assert next(runs, None) is None
    assert ("other programs use the processor" in caplog.text) == (kept > 1.5)


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table, recorder = LatencyTable(Eager()), Recorder()
    first = table.measure(recorder("A"), seconds=0)
    assert table.measure(recorder("A"), seconds=0) == first
    assert recorder.built == ["A"]
    assert table.reused == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["processor", "threads", "torch", "target", "version"])
def test_times_of_elsewhere_are_kept_and_not_used(path: Path, key: str) -> None:
    stored = json.loads(path.read_text())
    stored["tables"][0]["where"][key] = "another"
    path.write_text(json.dumps(stored))
    table = LatencyTable(Eager(), path)
    assert (table.times, table.reused) == ({}, set())
    table.measure(Recorder()("A"), seconds=0)
    assert list(LatencyTable(Eager(), path).times) == ["A"]
    assert stored["tables"][0] in json.loads(path.read_text())["tables"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"times": {}}', b'{"tables": [{"times": {}}]}'),
        b'{"tables": [{"times": [], "where": {}}]}',
        b'{"tables": [{"times": {"A": 3}, "where": {}}]}',
        b'{"tables": [{"times": {"A": {"median": 1}}, "where": {}}]}',
    ],
)
def test_broken_file(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        table = LatencyTable(Eager(), path)
    assert f"{path} is not a table of times" in caplog.text
    assert table.times == {}
    recorder = Recorder()
    table.measure(recorder("A"), seconds=0)
    assert recorder.built == ["A"]
    assert list(LatencyTable(Eager(), path).times) == ["A"]
