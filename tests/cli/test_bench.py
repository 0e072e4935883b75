"""The verb bench: table, JSON and picture."""

import functools
import json
from pathlib import Path

import pytest
import torch
from commands import Run

NAMES = ("--target", "native", "--target", "eager")


@pytest.fixture
def run(command: Run, tmp_path: Path) -> Run:
    (tmp_path / "net.py").write_text("from networks import residual as build\n")
    return functools.partial(command, "bench", "net.py:build")


def test_for_people(run: Run, tmp_path: Path) -> None:
    code, out, err = run(*NAMES, "--shape", "2,3,8,8", "--seconds", "0", "--out", "found")
    assert (code, out) == (0, "")
    for word in ("net.py:build, 2x3x8x8", "native", "eager", "images/s", "memory MB"):
        assert word in err
    picture = (tmp_path / "found" / "bench.svg").read_text()
    assert picture.startswith("<svg")
    found = json.loads((tmp_path / "found" / "bench.json").read_text())
    assert found["network"] == "net.py:build"
    assert [row["target"] for row in found["results"]] == ["native", "eager"]


def test_json(run: Run) -> None:
    before = torch.get_num_threads()
    try:
        code, out, _ = run(
            "--target", "native", "--shape", "1,3,8,8", "--seconds", "0", "--threads", "1", "--json"
        )
    finally:
        torch.set_num_threads(before)
    found = json.loads(out)
    assert code == 0
    assert found["machine"]["threads"] == 1
    assert found["results"][0]["agreement"]["largest"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "abacus"), "'abacus' must be one of"),
        (("--threads", "0"), "threads=0 must be 1 or more"),
        (("--batch", "0"), "batch=0 must be 1 or more"),
    ],
)
def test_wrong_arguments(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
