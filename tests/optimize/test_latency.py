"""Layer times: what is built to be timed, what is added up, and what is not timed again."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.nn import ChannelPermutation
from groupconv.optimize.cost import count_macs
from groupconv.optimize.latency import Timed, layer_times
from groupconv.optimize.structure import DENSE, Grouped, Narrowed, Pair, macs
from groupconv.optimize.trace import TracedConv, trace
from groupconv.targets import LatencyTable, Target
from groupconv.timing import Timing

PERMUTED = 1e-3


class Counted(Target):
    """A runtime that takes a nanosecond for each MAC, and as long as it likes to permute."""

    name = "counted"
    version = "1"

    def __init__(self) -> None:
        self.built: list[tuple[nn.Module, tuple[int, ...]]] = []

    def why_not(self) -> str | None:
        return None

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], float]:
        self.built.append((module, tuple(inputs[0].shape)))
        if isinstance(module, ChannelPermutation):
            assert not module.is_identity
            assert not module.training
            return lambda: PERMUTED * math.prod(inputs[0].shape)
        assert not module.training
        seconds = 1e-9 * count_macs(module, inputs)
        return lambda: seconds


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The keys of each interleaved run; the times are what the calls return."""
    found: list[set[str]] = []

    def interleave(
        calls: dict[str, Callable[[], float]], seconds: float, **_: object
    ) -> dict[str, Timing]:
        assert seconds > 0
        found.append(set(calls))
        return {key: Timing(call(), 0.0, 0.0, 5) for key, call in calls.items()}

    monkeypatch.setattr(sys.modules["groupconv.targets.table"], "interleave", interleave)
    return found


def layer(conv: nn.Module, *size: int) -> TracedConv:
    return trace(conv, (torch.randn(2, conv.in_channels, *size),)).convs[0]


def plain(*structures: object) -> list[Timed]:
    return [(structure, False, False) for structure in structures]


def test_every_structure_has_its_own_time_of_the_whole_batch() -> None:
    conv = layer(nn.Conv2d(8, 24, 3, stride=2, padding=1), 9, 7)
    # Of the same groups, but for the channels between the two convolutions.
    pairs = [Pair(middle, 4, 1, False) for middle in (8, 16, 24)]
    structures = [DENSE, Grouped(2), Grouped(8), *pairs, Pair(8, 4, 4, True), Pair(8, 1, 1, False)]
    target = Counted()
    times = layer_times({"a": (conv, plain(*structures))}, LatencyTable(target), 3, 0)
    expected = [3e-9 * macs(structure, conv.spec) for structure in structures]
    assert times["a"] == pytest.approx(expected)
    assert len(set(expected)) == len(structures)
    assert {shape for _, shape in target.built} == {(3, 8, 9, 7)}


def test_narrowed_layers_see_fewer_channels() -> None:
    conv = layer(nn.Conv2d(8, 24, 3, padding=1), 9, 7)
    depthwise = layer(nn.Conv2d(8, 8, 3, padding=1, groups=8), 9, 7)
    target = Counted()
    times = layer_times(
        {
            "a": (conv, plain(DENSE, Narrowed(8, 16), Narrowed(5, 24))),
            "b": (depthwise, plain(Grouped(8), Narrowed(5, 5, 5))),
        },
        LatencyTable(target),
        3,
        0,
    )
    assert times["a"] == pytest.approx([3e-9 * 63 * 9 * n for n in (8 * 24, 8 * 16, 5 * 24)])
    assert times["b"] == pytest.approx([3e-9 * 63 * 9 * n for n in (8, 5)])
    assert [shape[1] for _, shape in target.built] == [8, 8, 5, 8, 5]


def test_explicit_permutations_are_timed_once_and_added() -> None:
    conv = layer(nn.Conv2d(8, 4, 3), 5, 5)
    asked = [(Grouped(2), a, b) for a in (False, True) for b in (False, True)]
    target = Counted()
    times = layer_times({"a": (conv, asked)}, LatencyTable(target), 2, 0)["a"]
    before, after = PERMUTED * 2 * 8 * 5 * 5, PERMUTED * 2 * 4 * 3 * 3
    alone = 2e-9 * macs(Grouped(2), conv.spec)
    assert times == pytest.approx([alone, alone + after, alone + before, alone + before + after])
    permutations = [s for m, s in target.built if isinstance(m, ChannelPermutation)]
    assert sorted(permutations) == [(2, 4, 3, 3), (2, 8, 5, 5)]
    assert len(target.built) == 3


