"""The verb export: a file that was checked in its runtime, and clear errors."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Run
from networks import images, residual

import groupconv

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

NETWORK = """
from networks import residual as build
"""


@pytest.fixture
def run(command: Run, tmp_path: Path) -> Run:
    (tmp_path / "net.py").write_text(NETWORK)
    return functools.partial(command, "export")


def test_for_people(run: Run, tmp_path: Path) -> None:
    code, out, err = run("net.py:build", "net.onnx", "--shape", "2,3,8,8")
    assert (code, out) == (0, "")
    assert "Conv " in err
    assert "in onnxruntime it differs from PyTorch by" in err
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


def test_json(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=images(6, seed=1).numpy())
    code, out, _ = run("net.py:build", "net.onnx", "--data", "data.npz", "--shape", "2,3,8,8",
                       "--json")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["target"] == "onnxruntime"
    assert found["nodes"]["Conv"] > 0
    assert found["agreement"]["largest"] < 1e-5
    assert found["bytes"] == (tmp_path / "net.onnx").stat().st_size


def test_an_optimized_network(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = groupconv.optimize(
        residual(), images(64, seed=1), budget="50%macs", keep=(), out=folder
    )
    assert any(getattr(m, "groups", 1) > 1 for m in result.model.modules())
    code, *_ = run("net.py:build", "net.onnx", "--optimized", "run", "--shape", "2,3,8,8")
    assert code == 0
    model = onnx.load(tmp_path / "net.onnx")
    groups = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "Conv" and attribute.name == "group"
    ]
    assert max(groups) > 1
    notes = {entry.key: entry.value for entry in model.metadata_props}
    plan = (folder / "plan.json").read_bytes()
    assert notes["groupconv_plan"] == hashlib.sha256(plan).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net.py:build", "net.tf"), "the suffix must be one of"),
        (("net.py:build", "none/net.onnx"), "there is no folder"),
        (("net.py:build", "net.onnx", "--shape", "0"), "must be positive integers"),
    ],
)
def test_errors(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_the_model_can_not_run_on_the_shape(run: Run, tmp_path: Path) -> None:
    code, _, err = run("net.py:build", "net.onnx", "--shape", "1,4,8,8")
    assert code in (1, 2)
    assert "4" in err
    assert not (tmp_path / "net.onnx").exists()


def test_real_images_are_cut_to_the_batch(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.savez(tmp_path / "data.npz", images=images(5, seed=2).numpy())
    code, out, _ = run("net.py:build", "net.onnx", "--data", "data.npz", "--shape", "4,3,8,8",
                       "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["agreement"]["top1"] == 1
