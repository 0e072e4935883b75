"""Where a result comes from: it counts only with this beside it."""

import subprocess
from pathlib import Path
from typing import Any


def commit() -> dict[str, Any]:
    """The commit of this repository, and whether files were changed since."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
