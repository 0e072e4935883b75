"""The networks of the literature, small, through the whole job by the code of the full sizes."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.literature import SYSTEMS
from benchmarks.systems import cells, faults, main, page, speedups
from groupconv.optimize.budget import parse_budget

ROW: dict[str, Any] = {
    "system": "net",
    "macs": 100_000_000,
    "params": 2_000_000,
    "paper": {"macs": 102e6, "params": None},
    "refused": None,
    "macs_after": 50_000_000,
    "times": {
        "native": {"before": 2e-3, "after": 1e-3},
        "onnxruntime": {"before": 4e-3, "after": 3e-3},
        "openvino": {"before": 3e-3, "after": 2e-3},
    },
    "agreement": None,
    "output_error": 0.25,
    "psnr": 30.0,
    "files": {".onnx": {"refused": None}, ".tflite": {"refused": "no such operator"}},
}


# One classifier, detector and generator in every run; the others take minutes together.
OFTEN = {"densenet121", "mask_rcnn", "stylegan2"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in OFTEN else pytest.mark.release)
        for name in SYSTEMS
    ],
)
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    path, written = tmp_path / "rows.json", tmp_path / "systems.md"
    onnx = importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")
    status = main(
        [
            name, "--small", "--recover", "1s",
            # Where a layer's candidates need no code of their own.
            "--target", "eager", "--json", str(path), "--page", str(written),
            "--suffixes", ".groupconv,.onnx" if onnx else ".groupconv",
            "--runtimes", "native,onnxruntime" if onnx else "native",
        ]
    )  # fmt: skip
    (row,) = json.loads(path.read_text())["systems"]
    assert status == 0, faults(row)
    share = parse_budget(SYSTEMS[name].small_budget).fraction
    assert share is not None
    assert row["macs_after"] <= share * row["macs"]
    assert row["layers"]
    if SYSTEMS[name].finds:
        assert 0 < row["agreement"] <= 1
        assert set(row["times"]) == {"native", "eager"}
    else:
        assert 0 < row["output_error"] < 2
    assert all(file["largest_difference"] < 1e-3 for file in row["files"].values())
    assert all(t > 0 for time in row["times"].values() for t in time.values())
    assert f"| {name} |" in written.read_text()


def test_counts_are_held_against_the_paper() -> None:
    assert faults(ROW) == [".tflite: no such operator"]
    assert faults(ROW | {"macs": 90_000_000})[0] == "90,000,000 macs, 102,000,000 in the paper"
    assert faults(ROW | {"paper": None, "files": {}}) == []
    assert faults(ROW | {"refused": "can't be met"}) == ["can't be met"]


def test_the_page() -> None:
    assert speedups(ROW) == pytest.approx((2, 3))
    assert cells(ROW) == [
        "net", "100", "2.00", "50% of the MACs", "2.00", "1.00", "2.00x", "3.00x", "4.00", "3.00",
        "PSNR 30.0 dB", "onnx",
    ]  # fmt: skip
    found = page([ROW, ROW | {"system": "other", "refused": "can't be met"}])
    assert "| other | 100 | 2.00 |" in found
    assert "- net: .tflite: no such operator" in found
    classes = {"psnr": None, "task": "classify", "agreement": 0.98}
    assert "same class as original 98%" in page([ROW | classes])
    objects = {"psnr": None, "task": "detect", "agreement": 0.9, "output_error": None}
    assert "objects found again (F1) 90%" in page([ROW | objects])


def test_an_unknown_system(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["alexnet"])
    assert "'alexnet' must be one of mobilenet_v1" in capsys.readouterr().err
