"""The command, in this process."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Run

from groupconv.cli import main


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs ``groupconv`` with some arguments, in ``tmp_path``; what native code prints counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["groupconv", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    yield call
    logging.getLogger("groupconv").handlers.clear()
