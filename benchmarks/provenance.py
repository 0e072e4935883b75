"""Where a result comes from: it counts only with this beside it."""

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def commit() -> dict[str, Any]:
    """The commit of this repository, and whether files were changed since."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of this package and of ``libraries``, "missing" where one isn't installed."""
    found = {}
    for name in ("groupconv", *libraries):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
