"""The benchmark of whole networks: what is wrong is not timed, and summaries are what they say."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import networks, zoo
from benchmarks.alone import measure
from benchmarks.engine import Ready
from benchmarks.network_peers import ENGINES, OURS, Engine, Source
from benchmarks.networks import Record, compare, main
from benchmarks.networks_report import summarize
from groupconv.timing import Timing

# Engines that need nothing beside PyTorch.
HERE = (OURS, "eager NCHW", "eager channels_last")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def record(network: str, **milliseconds: float) -> Record:
    """What a run that took so long would have found; ours is ``ours``."""
    times = {
        OURS if name == "ours" else name: Timing(1e-3 * ms, 1e-3 * ms, 1e-3 * ms, 5)
        for name, ms in milliseconds.items()
    }
    peers = {name: time.median for name, time in times.items() if name != OURS}
    best = min(peers, key=peers.__getitem__)
    ratio = peers[best] / times[OURS].median if OURS in times else None
    return Record(network, 1, 224, 0, times, {}, {}, best_peer=best, ratio=ratio)


def test_every_batch_norm_has_statistics_of_its_own() -> None:
    net = zoo.build("regnetx_004")
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not net.training
    for norm in norms:
        assert norm.weight.abs().min() > 0.1
        assert norm.running_var.std() > 0


def test_networks_are_the_same_at_every_call() -> None:
    x = zoo.images(zoo.TINY, 2)
    assert torch.equal(zoo.build(zoo.TINY)(x), zoo.build(zoo.TINY)(x))


def test_right_engines_are_timed(tmp_path: Path) -> None:
    found = compare(Source(zoo.TINY, 2, tmp_path), HERE, threads=1, seconds=0.05)
    assert not found.refused
    assert set(found.times) == set(HERE)
    assert found.best_peer in HERE[1:]
    assert found.ratio == found.times[found.best_peer].median / found.times[OURS].median


def test_wrong_and_failing_engines_are_reported_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(source: Source, threads: int) -> Ready:
        return Ready(
            run=lambda: source.model(source.input),
            output=lambda: 1.01 * source.model(source.input),
            layout="NCHW",
        )

    def failing(source: Source, threads: int) -> Ready:
        raise RuntimeError("no such operator")

    monkeypatch.setitem(ENGINES, "wrong", Engine("model", wrong))
    monkeypatch.setitem(ENGINES, "failing", Engine("model", failing))
    engines = (OURS, "wrong", "failing")
    found = compare(Source(zoo.TINY, 1, tmp_path), engines, threads=1, seconds=0.05)
    assert set(found.times) == {OURS}
    assert found.refused["wrong"].startswith("WRONG")
    assert "no such operator" in found.refused["failing"]
    assert found.best_peer is found.ratio is None


def test_summary() -> None:
    found = summarize(
        [
            record("a", ours=1, first=2, second=4),
            record("b", ours=2, first=4, second=1),
            record("c", first=1),
            record(zoo.TINY, ours=0.1, first=50),
        ]
    )
    assert found["best_peer"] == {"ratio": pytest.approx(1.0), "networks": 2}
    assert found["by_peer"]["first"] == {"ratio": pytest.approx(2.0), "networks": 2}
    assert found["by_peer"]["second"] == {"ratio": pytest.approx(2**0.5), "networks": 2}
    assert found["worst"] == {"network": "b", "ratio": pytest.approx(0.5)}
    assert found["call"] == {OURS: pytest.approx(1e-4), "first": pytest.approx(0.05)}


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deeper" / "networks.json"
    assert main(["--networks", zoo.TINY, "--engines", ",".join(HERE), "--seconds", "0.05",
                 "--json", str(path)]) == 0  # fmt: skip
    result = json.loads(path.read_text())
    (only,) = result["records"]
    assert only["network"] == zoo.TINY
    assert {"machine", "versions", "threads", "commit"} <= result.keys()
    assert zoo.TINY in capsys.readouterr().out


def test_exit_status_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "compare", lambda *_, **__: Record(
        zoo.TINY, 1, 16, 0, {}, {}, {OURS: "WRONG: off by 2"}))  # fmt: skip
    assert main(["--networks", zoo.TINY, "--seconds", "0.05"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--threads", "0"], ["--batch", "-1"], ["--networks", "resnet51"], ["--engines", "onnx"]],
    ids=" ".join,
)
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's memory")
def test_a_process_alone(tmp_path: Path) -> None:
    found = measure("eager NCHW", "squeezenet1_1", batch=1, threads=1, folder=tmp_path)
    assert found.build > 0
    # Its 1.2 million weights, and no more than what its largest layers make.
    assert found.memory is not None
    assert 4.9e6 < found.memory < 300e6


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="resnet51"):
        measure("eager NCHW", "resnet51", batch=1, threads=1, folder=tmp_path)
