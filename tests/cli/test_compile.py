"""The verb compile: a checked network in a file, its report, and clear errors."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

import groupconv
from groupconv.cli.models import load_function
from groupconv.compiler.compiled import Compiled

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )
class Sums(nn.Module):
    def forward(self, x):
        return {"sums": x.cumsum(2), "none": x[:, :0]}
def parts():
    return Sums()
class Choice(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1
def choice():
    return Choice()
class Undefined(nn.Module):
    def forward(self, x):
        return (x - x) / (x - x)
def undefined():
    return Undefined()
"""


@pytest.fixture
def run(command: Run, tmp_path: Path) -> Run:
    (tmp_path / "net.py").write_text(NETWORK)
    return functools.partial(command, "compile")


def test_for_people(run: Run) -> None:
    status, out, err = run("net.py:build", "net.gcn", "--shape", "2,3,9,11")
    assert (status, out) == (0, "")
    first, last = err.splitlines()
    assert " native steps, 0 by PyTorch; " in first
    assert last.endswith("of the largest number; written to net.gcn")
    x = torch.randn(2, 3, 9, 11)
    model = load_function("net.py:build")().eval()
    torch.testing.assert_close(groupconv.load_compiled("net.gcn")(x), model(x).detach())


def test_as_json(run: Run, tmp_path: Path) -> None:
    status, out, err = run("net.py:parts", "sums", "--shape", "1x2x5x5", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["out"] == "sums"
    assert found["error"] == 0
    assert found.keys() == {"out", "error", "tasks", "cuts", "seconds", "arena", "weights"}
    (cut,) = [cut for cut in found["cuts"] if "cumsum" in cut["operator"]]
    assert "not native" in cut["reason"]
    assert cut["seconds"] > 0
    assert (tmp_path / "sums").exists()


def test_weights_are_loaded(run: Run) -> None:
    model = load_function("net.py:build")().eval()
    model[0].weight.data.mul_(3)
    torch.save(model.state_dict(), "weights.pth")
    status, _, _ = run("net.py:build", "out", "--weights", "weights.pth", "--shape", "1,3,8,8")
    assert status == 0
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(groupconv.load_compiled("out")(x), model(x).detach())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["net.py:gone", "out"], 2, "no function 'gone'"),
        (["net.py:build"], 2, "Missing argument"),
        (["net.py:build", "out", "--shape", "1,three"], 2, "shape='1,three'"),
        (["net.py:build", "out", "--shape", "1,4,9,9"], 2, "the model can't run on shape=1,4,9,9"),
        (["net.py:build", "missing/out"], 2, "there is no folder 'missing'"),
        (["net.py:build", ".", "--shape", "1,3,9,9"], 1, "can't be written"),
        (["net.py:choice", "out", "--shape", "1,3,9,9"], 1, "can't be recorded"),
        (["net.py:undefined", "out", "--shape", "1,3,9,9"], 1, "differs from PyTorch by nan"),
        (["net.py:build", "out", "--weights", "gone.pth"], 1, "weights='gone.pth'"),
    ],
)
@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_errors(
    flag: list[str], arguments: list[str], status: int, message: str, run: Run, tmp_path: Path
) -> None:
    found, out, err = run(*arguments, *flag)
    assert found == status
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    if out:
        json.loads(out, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_wrong_network_is_not_saved(
    flag: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Compiled.forward

    def wrong(self: Compiled, x: torch.Tensor) -> Any:
        y = forward(self, x)
        y[0, -1] += 0.1 * y.abs().max()
        return y

    monkeypatch.setattr(Compiled, "forward", wrong)
    status, _, err = run("net.py:build", "out", "--shape", "1,3,9,9", *flag)
    assert status == 1
    assert "differs from PyTorch by" in err
    assert "not saved" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
