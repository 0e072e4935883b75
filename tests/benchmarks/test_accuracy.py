"""The accuracy benchmark on a network so small that it takes seconds."""

import json
from pathlib import Path

import pytest

from benchmarks import accuracy

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 16), *conv(16, 32), *conv(32, 16),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def data():
    return torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(1))

def test():
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, build().eval()(x).argmax(1)
"""


def row(value: float, time: float = 0.5) -> dict[str, float]:
    return {"accuracy": value, "time": time}


def test_ours_must_be_above_every_baseline_for_every_seed() -> None:
    best = {"ours": [row(0.72), row(0.70)], "other": [row(0.69), row(0.66)]}
    assert accuracy._ours_is_best(best)
    assert not accuracy._ours_is_best(best | {"third": [row(0.1), row(0.705)]})
    assert accuracy._ours_is_best(best | {"slower": [row(0.75, time=0.6)] * 2})
    assert accuracy._ours_is_best(best | {"fourth": [{"why_not": "no pruning meets it"}] * 2})
    # Where it is much faster nobody knows how accurate it would be at our time.
    assert not accuracy._ours_is_best(best | {"faster": [row(0.6), row(0.6, time=0.4)]})


def test_a_record_carries_machine_and_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = tmp_path / "tiny.py", tmp_path / "out.json"
    net.write_text(NET)
    status = accuracy.main(
        ["--model", f"{net}:build", "--data", f"{net}:data", "--test", f"{net}:test",
         "--budget", "60%macs", "--target", "eager", "--keep", "first", "--seeds", "1",
         "--json", str(out)]
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert status in (0, 1)
    assert status == int(not accuracy._ours_is_best(record["runs"]))
    assert record["original_accuracy"] == 1.0
    assert record["machine"]["processor"]
    assert len(record["commit"]) == 40
    ours = next(iter(record["runs"].values()))[0]
    assert ours["share"] <= 0.6
    assert "not refitted" in capsys.readouterr().out
