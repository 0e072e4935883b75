"""What is shown and recorded of a long run."""

import io
import json
import logging
import sys
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from groupconv import events
from groupconv.cli import watch
from groupconv.cli.watch import watching
from groupconv.errors import ArgumentError, DataError


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(watch, "people", console)
    return console


def learn() -> None:
    log = logging.getLogger("groupconv.test")
    log.info("said in passing")
    for _ in events.followed("distil", range(3), 3):
        pass
    events.tell("scalars", step="distil", at=3, loss=0.5, score=0.25)
    log.warning("a loss")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_kept_in_a_file(screen: Console, tmp_path: Path) -> None:
    """Each with its time; of progress the beginning and the end; a second run adds its own."""
    for _ in range(2):
        with watching(tmp_path / "out"):
            learn()
    kept = lines(tmp_path / "out" / "events.jsonl")
    times = [datetime.fromisoformat(line.pop("time")) for line in kept]
    assert times == sorted(times)
    assert times[0].utcoffset() is not None
    assert kept == 2 * [
        {"event": "progress", "step": "distil", "done": 0, "total": 3},
        {"event": "progress", "step": "distil", "done": 3, "total": 3},
        {"event": "scalars", "step": "distil", "at": 3, "loss": 0.5, "score": 0.25},
    ]
    events.tell("scalars", step="later", at=1)
    assert len(lines(tmp_path / "out" / "events.jsonl")) == len(kept)


def test_progress_is_shown(screen: Console, tmp_path: Path) -> None:
    with watching(tmp_path):
        learn()
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "distil" in shown
    assert "said in passing" in shown


def test_quiet(screen: Console, tmp_path: Path) -> None:
    """What goes wrong is still heard, and the file has all."""
    with watching(tmp_path, quiet=True):
        learn()
    assert isinstance(screen.file, io.StringIO)
    assert "a loss" in screen.file.getvalue()
    assert "said" not in screen.file.getvalue()
    assert "distil" not in screen.file.getvalue()
    assert len(lines(tmp_path / "events.jsonl")) == 3


def test_scalars_for_tensorboard(screen: Console, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with watching(tmp_path, tensorboard=True):
        learn()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["distil/loss", "distil/score"]
    (score,) = found.Scalars("distil/score")
    assert (score.step, score.value) == (3, 0.25)


def test_tensorboard_is_missing(
    screen: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(ArgumentError, match=r"pip install 'groupconv\[train\]'"),
        watching(tmp_path, tensorboard=True),
    ):
        pass


def test_stopped_by_hand(screen: Console, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), watching(tmp_path):
        raise KeyboardInterrupt
    assert isinstance(screen.file, io.StringIO)
    assert "the same command goes on from here" in screen.file.getvalue()


def test_a_folder_that_can_not_be_written(screen: Console, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="can't be written"), watching(tmp_path / "out"):
        pass
