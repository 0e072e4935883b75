"""The benchmarks: their shapes are those of the networks, and wrong results are never timed."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_threads, kernels, make_shapes
from benchmarks.engine import Ready
from benchmarks.kernels_report import summarize
from benchmarks.machine_peak import Peak
from benchmarks.peers import ENGINES, OURS, PEERS
from benchmarks.shapes import FOLDER, Shape, read, write
from groupconv.kernels.spec import ConvSpec

ROOT = FOLDER.parents[1]
FILES = sorted(FOLDER.glob("*.csv"))
PEAK = Peak("test", 1e11, ((2**20, 1e11),))
TINY = Shape(
    "tiny", ConvSpec(1, 8, 8, (6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=4), 1
)
BLOCKED = ("onnx", "onnxruntime", "openvino", "tensorflow", "ai_edge_litert")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A file with one small shape."""
    path = tmp_path / "tiny.csv"
    write(path, [TINY])
    return path


# Shapes.


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shapes_are_distinct_and_written_as_they_are_read(path: Path, tmp_path: Path) -> None:
    shapes = read(path)
    assert shapes
    assert len({shape.spec for shape in shapes}) == len(shapes)
    assert all(shape.network == path.stem and shape.count >= 1 for shape in shapes)
    assert all(0 < shape.flops <= 2 * shape.spec.macs for shape in shapes)
    write(tmp_path / path.name, shapes)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_every_network_has_its_file() -> None:
    names = {*make_shapes._networks(), *make_shapes._single_layers()}
    assert names == {path.stem for path in FILES}
    for name in make_shapes._BATCH_8:
        batches = [shape.spec.batch for shape in read(FOLDER / f"{name}.csv")]
        assert sorted(set(batches)) == [1, 8]
        assert batches.count(1) == batches.count(8)


def test_files_are_what_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One network, and the layers that stand alone."""
    networks = make_shapes._networks()
    name = "mobilenet_v2"
    monkeypatch.setattr(make_shapes, "_networks", lambda: {name: networks[name]})
    monkeypatch.setattr(make_shapes, "FOLDER", tmp_path)
    make_shapes.main()
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written.keys() == {f"{name}.csv", "conv1d.csv", "depthwise_31x31.csv", "width_sweep.csv"}
    for file, text in written.items():
        assert text == (FOLDER / file).read_text()


def test_arithmetic_of_taps_on_padding_is_left_out() -> None:
    """A 3x3 kernel on 2x2 pixels meets four of them at each of four places."""
    spec = replace(TINY.spec, input_size=(2, 2))
    assert Shape("x", spec, 1).flops == 2 * 8 * 2 * 16
    causal = ConvSpec(1, 4, 4, (5,), (4,), (1,), ((3, 0),), (1,), groups=4)
    assert Shape("x", causal, 1).flops == 2 * 4 * (1 + 2 + 3 + 4 + 4)
    assert Shape("x", causal, 1).bytes == 4 * (20 + 20 + 16 + 4)


# Engines.


def _engine(output: Tensor, calls: list[str]) -> Ready:
    """One that takes no time and gives ``output``."""
    return Ready(run=lambda: calls.append("run"), output=lambda: output, layout="planted")


def _right(shape: Shape) -> Tensor:
    weight, bias, input = kernels.tensors(shape.spec)
    return kernels.group_conv_reference(shape.spec, input, weight, bias).float()


def _one_off(right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong[0, -1, -1, -1] += 0.01
    return wrong


def _one_nan(right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong[0, -1, -1, -1] = math.nan
    return wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_off, "WRONG: error"),
        (_one_nan, "WRONG: error nan"),
        (lambda right: right.roll(1, 1), "WRONG: error"),
        (lambda right: right[:, :, 1:], "WRONG: shape (1, 8, 5, 6), not (1, 8, 6, 6)"),
        (lambda right: right.half(), "WRONG: error"),
    ],
)
def test_wrong_engine_is_reported_and_not_timed(
    change: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it timed, the quickest peer would be the wrong one."""
    calls: list[str] = []
    wrong = change(_right(TINY))
    for name in PEERS[2:]:
        monkeypatch.setitem(ENGINES, name, lambda *_: "not here")
    monkeypatch.setitem(ENGINES, PEERS[2], lambda *_: _engine(wrong, calls))
    with torch.inference_mode():
        record = kernels.compare(TINY, threads=1, seconds=0.01, peak=PEAK)
    assert record.refused[PEERS[2]].startswith(message)
    assert PEERS[2] not in record.times
    assert not calls
    assert record.best_peer in PEERS[:2]
    assert record.times.keys() == ENGINES.keys() - set(PEERS[2:])
    assert summarize([record])["refused"] == dict.fromkeys(PEERS[2:], 1)


