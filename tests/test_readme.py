"""The example of the README runs as written."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 18
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not counted" in done.stdout.lower()
    assert (tmp_path / "optimized" / "report.html").exists()


def test_what_and_install_come_first() -> None:
    opening = "\n".join(README.read_text().splitlines()[:40])
    assert "pip install -e . && groupconv demo" in opening
    assert 'pip install -e ".[test]" && pytest' in opening
    assert "```python" in opening
