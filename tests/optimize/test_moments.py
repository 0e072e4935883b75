"""Sampled im2col vectors against F.unfold, and their moments against numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.moments import MomentSums, capture, layer_moments, sample
from groupconv.optimize.trace import trace


def spec_of(layer: nn.Module, x: Tensor) -> ConvSpec:
    return trace(layer, (x,)).convs[0].spec


def sampled(layer: nn.Module, x: Tensor, positions: int = 10**9) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y = layer(x)
    return sample(spec_of(layer, x), x, y, positions, torch.Generator().manual_seed(0))


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


def test_moments_are_the_covariance() -> None:
    rng = np.random.default_rng(0)
    u, y = 5 + rng.normal(size=(200, 12)), rng.normal(size=(200, 4)) - 3
    spec = ConvSpec(1, 3, 4, (5, 5), (2, 2), (1, 1), ((0, 0),) * 2, (1, 1), 1)
    sums = MomentSums(spec)
    for part in np.split(np.arange(200), [3, 100]):
        sums.add(torch.from_numpy(u[part]), torch.from_numpy(y[part]))
    moments = sums.finish()
    both = np.cov(np.hstack([u, y]).T, bias=True)
    assert moments.count == 200
    for actual, expected in (
        (moments.mean_u, u.mean(0)),
        (moments.mean_y, y.mean(0)),
        (moments.uu, both[:12, :12]),
        (moments.yu, both[12:, :12]),
        (moments.yy, both.diagonal()[12:].copy()),
    ):
        assert actual.dtype == torch.float64
        assert_close(actual, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_batches_add_up() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)),
        torch.randn(6, 3, 5, 5),
    )
    layers = [(conv, conv.name) for conv in trace(model, (x,)).convs]
    (whole,), (parts,) = (
        layer_moments(model, model, layers, batches, max_positions=10**6, images=6, seed=0)
        for batches in ([x], x.split([1, 3, 2]))
    )
    assert whole.count == parts.count == 6 * 25
    for name in ("mean_u", "mean_y", "uu", "yu", "yy"):
        # The convolution itself rounds otherwise for another batch.
        assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    (few,) = layer_moments(
        model, model, layers, x.split([1, 3, 2]), max_positions=60, images=6, seed=0
    )
    assert few.count == 60


def test_inputs_of_one_network_and_outputs_of_another() -> None:
    torch.manual_seed(0)
    original, current = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)) for _ in range(2)
    )
    x = torch.randn(4, 3, 5, 5)
    conv = trace(original, (x,)).convs[1]
    (moments,) = layer_moments(
        original, current, [(conv, "2")], [x], max_positions=10**6, images=4, seed=0
    )
    with torch.no_grad():
        u = current[:2](x).movedim(1, -1).reshape(-1, 4).double()
        y = original(x).movedim(1, -1).reshape(-1, 2).double()
    assert_close(moments.mean_u, u.mean(0), rtol=1e-9, atol=1e-12)
    expected = (y - y.mean(0)).T @ (u - u.mean(0)) / len(u)
    assert_close(moments.yu, expected, rtol=1e-6, atol=1e-9)


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
