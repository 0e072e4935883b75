"""Sampled im2col vectors against F.unfold, and the moments of layers against numpy."""

import math
import sys
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn
from traced import capture

from groupconv.errors import ArgumentError
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.covariance import Moments, SeparableMoments
from groupconv.optimize.moments import EXACT, group_moments, layer_moments
from groupconv.optimize.sampling import Sampling, sample
from groupconv.optimize.trace import trace
from groupconv.optimize.wanted import Targets


def spec_of(layer: nn.Module, x: Tensor) -> ConvSpec:
    return trace(layer, (x,)).convs[0].spec


def sampled(layer: nn.Module, x: Tensor, positions: int = 10**9) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y = layer(x)
    u, y, _ = sample(spec_of(layer, x), x, y, positions, torch.Generator().manual_seed(0))
    return u, y


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)},
        {"kernel_size": (2, 3), "stride": 2, "dilation": (3, 2), "padding": 1},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_position_is_unfold(
    options: dict[str, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    # A view of something larger, as a split gives it.
    x = torch.randn(2, 7, 7, 9).to(memory_format=memory_format)[:, 2:6]
    layer = nn.Conv2d(4, 5, **options)
    u, y = sampled(layer, x)
    unfolded = F.unfold(x, **options).transpose(1, 2).flatten(0, 1)
    assert_close(u, unfolded, rtol=0, atol=0)
    assert_close(y, layer(x).flatten(2).transpose(1, 2).flatten(0, 1), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 3, (4, 1)])
def test_uneven_padding(kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, kernel, dilation=3, padding="same"), torch.randn(2, 3, 6, 5)
    u, y = sampled(layer, x)
    assert len(u) == 2 * 6 * 5
    assert_close(u @ layer.weight.flatten(1).T + layer.bias, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    cls = nn.Conv1d if dims == 1 else nn.Conv3d
    layer, x = cls(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, *range(5, 5 + dims))
    u, y = sampled(layer, x)
    assert len(u) == 2 * math.prod(layer(x).shape[2:])
    assert_close(u @ layer.weight.flatten(1).T + layer.bias, y, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_positions() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(3, 3, 8, 8)
    every = {tuple(row) for row in sampled(layer, x)[0].tolist()}
    u, y = sampled(layer, x, 50)
    rows = {tuple(row) for row in u.tolist()}
    assert len(u) == len(y) == len(rows) == 50  # none twice
    assert rows < every
    assert_close(u @ layer.weight.flatten(1).T + layer.bias, y, rtol=1e-5, atol=1e-5)
    again, _ = sampled(layer, x, 50)
    assert_close(again, u, rtol=0, atol=0)


def test_positions_know_their_image() -> None:
    x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 5, 5).contiguous()
    spec = spec_of(nn.Conv2d(1, 1, 1), x)
    u, y, image = sample(spec, x, x, 30, torch.Generator().manual_seed(0))
    assert_close(u[:, 0], image.float(), rtol=0, atol=0)
    assert_close(y[:, 0], image.float(), rtol=0, atol=0)


def test_transposed_layers_are_refused() -> None:
    spec = ConvSpec(
        1, 2, 4, (5, 5), (2, 2), (2, 2), ((0, 0),) * 2, (1, 1), 1, transposed=True,
        output_padding=(0, 0),
    )  # fmt: skip
    x, y = torch.ones(1, 2, 5, 5), torch.ones(1, 4, 10, 10)
    with pytest.raises(ArgumentError, match="transposed=True"):
        sample(spec, x, y, 10, torch.Generator())


def sampling(batches: Sequence[Tensor], max_positions: int = 10**6, seed: int = 0) -> Sampling:
    images = sum(map(len, batches))
    return Sampling(lambda: batches, images=images, max_positions=max_positions, seed=seed)


def test_batches_add_up() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)),
        torch.randn(6, 3, 5, 5),
    )
    layers = [(conv, conv.name) for conv in trace(model, (x,)).convs]
    (whole,), (parts,) = (
        layer_moments(model, layers, sampling(batches)) for batches in ([x], x.split([1, 3, 2]))
    )
    assert whole.count == parts.count == 6 * 25
    for name in ("mean_u", "mean_y", "uu", "yu", "yy"):
        # The convolution itself rounds otherwise for another batch.
        assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert (whole.held_out.count, parts.held_out.count) == (25, 25)  # image 3 of 0 .. 5
    assert_close(parts.held_out.uu, whole.held_out.uu, rtol=1e-5, atol=1e-6)
    assert parts.error == pytest.approx(whole.error, rel=1e-4)
    (few,) = layer_moments(model, layers, sampling(x.split([1, 3, 2]), max_positions=60))
    assert few.count == 60


def test_inputs_of_one_network_and_outputs_of_another() -> None:
    torch.manual_seed(0)
    original, current = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)) for _ in range(2)
    )
    x = torch.randn(4, 3, 5, 5)
    conv = trace(original, (x,)).convs[1]
    once = sampling([x])
    targets = Targets(original, [conv], once, {})
    (moments,) = layer_moments(current, [(conv, "2")], once, targets)
    with torch.no_grad():
        u = current[:2](x).movedim(1, -1).reshape(-1, 4).double()
        y = original(x).movedim(1, -1).reshape(-1, 2).double()
    assert_close(moments.mean_u, u.mean(0), rtol=1e-9, atol=1e-12)
    expected = (y - y.mean(0)).T @ (u - u.mean(0)) / len(u)
    assert_close(moments.yu, expected, rtol=1e-6, atol=1e-9)


