"""``groupconv report``: what a finished run found, shown again."""

import json as files
from pathlib import Path
from typing import Annotated, Any

import typer

from groupconv.cli.console import JsonFlag
from groupconv.cli.outcome import show_result, show_sweep
from groupconv.errors import DataError
from groupconv.optimize.plan import REPORT
from groupconv.optimize.sweep import FRONTIER


def report(
    folder: Annotated[Path, typer.Argument(help="That optimize, apply or recover wrote.")],
    json: JsonFlag = False,
) -> None:
    """Show the figures of a finished run, or of a sweep."""
    path = next((folder / name for name in (REPORT, FRONTIER) if (folder / name).exists()), None)
    if path is None:
        raise DataError(f"{folder}: neither {REPORT} nor {FRONTIER} is there: no run has finished")
    found = _read(path)
    if path.name == REPORT:
        show_result(found, folder, json)
    else:
        show_sweep(found, folder, json)


def _read(path: Path) -> Any:
    try:
        return files.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, files.JSONDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