def test_right_engine_is_timed_and_the_best_peer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    right = _right(TINY)
    for name in PEERS[2:]:
        monkeypatch.setitem(ENGINES, name, lambda *_: 1 / 0)
    monkeypatch.setitem(ENGINES, PEERS[2], lambda *_: _engine(right, calls))
    with torch.inference_mode():
        record = kernels.compare(TINY, threads=1, seconds=0.01, peak=PEAK)
    assert calls
    assert record.best_peer == PEERS[2]
    assert record.ratio == record.times[PEERS[2]].median / record.times[OURS].median
    assert record.refused == dict.fromkeys(PEERS[3:], "failed: ZeroDivisionError: division by zero")


def test_exit_status_when_ours_is_wrong(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = _one_off(_right(TINY))
    for name in PEERS:
        monkeypatch.setitem(ENGINES, name, lambda *_: "not here")
    monkeypatch.setitem(ENGINES, OURS, lambda *_: _engine(wrong, []))
    monkeypatch.setattr(kernels, "measure", lambda _: PEAK)
    path = tmp_path / "new" / "out.json"
    status = kernels.main(["--shapes", str(tiny), "--seconds", "0.01", "--json", str(path)])
    assert status == 1
    assert f"{OURS}, tiny: 1x8x6x6 to 8, 3x3, groups 4: WRONG" in capsys.readouterr().out
    (record,) = json.loads(path.read_text())["records"]
    assert record["refused"][OURS].startswith("WRONG")
    assert OURS not in record["times"]
    assert record["ratio"] is None


def test_runs_without_the_other_runtimes(tiny: Path, tmp_path: Path) -> None:
    """As on a machine that has none of them; what can't run is told with the reason."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
""")
    output = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "benchmarks.kernels", "--quick", "--shapes", str(tiny),
        "--seconds", "0.05", "--json", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["machine"]["processor"]
    assert result["machine"]["cores"] == os.cpu_count()
    assert result["threads"] == 1
    assert result["versions"].keys() >= {"groupconv", "torch", "onnxruntime", "openvino"}
    assert torch.__version__.startswith(result["versions"]["torch"])
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert result["commit"] == commit.stdout.strip()
    (record,) = result["records"]
    assert record["network"] == "tiny"
    assert record["times"].keys() == ENGINES.keys() - {"ONNX Runtime", "OpenVINO", "LiteRT"}
    for name in ("ONNX Runtime", "OpenVINO", "LiteRT"):
        assert "can't be imported" in record["refused"][name]
        assert f"{name}, tiny" in done.stdout
    assert record["best_peer"] in PEERS
    assert record["ratio"] == pytest.approx(
        record["times"][record["best_peer"]]["median"] / record["times"][OURS]["median"]
    )


def test_threads_are_compared_on_long_and_on_short_shapes() -> None:
    records = [
        {"shape": name, "one": one, "several": one / gain, "gain": gain}
        for name, one, gain in (("a", 1e-3, 2.0), ("b", 4e-4, 1.5), ("c", 5e-6, 1.0))
    ]
    found = kernel_threads.summarize(records)
    assert found["long"]["shapes"] == 2
    assert found["long"]["gain"] == pytest.approx(3**0.5)
    assert found["long"]["least"] == {"shape": "b", "gain": 1.5}
    assert found["short"] == {"shapes": 1, "gain": 1.0, "least": {"shape": "c", "gain": 1.0}}


def test_a_shape_on_one_thread_and_on_two() -> None:
    shape = read(FOLDER / "mixnet_s.csv")[0]
    found = kernel_threads.compare(shape, threads=2, seconds=0.0)
    assert found["shape"] == str(shape)
    assert found["gain"] == found["one"] / found["several"] > 0
