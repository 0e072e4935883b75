"""One network in several runtimes: what is reported, and what is not measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv.errors import ArgumentError, BusyError, ExportError, GroupConvError
from groupconv.targets import alone, get_target
from groupconv.targets.base import FileTarget
from groupconv.targets.export import FILE_TARGETS
from groupconv.timing import machine

bench_module = sys.modules["groupconv.targets.bench"]
X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
HERE = ["eager", "native"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


@pytest.mark.slow
def test_every_runtime_that_is_here() -> None:
    names = [t.name for t in FILE_TARGETS if t.why_not_timed() is None]
    found = groupconv.bench(network(), X, batch=3, seconds=0.01)
    assert [r.target for r in found.results if r.why_not is None] == names
    assert (found.shapes, found.batch, found.machine) == ([[1, 3, 12, 12]], 3, machine())
    for result in found.results:
        if result.why_not is None:
            assert result.version == get_target(result.target).version
            assert result.latency is not None
            assert 0 < result.latency.q1 <= result.latency.median <= result.latency.q3
            assert (result.throughput or 0) > 0
            assert (result.bytes or 0) > 4 * 32 * 27
            assert result.agreement is not None
            assert result.agreement.largest < 1e-4
            assert result.agreement.top1 == 1
    assert json.loads(json.dumps(found.to_dict()))["results"][0]["target"] == "eager"


def test_what_is_timed_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, tuple[int, ...]]] = []
    for name in HERE:
        target = get_target(name)
        assert isinstance(target, FileTarget)
        real = target.open

        def note(path: Path, inputs: tuple[Tensor, ...], name=name, real=real):  # type: ignore[no-untyped-def]
            opened.append((name, tuple(inputs[0].shape)))
            return real(path, inputs)

        monkeypatch.setattr(target, "open", note)
    found = groupconv.bench(network(), X, targets=HERE[::-1], batch=5, seconds=0)
    assert [r.target for r in found.results] == HERE[::-1]
    for name in HERE:
        # To check its numbers, for latency, and for throughput.
        assert [shape[0] for who, shape in opened if who == name] == [1, 1, 5]


def refuse(self: object, *arguments: object, **options: object) -> None:
    raise ExportError("the format can't hold it")


@pytest.mark.parametrize(
    ("method", "does", "reason"),
    [
        ("why_not", lambda self: "it is Sunday", "it is Sunday"),
        ("export", refuse, "the format can't hold it"),
    ],
)
def test_why_a_runtime_has_no_time(
    method: str, does: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_target("native")), method, does)
    eager, native = groupconv.bench(network(), X, targets=HERE, seconds=0).results
    assert (eager.why_not, native.why_not) == (None, reason)
    assert native.latency is native.throughput is native.bytes is native.agreement is None


def test_no_runtime_has_a_time() -> None:
    with pytest.raises(ExportError, match="no runtime can run the network: eager: PyTorch can't"):
        groupconv.bench(network(), X[:, :2], targets=HERE)


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="target 'abacus' must be one of eager"):
        groupconv.bench(network(), X, targets=["eager", "abacus"])
    with pytest.raises(ArgumentError, match="batch=0 must be 1 or more"):
        groupconv.bench(network(), X, batch=0)
    with pytest.raises(ArgumentError, match="model is in training mode"):
        groupconv.bench(nn.Sequential(nn.ReLU().train()).requires_grad_(False), X)

    def busy() -> None:
        raise BusyError("others")

    monkeypatch.setattr(bench_module, "require_quiet", busy)
    with pytest.raises(BusyError):
        groupconv.bench(network(), X)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds")
def test_memory_of_a_process_of_its_own(tmp_path: Path) -> None:
    target = get_target("eager")
    assert isinstance(target, FileTarget)
    tiny, wide = tmp_path / "tiny.pt2", tmp_path / "wide.pt2"
    target.export(nn.Conv2d(1, 1, 1).eval(), (torch.zeros(alone.TINY),), tiny)
    # 64 MB of weights, which say nothing about the pictures.
    target.export(nn.Linear(4000, 4000).eval(), (torch.zeros(1, 4000),), wide)
    few = alone.memory(target, tiny, tiny, [list(alone.TINY)])
    many = alone.memory(target, tiny, wide, [[1, 4000]])
    assert few is not None
    assert many is not None
    assert few < 20e6
    assert 60e6 < many < 100e6
    with pytest.raises(GroupConvError, match="eager in a process of its own ended with 1"):
        alone.memory(target, tiny, tmp_path / "none.pt2", [[1, 4000]])


def test_workers_are_waited_for_where_there_are_any() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert {target.rest for target in FILE_TARGETS} == {0}
        torch.set_num_threads(2)
        assert get_target("native").rest == 0
        ours = next(target for target in FILE_TARGETS if target.name == "onnxruntime")
        assert ours.rest > 0.031
    finally:
        torch.set_num_threads(before)
