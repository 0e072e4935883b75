"""The verbs of the optimizer: optimize, its sweep, plan and apply."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Run, one_object

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
def loader():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(24, 3, 12, 12), batch_size=8)
def photos():
    torch.manual_seed(2)
    return torch.randn(200, 3, 12, 12)
def labelled():
    x = photos()
    # Never the network's class.
    return x, (build()(x).argmax(1) + 1) % 6
"""
# MACs of one image: 8x3 at 10x10, 8x8 at 8x8 and 6x6, 6x8 at 4x4, nine taps each.
DENSE = {"0": 21_600, "2": 36_864, "4": 20_736, "6": 6_912}
FILES = {"events.jsonl", "model.safetensors", "plan.json", "report.html", "report.json"}
SHARED = ("--model", "net.py:build", "--data", "net.py:loader")


@pytest.fixture
def run(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Times are in proportion to MACs."""
    (tmp_path / "net.py").write_text(NETWORK)

    def layer_times(layers: Any, *_: object) -> dict[str, list[float]]:
        return {
            name: [1e-9 * sum(spec.macs for spec in s.specs(conv.spec)) for s, *_ in structures]
            for name, (conv, structures) in layers.items()
        }

    for module in ("planning", "finish"):
        monkeypatch.setattr(sys.modules[f"groupconv.optimize.{module}"], "layer_times", layer_times)
    return command


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_budget_holds_and_the_ends_are_kept(run: Run, tmp_path: Path) -> None:
    status, out, err = run(
        "optimize", *SHARED, "--budget", "70%macs", "--budget", "75%params", "--out", "o", "--json"
    )
    assert status == 0, err
    report = one_object(out)
    assert report["settings"]["budget"] == "70%macs, 75%params"
    assert report["macs"]["before"] == sum(DENSE.values())
    assert report["macs"]["after"] <= 0.7 * report["macs"]["before"]
    assert report["params"]["after"] <= 0.75 * report["params"]["before"]
    assert {layer["name"] for layer in report["layers"]} == {"2", "4"}
    assert names(tmp_path / "o") == FILES


def test_keep_replaces_the_default_and_round_to_bounds_the_width(run: Run) -> None:
    status, out, err = run("optimize", *SHARED, "--budget", "85%macs", "--keep", "2", "--keep",
                           "first", "--round-to", "4", "--out", "o", "--json")  # fmt: skip
    assert status == 0, err
    report = one_object(out)
    assert {layer["name"] for layer in report["layers"]} == {"4", "6"}
    plan = json.loads(Path("o/plan.json").read_text())
    for layer in plan["layers"].values():
        assert layer["groups"] in (1, 2, 8)
        assert layer.get("middle", 8) % 4 == 0


def test_a_sweep_writes_a_folder_for_each_budget(run: Run, tmp_path: Path) -> None:
    arguments = ("optimize", *SHARED, "--budgets", "90%macs, 70%macs", "--out", "o")
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    runs = one_object(out)["runs"]
    assert [each["settings"]["budget"] for each in runs] == ["90%macs", "70%macs"]
    for each, share in zip(runs, (0.9, 0.7), strict=True):
        assert each["macs"]["after"] <= share * sum(DENSE.values())
    files = {"events.jsonl", "frontier.html", "frontier.json"}
    assert names(tmp_path / "o") == files | {"90%macs", "70%macs"}
    assert names(tmp_path / "o" / "70%macs") == FILES - {"events.jsonl"}
    assert json.loads(Path("o/frontier.json").read_text()) == runs
    page = Path("o/frontier.html").read_text()
    assert 'href="70%25macs/report.html"' in page
    status, out, err = run(*arguments)
    assert (status, out) == (0, "")
    assert "frontier.html" in err


def test_plan_then_edit_then_apply(run: Run, tmp_path: Path) -> None:
    status, out, err = run("plan", *SHARED, "--budget", "70%macs", "--out", "p", "--json")
    assert status == 0, err
    plan = one_object(out)
    assert json.loads(Path("p/plan.json").read_text()) == plan
    assert set(plan["reasons"]) == {"2", "4"}
    plan["layers"] = {
        "2": {"structure": "grouped", "groups": 4},
        "4": {"structure": "pair", "middle": 3, "groups": 1, "pointwise_groups": 1,
              "shuffle": False},
    }  # fmt: skip
    Path("edited.json").write_text(json.dumps(plan))
    status, out, err = run("apply", "edited.json", *SHARED, "--out", "o", "--json")
    assert status == 0, err
    report = one_object(out)
    after = {layer["name"]: layer["macs"]["after"] for layer in report["layers"]}
    # Rank 3: nine taps of 3x8 channels, then 8x3 pointwise, at 6x6.
    assert after == {"2": DENSE["2"] // 4, "4": (9 * 24 + 24) * 36}
    assert names(tmp_path / "o") == FILES
    settled = json.loads(Path("o/plan.json").read_text())["layers"]["2"]
    assert sorted(settled["in_order"]) == list(range(8))


def test_plan_for_people(run: Run) -> None:
    status, out, err = run("plan", *SHARED, "--budget", "70%macs", "--out", "p")
    assert (status, out) == (0, ""), err
    for text in ("structure", "why", "0.04 -> 0.0", "p/plan.json", "groupconv apply"):
        assert text in err


def test_an_illegal_plan_names_every_fault(run: Run, tmp_path: Path) -> None:
    layers = {"2": {"groups": 3}, "nowhere": {"groups": 2}, "4": {"groups": 5}}
    plan = {"format": 1, "budget": "", "target": "", "seed": 0, "layers": layers}
    Path("bad.json").write_text(json.dumps(plan))
    status, out, err = run("apply", "bad.json", *SHARED, "--out", "o")
    assert (status, out) == (1, "")
    for text in ("2", "groups=3", "nowhere", "groups=5"):
        assert text in err
    assert not names(tmp_path / "o") & {"model.safetensors", "report.json"}


def test_a_floor_makes_layers_dense_again(run: Run) -> None:
    status, out, err = run("optimize", *SHARED, "--test", "net.py:photos", "--budget", "50%macs",
                           "--min-accuracy", "1", "--out", "o", "--json")  # fmt: skip
    report = one_object(out)
    assert report["agreement"] == 1.0
    assert report["macs"]["after"] > 0.5 * report["macs"]["before"]
    assert status == 1
    assert "budget='50%macs' does not hold" in err


def test_a_floor_above_the_original_does_not_hold(run: Run) -> None:
    status, out, err = run("optimize", *SHARED, "--test", "net.py:labelled", "--budget", "70%macs",
                           "--min-accuracy", "0.5", "--out", "o", "--json")  # fmt: skip
    report = one_object(out)
    assert report["macs"]["after"] == report["macs"]["before"]
    assert status == 1
    assert "min_accuracy=0.5: does not hold, even unchanged: the accuracy is 0.0000" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["optimize", "--budget", "2x", "--budgets", "90%,70%"], 2, "can't go with --budget"),
        (["optimize", "--budgets", "90%", "--min-accuracy", "0.5"], 2, "--min-accuracy"),
        (["optimize", "--budgets", "90%,,70%"], 2, "budget=''"),
        (["optimize", "--budget", "2x", "--budget", "3x"], 2, "one for each of several"),
        (["optimize", "--keep", "gone"], 2, "keep='gone'"),
        (["optimize", "--round-to", "0"], 2, "round_to=0"),
        (["optimize", "--min-accuracy", "75"], 2, "min_accuracy=75"),
        (["optimize", "--target", "abacus"], 2, "target='abacus'"),
        (["plan", "--recover", "bn"], 2, "No such option"),
        (["plan", "--budget", "1%macs"], 1, "can't be met"),
        (["apply"], 2, "Missing argument"),
        (["apply", "gone.json"], 1, "plan='gone.json' can't be read"),
        (["apply", "net.py"], 1, "not a plan of groupconv"),
    ],
)
def test_errors_are_one_message_and_a_status(
    arguments: list[str], status: int, message: str, run: Run
) -> None:
    found, out, err = run(*arguments, *SHARED, "--out", "o")
    assert (found, out) == (status, ""), err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("optimize", ["--budget", "--budgets", "--keep", "--round-to", "--min-accuracy"]),
        ("plan", ["--budget", "--keep", "--round-to"]),
        ("apply", ["--recover", "--min-accuracy", "plan.json"]),
    ],
)
def test_help_names_the_options(verb: str, options: list[str], run: Run) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    for option in options:
        assert option in out
    if verb != "apply":
        assert "any --keep replaces both" in " ".join(out.replace("│", " ").split())
