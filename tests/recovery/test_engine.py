"""When learning ends, and with which weights."""

from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groupconv import events
from groupconv.recovery.engine import Learned, Lesson, learn
from groupconv.store import Store


def run(scores: Iterable[float], folder: Path, *, steps: int, checks: int, batch: int) -> Learned:
    """A stage of so many steps and scores, which are given; the first is that of the beginning."""
    store, given = Store(folder, "run"), iter(scores)
    store.write("stage steps", [steps, checks])
    lesson = Lesson(
        loss=lambda net, images, labels, generator: net(images).square().mean(),
        score=lambda net: next(given),
        loader=DataLoader(TensorDataset(torch.randn(2 * batch, 2)), batch),
        labelled=False,
        teacher=nn.Linear(2, 2),
        frozen=False,
    )
    return learn(
        "stage", nn.Linear(2, 2), lesson, seconds=60, learning_rate=None, sync_batch_norm=False,
        seed=0, store=store,
    )  # fmt: skip


def learned(scores: Sequence[float], folder: Path) -> Learned:
    """Of 40 steps, scored before them and after every second one as given."""
    return run(scores, folder, steps=40, checks=20, batch=4)


def test_the_first_half_is_learned_whatever_the_scores(tmp_path: Path) -> None:
    """Fifteen scores above the beginning, which cost nothing: it comes back at the end."""
    found = learned([1.0, *[2.0] * 14, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], tmp_path)
    assert found == Learned(40, 40, 40, before=1.0, after=0.4, stopped=None)


def test_five_scores_without_a_lower_one_end_the_second_half(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = learned([1.0, 0.5, *[0.6] * 19], tmp_path)
    why = "no lower loss in 5 checks, at step 30"
    assert found == Learned(30, 40, 2, before=1.0, after=0.5, stopped=why)
    assert f"stage ends early, with the weights of step 2: {why}" in caplog.text


def test_a_lower_score_is_waited_for_anew(tmp_path: Path) -> None:
    found = learned([1.0, 0.5, *[0.6] * 12, 0.4, *[0.45] * 6], tmp_path)
    assert found.best == 28
    assert found.stopped == "no lower loss in 5 checks, at step 38"


def test_small_batches_take_small_steps(tmp_path: Path) -> None:
    def rate(batch: int) -> float:
        """After half of 500 steps, from a loss of 1."""
        found: list[float] = []

        def hear(kind: str, values: dict[str, Any]) -> None:
            if kind == "scalars":
                found.append(values["rate"])

        folder = tmp_path / str(batch)
        folder.mkdir(exist_ok=True)
        with events.listening(hear):
            run(repeat(1.0), folder, steps=500, checks=2, batch=batch)
        return found[0]

    assert rate(16) == pytest.approx(rate(64) / 4)
    assert rate(128) == pytest.approx(rate(64))