def test_layers_are_timed_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the activation that follows, the weights of the others having been read."""
    net = nn.Sequential(
        *(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(inplace=True)),
        *(nn.Conv2d(4, 4, 1), nn.Softmax(1), nn.Conv2d(4, 4, 1), nn.ReLU6()),
    ).eval()
    convs = trace(net, (torch.randn(2, 4, 3, 3),)).convs
    read: list[int] = []

    def interleave(
        calls: dict[str, Callable[[], float]], between: Callable[[], Tensor], **_: object
    ) -> dict[str, Timing]:
        read.append(int(between()))
        return {key: Timing(call(), 0.0, 0.0, 5) for key, call in calls.items()}

    monkeypatch.setattr(sys.modules["groupconv.targets.table"], "interleave", interleave)
    target = Counted()
    layer_times({conv.name: (conv, plain(DENSE)) for conv in convs}, LatencyTable(target), 1, 400)
    kinds = [[type(m).__name__ for m in module.modules()][1:] for module, _ in target.built]
    assert kinds == [["Conv2d", "SiLU"], [], ["Conv2d", "ReLU6"]]
    # All numbers that are read are one.
    assert read == [100, 100, 100]


def test_equal_layers_are_measured_once(runs: list[set[str]]) -> None:
    one, other = (layer(nn.Conv2d(8, 8, 3, padding=1, bias=b), 6, 6) for b in (True, False))
    asked = [(DENSE, False, False), (Grouped(4), True, False)]
    table = LatencyTable(target := Counted())
    times = layer_times({"a": (one, asked), "b": (other, asked)}, table, 1, 0)
    assert times["a"] == times["b"]
    assert len(runs) == 1
    assert len(target.built) == 3
    # Known already, in any order and number.
    again = layer_times({"c": (other, asked[::-1])}, table, 1, 0)
    assert again["c"] == times["a"][::-1]
    assert len(runs) == 1


def test_what_is_compared_was_timed_in_one_run(runs: list[set[str]]) -> None:
    conv, table = layer(nn.Conv2d(8, 8, 3), 6, 6), LatencyTable(Counted())
    layer_times({"a": (conv, plain(DENSE, Grouped(2)))}, table, 1, 0)
    layer_times({"a": (conv, plain(DENSE, Grouped(4)))}, table, 1, 0)
    assert [len(keys) for keys in runs] == [2, 2]
    assert len(runs[0] & runs[1]) == 1


def test_other_sizes_settings_and_batches_are_measured() -> None:
    layers = [
        layer(nn.Conv2d(8, 8, 3), 6, 6),
        layer(nn.Conv2d(8, 8, 3), 6, 7),
        layer(nn.Conv2d(8, 8, 3, stride=2), 6, 6),
        layer(nn.Conv2d(8, 8, 3, dilation=2), 6, 6),
        layer(nn.Conv2d(8, 8, 3, padding=1), 6, 6),
        layer(nn.Conv2d(8, 8, (3, 1)), 6, 6),
        layer(nn.Conv2d(8, 4, 3), 6, 6),
        layer(nn.Conv2d(8, 8, 2), 6, 6),
        layer(nn.Conv2d(8, 8, 2, padding="same"), 6, 6),
    ]
    table = LatencyTable(target := Counted())
    for batch in (1, 2):
        times = layer_times(
            {str(i): (conv, plain(DENSE)) for i, conv in enumerate(layers)}, table, batch, 0
        )
        for i, conv in enumerate(layers):
            assert times[str(i)] == pytest.approx([1e-9 * batch * macs(DENSE, conv.spec)])
    assert len(target.built) == 2 * len(layers)


@pytest.mark.parametrize("structure", [DENSE, Grouped(4), Pair(16, 4, 2, True)], ids=str)
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(8, 16, 4, padding="same"),
        nn.Conv2d(8, 16, (3, 4), padding="same", dilation=(2, 1)),
        nn.Conv3d(8, 16, 3, stride=(1, 2, 2), padding=(0, 1, 2)),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_what_is_timed_has_the_sizes_of_the_layer(
    structure: Grouped | Pair, convolution: nn.Module
) -> None:
    size = (7, 6, 5)[: len(convolution.kernel_size)]
    target = Counted()
    conv = layer(convolution, *size)
    layer_times({"a": (conv, plain(structure))}, LatencyTable(target), 2, 0)
    ((module, shape),) = target.built
    assert module(torch.randn(shape)).shape == (2, 16, *conv.spec.output_size)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("structure", [DENSE, Grouped(4), Pair(8, 4, 2, True)], ids=str)
def test_uneven_padding_of_a_strided_layer(structure: Grouped | Pair) -> None:
    """As TensorFlow's "same" has it, where the size is halved."""
    spec = ConvSpec(
        batch=1,
        in_channels=8,
        out_channels=8,
        input_size=(8, 7),
        kernel_size=(3, 3),
        stride=(2, 2),
        padding=((0, 1), (1, 1)),
        dilation=(1, 1),
        groups=1,
    )
    axis = layer(nn.Conv2d(8, 8, 1), 8, 7).inputs
    conv, target = TracedConv("a", spec, None, (), axis, axis), Counted()
    times = layer_times({"a": (conv, plain(structure))}, LatencyTable(target), 1, 0)
    assert times["a"] == pytest.approx([1e-9 * macs(structure, spec)])
    ((module, shape),) = target.built
    assert module(torch.randn(shape)).shape == (1, 8, 4, 4)
    # The row added is the last one.
    x = torch.zeros(shape)
    x[:, :, 0] = torch.randn(1, 8, 7)
    first = next(m for m in module if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight[:, :, 1:] = 0
        for bias in (p for name, p in module.named_parameters() if name.endswith("bias")):
            bias.zero_()
        assert module(x)[:, :, 0].abs().sum() > 0
        assert not module(x)[:, :, 1:].any()
