"""The examples of the README, and of the compiler's page, run as written."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 18
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not counted" in done.stdout.lower()
    assert (tmp_path / "optimized" / "report.html").exists()


def test_examples_of_the_compiler_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/compiler.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "native steps, 0 by PyTorch" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"resnet18.gcn", "profile.png"}


def test_what_and_install_come_first() -> None:
    opening = "\n".join(README.read_text().splitlines()[:40])
    assert "pip install -e . && groupconv demo" in opening
    assert 'pip install -e ".[test]" && OMP_NUM_THREADS=1 pytest -n 2' in opening
    assert "```python" in opening
