"""A long run takes no more memory than a short one."""

import copy
import statistics
from typing import Any

import psutil
import pytest
import torch
from networks import images, residual

import groupconv
from groupconv import events
from groupconv.recovery import engine


def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was kept at each step would add 50 MB."""
    x = torch.nn.functional.interpolate(images(256), size=(24, 24))
    teacher = residual(channels=4)
    student = copy.deepcopy(teacher)
    used: list[int] = []

    def look(kind: str, values: dict[str, Any]) -> None:
        if kind == "progress":
            used.append(psutil.Process().memory_info().rss)

    monkeypatch.setattr(engine._Run, "_planned", lambda self, seconds: (160, 8))
    with events.listening(look):
        groupconv.recover(student, teacher, x, groupconv.Recovery("1h", learning_rate=1e-3))
    assert len(used) == 160
    grown = statistics.median(used[-20:]) - statistics.median(used[40:60])
    assert grown < 16e6, f"{grown / 1e6:.1f} MB more"
