"""Whether the machine is free: what is counted, who is waited for, when it is refused."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from groupconv import busy
from groupconv.errors import BusyError

HZ = os.sysconf("SC_CLK_TCK")


class Machine:
    """Two cores of ours and one of others, which tell of a clock that only sleeping moves."""

    def __init__(self, stat: Path) -> None:
        self.stat, self.now = stat, 50.0
        # Cores that others use, one number for each look.
        self.others: Iterator[float] = iter(())
        self.own = 0.0
        self.used = [0.0, 0.0]
        self._write()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.used[0] += seconds * (next(self.others) + self.own)
        self._write()

    def times(self) -> os.times_result:
        return os.times_result((self.own * self.now, 0.0, 0.0, 0.0, 0.0))

    def _write(self) -> None:
        rows = ["cpu  9 9 9 9 9 9 9 9 0 0"]
        rows += [f"cpu{i} {round(t * HZ)} 0 0 77 88 0 0 0 0 0" for i, t in enumerate(self.used)]
        rows += [f"cpu2 {round(self.now * HZ)} 0 0 0 0 0 0 0 0 0", "intr 12 0"]
        self.stat.write_text("\n".join(rows))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path / "stat")
    monkeypatch.delenv("GROUPCONV_BUSY")
    monkeypatch.setattr(busy, "time", found)
    monkeypatch.setattr(busy, "_STAT", found.stat)
    monkeypatch.setattr(busy.os, "times", found.times)
    monkeypatch.setattr(busy.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return found


@pytest.mark.parametrize("own", [0.0, 2.0])
def test_idle(machine: Machine, own: float) -> None:
    """What this process uses counts as free."""
    machine.own, machine.others = own, iter([0.2])
    busy.require_quiet()


def test_waits_until_it_is_free(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.others = iter([1.0, 0.8, 0.0])
    with caplog.at_level(logging.INFO):
        busy.require_quiet()
    assert next(machine.others, None) is None
    assert [r.message for r in caplog.records] == [
        "others use this machine, waiting: 1.0 cores are idle"
    ]


def test_refused_in_the_end(machine: Machine) -> None:
    machine.others = iter([1.0] * 1000)
    with pytest.raises(BusyError, match=r"1\.0 of 2 cores are idle.*2 threads.*GROUPCONV_BUSY=1"):
        busy.require_quiet()
    assert 15 < machine.now - 50 < 16


def test_another_core_is_enough_for_one_thread(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    machine.others = iter([1.0])
    busy.require_quiet()


def test_told_to_measure_all_the_same(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_BUSY", "1")
    busy.require_quiet()
    assert machine.now == 50


def test_a_system_that_does_not_tell(machine: Machine) -> None:
    machine.stat.unlink()
    busy.require_quiet()
    assert machine.now == 50
