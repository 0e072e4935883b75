"""The command line: what it prints where, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
def loader():
    return torch.utils.data.DataLoader(torch.randn(32, 3, 12, 12), batch_size=8)
def nothing():
    return 3
"""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "groupconv", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def test_optimize_prints_one_json_object_and_writes_the_folder(work: Path) -> None:
    done = run("optimize", "--model", "net.py:build", "--data", "net.py:loader",
               "--budget", "60%macs", "--keep", "0", "--out", "out", "--json",
               cwd=work)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    for key in ("accuracy", "latency", "macs", "params"):
        assert report[key].keys() == {"before", "after"}
    written = {p.name for p in (work / "out").iterdir()}
    assert written == {
        "events.jsonl", "latency.json", "model.safetensors", "plan.json", "report.html",
        "report.json",
    }  # fmt: skip
    again = run("optimize", "--model", "net.py:build", "--data", "net.py:loader",
                "--budget", "60%macs", "--keep", "0", "--out", "out", cwd=work)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout == ""
    assert "reusing" in again.stderr


def test_profile_as_table_and_as_json(work: Path) -> None:
    done = run("profile", "net.py:build", "--shape", "1,3,12,12", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "groups" in done.stdout + done.stderr
    assert "bias not counted" in done.stdout + done.stderr
    done = run("profile", "net.py:build", "--shape", "1x3x12x12", "--json", cwd=work)
    assert json.loads(done.stdout)["macs"] == 8 * 27 * 100 + 8 * 72 * 64


def test_trace_as_table_and_as_json(work: Path) -> None:
    done = run("trace", "net.py:build", "--shape", "1,3,12,12", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["skipped"] == {}
    first, second = found["convolutions"][:2]
    assert first["output_spaces"] == second["input_spaces"]
    assert {s["fixed"] for s in found["spaces"]} == {
        None, "input of the network", "output of the network"
    }  # fmt: skip
    done = run("trace", "net.py:build", "--shape", "1,3,12,12", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "stay: output of the network" in done.stderr


def test_named_models_and_weights(work: Path) -> None:
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    save_file(state, work / "weights.safetensors")
    torch.save(state, work / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        done = run("profile", "torchvision:resnet18", "--weights", file, "--no-latency",
                   "--shape", "1,3,64,64", "--json", cwd=work)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["params"] == 11_689_512
    done = run("profile", "timm:resnet10t", "--no-latency", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["profile", "resnet18"], 2, "model='resnet18'"),
        (["profile", "torchvision:resnet19"], 2, "torchvision has no such model"),
        (["profile", "timm:resnet19"], 2, "timm has no such model"),
        (["profile", "gone.py:build"], 2, "there is no file"),
        (["profile", "net.py:gone"], 2, "no function 'gone'"),
        (["profile", "net.py:nothing"], 2, "not a module"),
        (["profile", "net.py:build", "--shape", "1,three"], 2, "shape='1,three'"),
        (["profile", "net.py:build", "--weights", "net.py"], 1, "weights='net.py'"),
        (["profile", "net.py:build", "--weights", "gone.pth"], 1, "weights='gone.pth'"),
        (["profile"], 2, "Missing argument"),
        (["optimize", "--model", "net.py:build", "--data", "gone", "--out", "o"], 1, "data='gone'"),
        (["optimize", "--model", "net.py:build", "--data", "net.py:loader", "--out", "o",
          "--budget", "1%macs"], 1, "can't be met"),
        (["optimize", "--model", "net.py:build", "--data", "net.py:loader", "--out", "o",
          "--budget", "half"], 2, "budget='half'"),
        (["optimize", "--model", "net.py:build", "--data", "net.py:loader", "--out", "net.py"],
         1, "can't be written"),
    ],
)  # fmt: skip
def test_errors_are_one_message_and_a_status(
    arguments: list[str], status: int, message: str, work: Path
) -> None:
    done = run(*arguments, cwd=work)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_unreadable_image_is_named(work: Path) -> None:
    folder = work / "photos"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG but no more")
    done = run("optimize", "--model", "net.py:build", "--data", "photos", "--out", "out", cwd=work)
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    assert "Traceback" not in done.stderr
