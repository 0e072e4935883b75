"""What compiled networks tell of themselves: profile, picture and report."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from compiler.test_compiled import Network, images
from torch import Tensor, nn

import groupconv
from groupconv.compiler.compiled import Compiled
from groupconv.compiler.profile import NetworkProfile

X = images(2, 33, 35)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return groupconv.compile(Network(), X)


@pytest.fixture(scope="module")
def found(compiled: Compiled) -> NetworkProfile:
    return compiled.profile()


def test_steps_are_those_of_the_program(compiled: Compiled, found: NetworkProfile) -> None:
    program = compiled.program(X)
    assert [step.name for step in found.steps] == [step.name for step in program.steps]
    assert all(step.seconds > 0 for step in found.steps)
    assert [step.kind for step in found.steps if not step.native] == [
        "aten.cumsum.default",
        "aten.flip.default",
    ]
    assert found.seconds > 0
    assert found.peak > 1e9
    assert found.threads == torch.get_num_threads()


def test_macs_are_those_of_the_network(found: NetworkProfile) -> None:
    pixels = 2 * 17 * 18
    expected = {
        "stem.0": pixels * 16 * 27,
        "block.0": pixels * 16 * 4,
        "block.4": pixels * 16 * 9,
        "block.6": pixels * 16 * 8,
        "head": 2 * 16 * 5,
    }
    macs = {step.name: step.macs for step in found.steps if step.macs}
    assert macs == expected
    for step in found.steps:
        assert math.isclose(step.flops, 2 * step.macs / step.seconds)
        assert (step.bytes > 0) == step.native


def test_blocks_lie_in_the_arena_and_apart(found: NetworkProfile) -> None:
    assert found.blocks
    for block in found.blocks:
        assert 0 <= block.first <= block.last < len(found.steps)
        assert block.offset >= 0
        assert block.offset + block.size <= found.arena
    for a, b in itertools.combinations(found.blocks, 2):
        together = a.first <= b.last and b.first <= a.last
        apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
        assert apart or not together


def test_table(found: NetworkProfile) -> None:
    text = str(found)
    assert f"{1e3 * found.seconds:.3f} ms on {found.threads} threads" in text
    for step in found.steps:
        assert step.name in text
    assert "PyTorch: aten.cumsum.default" in text
    for title in ("us", "share", "GFLOP/s", "of peak", "GB/s"):
        assert title in text


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_picture(name: str, found: NetworkProfile, tmp_path: Path) -> None:
    found.picture(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert len(content) > 5000


def test_a_network_of_one_step(tmp_path: Path) -> None:
    """No arena, and nothing that PyTorch runs."""
    compiled = groupconv.compile(nn.ReLU().eval(), torch.randn(1, 3, 4, 4))
    found = compiled.profile()
    assert len(found.steps) == 1
    assert (found.arena, found.blocks) == (0, ())
    found.picture(tmp_path / "picture.png")
    assert compiled.report().cuts == ()


def test_a_network_without_steps(tmp_path: Path) -> None:
    compiled = groupconv.compile(nn.Identity().eval(), torch.randn(1, 3, 4, 4))
    found = compiled.profile()
    assert found.steps == ()
    assert "ms on" in str(found)
    found.picture(tmp_path / "picture.png")
    assert "0 native steps, 0 by PyTorch" in str(compiled.report())


def test_inputs_of_ones_own(compiled: Compiled) -> None:
    """Of another size, too: they get a program."""
    before = len(compiled.programs)
    x = images(1, 9, 9)
    found = compiled.profile(x)
    assert len(compiled.programs) == before + 1
    assert [step.name for step in found.steps] == [s.name for s in compiled.program(x).steps]
    compiled.profile(x.transpose(2, 3))


class Words(nn.Module):
    """Takes integers beside images."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.conv(x + self.embedding(words)[:, :, None, None])


def test_report(compiled: Compiled) -> None:
    found = compiled.report(X)
    program = compiled.program(X)
    assert found.tasks + len(found.cuts) == len(program.steps)
    assert (found.arena, found.weights) == (program.memory.arena, program.weights)
    assert [cut.operator for cut in found.cuts] == ["aten.cumsum.default", "aten.flip.default"]
    for cut in found.cuts:
        assert cut.seconds > 0
        assert cut.reason == f"{cut.operator} is not native"
    first, *lines = str(found).splitlines()
    assert f"{found.tasks} native steps, 2 by PyTorch; " in first
    assert "by PyTorch: aten.cumsum.default is not native" in lines[0]
    assert lines[0].startswith("  cumsum, ")


def test_report_of_integers() -> None:
    compiled = groupconv.compile(Words().eval(), (torch.randn(1, 4, 3, 3), torch.tensor([2])))
    cut, *_ = compiled.report().cuts
    assert cut.operator == "aten.embedding.default"
    assert "other numbers than float32" in cut.reason
    assert cut.seconds > 0


def test_a_report_changes_nothing(compiled: Compiled) -> None:
    before = compiled(X)
    compiled.report(X)
    for name, y in compiled(X).items():
        assert torch.equal(y, before[name])
