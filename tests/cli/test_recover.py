"""recover and report: a finished result learns further, and is shown again."""

import json
from pathlib import Path

import pytest
import torch
from commands import Run

import groupconv
from groupconv.cli.models import load_model

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 6)
    ).eval()
    with torch.no_grad():
        # All classes happen.
        net[-1].bias.sub_(net(photos()).mean(0))
    return net
def photos():
    torch.manual_seed(1)
    return torch.randn(120, 3, 12, 12) + 2 * torch.randn(120, 3, 1, 1)
def labelled():
    x = photos()
    return x, build()(x).argmax(1)
"""
FILES = {"events.jsonl", "model.safetensors", "plan.json", "report.html", "report.json"}
SHARED = ("--model", "net.py:build", "--data", "net.py:photos")


@pytest.fixture
def run(command: Run, tmp_path: Path) -> Run:
    (tmp_path / "net.py").write_text(NETWORK)
    return command


@pytest.fixture
def optimized(run: Run) -> Path:
    status, _, err = run("optimize", *SHARED, "--budget", "30%macs", "--out", "o", "--json")
    assert status == 0, err
    return Path("o")


def test_a_finished_result_learns_further(run: Run, optimized: Path) -> None:
    before = {path.name: path.read_bytes() for path in optimized.iterdir()}
    arguments = ("recover", "o", *SHARED, "--test", "net.py:labelled", "--out", "better")
    status, out, err = run(*arguments, "--time", "5s", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert {path.name for path in Path("better").iterdir()} == FILES
    assert {path.name: path.read_bytes() for path in optimized.iterdir()} == before
    old = json.loads((optimized / "report.json").read_text())
    assert json.loads(Path("better/report.json").read_text()) == report
    assert report["latency"] == old["latency"]
    assert report["layers"] == old["layers"]
    assert report["test_images"] == 120
    assert report["accuracy"]["before"] == 1.0
    assert report["accuracy"]["after"] > report["accuracy_before_recovery"]
    assert [stage["stage"] for stage in report["recovery"]] == ["distil"]
    assert Path("better/plan.json").read_text() == (optimized / "plan.json").read_text()
    x = load_model("net.py:build", None)
    net, same = (groupconv.load(name, load_model("net.py:build", None)) for name in ("better", "o"))
    images = torch.randn(50, 3, 12, 12) + 2 * torch.randn(50, 3, 1, 1)
    with torch.no_grad():
        errors = [float((n(images) - x(images)).norm()) for n in (net, same)]
    assert errors[0] < errors[1]


def test_where_it_may_not_learn(run: Run, optimized: Path) -> None:
    arguments = ("recover", "o", *SHARED, "--time", "1s")
    status, _, err = run(*arguments, "--out", "./o")
    assert (status, "out='o' holds what is to learn: give another folder" in err) == (2, True)
    status, _, err = run(*arguments, "--task", "count", "--out", "better")
    assert (status, "task='count' must be one of auto, classify" in err) == (2, True)
    status, _, err = run("recover", "nowhere", *SHARED, "--out", "better")
    assert (status, "nowhere does not exist: not an output folder" in err) == (1, True)
    (optimized / "report.json").write_text("{")
    status, _, err = run(*arguments, "--out", "better")
    assert (status, "o: not the folder of a finished result" in err) == (1, True)
    status, _, err = run(*arguments[:-1], "soon", "--out", "better")
    assert (status, "'soon'" in err) == (2, True)


def test_a_report_is_shown_again(run: Run, optimized: Path) -> None:
    status, out, err = run("report", "o")
    assert (status, out) == (0, "")
    for text in ("relative output error", "MACs per image", "report.html"):
        assert text in err
    status, out, _ = run("report", "o", "--json")
    assert json.loads(out) == json.loads((optimized / "report.json").read_text())


def test_the_report_of_a_sweep(run: Run) -> None:
    status, _, err = run("optimize", *SHARED, "--budgets", "90%macs,70%macs", "--out", "s")
    assert status == 0, err
    status, _, err = run("report", "s")
    assert status == 0
    for text in ("90%macs", "70%macs", "frontier.html"):
        assert text in err


def test_no_report(run: Run, tmp_path: Path) -> None:
    status, _, err = run("report", "nowhere")
    assert (status, "neither report.json nor frontier.json is there" in err) == (1, True)
    (tmp_path / "report.json").write_text("broken")
    status, _, err = run("report", str(tmp_path))
    assert (status, "report.json can't be read" in err) == (1, True)
