"""The benchmark beside torch-pruning on a network so small that it takes seconds."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch_pruning")
from benchmarks import pruning

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 32), *conv(32, 64), *conv(64, 32),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

def data():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))

def test():
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, build().eval()(x).argmax(1)
"""


def test_both_networks_are_made_and_taught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_SECONDS", 0.1)
    net, written = tmp_path / "nets.py", tmp_path / "out.json"
    net.write_text(NET)
    arguments = ["--model", f"{net}:build", "--data", f"{net}:data", "--test", f"{net}:test"]
    arguments += ["--budget", "70%macs", "--target", "eager", "--recover", "1s", "--seeds", "1"]
    status = pruning.main([*arguments, "--json", str(written)])
    record = json.loads(written.read_text())
    (row,) = record["runs"]
    points = 100 * (row["ours"]["accuracy"] - row["torch-pruning"]["accuracy"])
    assert record["points_better"] == pytest.approx(points)
    assert status == int(points < 1)
    assert row["torch-pruning"]["macs"] < row["original"]["macs"]
    assert "torch-pruning" in capsys.readouterr().out
