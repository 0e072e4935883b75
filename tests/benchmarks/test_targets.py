"""The benchmark of targets: what holds and what does not, and a run in two runtimes."""

import json
from pathlib import Path

import pytest

from benchmarks import targets
from benchmarks.targets import ORIGINAL, Row
from groupconv.timing import Timing

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 64), *conv(64, 64), *conv(64, 64), *conv(64, 64),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))

def data():
    return torch.randn(48, 3, 24, 24, generator=torch.Generator().manual_seed(1))
"""


def row(own: float, other: float, predicted: float, other_macs: int = 7) -> Row:
    times = {"a": own, "b": other, ORIGINAL: 1.0}
    macs = {"a": 7, "b": other_macs, ORIGINAL: 20}
    timings = {name: Timing(2e-3 * t, 2e-3 * t, 2e-3 * t, 5) for name, t in times.items()}
    return Row("a", 0.7, {"layer": "groups=4"}, predicted, timings, macs)


def test_what_holds() -> None:
    assert row(0.5, 0.5, 0.5).faults(0.5) == []
    assert row(0.52, 0.51, 0.48).faults(0.5) == []
    # A plan that was asked for more.
    assert row(0.5, 0.2, 0.5, other_macs=3).faults(0.5) == []


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (row(0.5, 0.48, 0.5), "a: the plan for b takes 48.0%, the own one 50.0%"),
        (row(0.53, 0.6, 0.5), "a: 53.0% of the original's time, 50.0% are allowed"),
        (row(0.5, 0.5, 0.45), "a: 50.0% of the original's time, 45.0% were predicted"),
        (row(0.5, 0.5, 0.56), "a: 50.0% of the original's time, 56.0% were predicted"),
    ],
)
def test_what_does_not(found: Row, fault: str) -> None:
    assert found.faults(0.5) == [fault]
    # A budget in milliseconds is held when the plan is made.
    assert found.faults(None) == ([] if "allowed" in fault else [fault])


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "net.py:build", "--data", "net.py:data", "--test", "net.py:data"]
    options = ["--budget", "1.2x", "--targets", "eager,native", "--seconds", "0.1"]
    status = targets.main([*arguments, *options, "--json", "out.json"])
    record = json.loads((tmp_path / "out.json").read_text())
    assert status == bool(record["faults"])
    assert [r["target"] for r in record["rows"]] == ["eager", "native"]
    for found in record["rows"]:
        assert found["times"].keys() == {ORIGINAL, "eager", "native"}
        assert set(found["groups"].values()) != {"dense"}
        assert 0 < found["predicted"] < 1 / 1.1


def test_arguments() -> None:
    with pytest.raises(SystemExit):
        targets.main(["--model", "a", "--data", "b", "--test", "c", "--budget", "50%macs"])