def test_held_out_images_are_every_fourth() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(9, 2, 6, 6)
    conv = trace(model, (x,)).convs[0]

    def moments(images: Tensor, batches: list[int]) -> Moments:
        (found,) = layer_moments(model, [(conv, "0")], sampling(images.split(batches)))
        assert isinstance(found, Moments)
        return found

    every = moments(x, [2, 5, 2])
    held, rest = x[[3, 7]], x[[0, 1, 2, 4, 5, 6, 8]]
    assert every.held_out is not None
    for part, images in ((every.held_out, held), (every.kept(), rest)):
        alone = moments(images, [len(images)])
        assert part.count == alone.count
        for name in ("mean_u", "mean_y", "uu", "yu", "yy"):
            assert_close(getattr(part, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    assert moments(x[:3], [3]).held_out is None


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_group_sees_its_own(groups: int) -> None:
    """Of a converted layer: its inputs in runs, the original's outputs in another order."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, groups=2)), torch.randn(5, 8, 6, 6)
    conv = trace(model, (x,)).convs[0]
    some = sampling(x.split([2, 3]), max_positions=100, seed=1)
    (whole,) = layer_moments(model, [(conv, "0")], some)
    assert whole.count == 100
    outputs = torch.tensor([3, 1, 0, 2])
    targets = Targets(model, [conv], some, {})
    found = group_moments(
        model, (conv, "0"), some, targets, groups=groups, outputs=outputs.tolist()
    )
    expected = whole.part(torch.arange(72).reshape(groups, -1), outputs.reshape(groups, -1))
    assert found.count == expected.count
    for name in ("mean_u", "mean_y", "uu", "yu", "yy"):
        assert getattr(found, name).shape[0] == groups
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert_close(found.held_out.uu, expected.held_out.uu, rtol=1e-9, atol=1e-12)
    assert found.error == pytest.approx(whole.error, rel=1e-9)


@pytest.mark.parametrize(("channels", "kind"), [(512, Moments), (513, SeparableMoments)])
def test_wide_layers_are_separable(channels: int, kind: type) -> None:
    assert EXACT == 512 * 9
    model, x = nn.Sequential(nn.Conv2d(channels, 2, 3)), torch.ones(1, channels, 3, 3)
    conv = trace(model, (x,)).convs[0]
    (moments,) = layer_moments(model, [(conv, "0")], sampling([x], max_positions=8))
    assert type(moments) is kind


def test_places_are_the_same_whenever_asked_for_and_differ_between_batches() -> None:
    few = Sampling(lambda: (), images=8, max_positions=40, seed=3)
    first, again, next_ = (few.places(number, (4, 7, 5, 6)) for number in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, next_, strict=True))
    # Half of the images are in the batch, so half of the positions are.
    assert [len(axis) for axis in first] == [20, 20, 20]
    assert all(int(axis.max()) < size for axis, size in zip(first, (4, 5, 6), strict=True))
    other = Sampling(lambda: (), images=8, max_positions=40, seed=4).places(0, (4, 7, 5, 6))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("room", [1, 10**9])
def test_targets_are_read_for_several_layers_at_once(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, one at least; and they are the original's outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
    x = torch.randn(6, 3, 5, 5)
    convs, passes = trace(model, (x,)).convs, list[int]()

    def batches() -> tuple[Tensor, ...]:
        passes.append(1)
        return x.split([4, 2])

    monkeypatch.setattr(sys.modules["groupconv.optimize.wanted"], "_TARGETS_BYTES", room)
    some = Sampling(batches, images=6, max_positions=60, seed=0)
    targets = Targets(model, convs, some, {})
    for i, conv in enumerate(convs):
        for number, (batch, y) in enumerate(
            zip(x.split([4, 2]), targets.of(conv).values(), strict=True)
        ):
            whole = model[: i + 1](batch).detach()
            image, *place = some.places(number, whole.shape)
            assert_close(y, whole[image, :, place[0], place[1]], rtol=0, atol=0)
    assert len(passes) == (3 if room == 1 else 1)


def test_capture_before_activations_in_place() -> None:
    torch.manual_seed(0)
    ran: list[bool] = []
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
    )
    model[3].register_forward_hook(lambda *_: ran.append(True))
    x = torch.randn(2, 3, 5, 5)
    seen = capture(model, ["0", "2"], x)
    first = model[0](x)
    for name, pair in {"0": (x, first), "2": (first.relu(), model[2](first.relu()))}.items():
        for actual, expected in zip(seen[name], pair, strict=True):
            assert_close(actual, expected, rtol=0, atol=0)
            assert not actual.requires_grad
    assert (seen["0"][1] < 0).any()
    assert (seen["2"][1] < 0).any()
    assert ran == []  # the pass ends at the last layer of interest
    assert not model[0]._forward_hooks
    assert not model[2]._forward_hooks


def test_capture_removes_its_hooks_after_a_failure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1))
    with pytest.raises(RuntimeError, match="channels"):
        capture(model, ["0", "1"], torch.ones(1, 3, 4, 4))
    assert not any(m._forward_hooks for m in model.modules())
