"""The refit of a converted network: pairs found again, unchanged layers that mend the rest."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from networks import images, residual
from planted import plant_groups, plant_pair
from torch import Tensor, nn

from groupconv.optimize.convert import Converted, Settled, convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import load, save_weights
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.structure import Grouped, Pair
from groupconv.optimize.trace import trace
from groupconv.store import Store

NOTHING_KEPT = Store(None, "")
FORWARD = tuple(range(16))
SHUFFLED = (7, 2, 15, 0, 9, 4, 11, 6, 1, 12, 3, 14, 5, 8, 13, 10)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def every(x: Tensor) -> Sampling:
    """All positions of all images."""
    return Sampling(lambda: x.split(32), images=len(x), max_positions=10**6, seed=0)


def refitted(
    model: nn.Module, x: Tensor, layers: dict[str, Settled]
) -> tuple[Converted, dict[str, float]]:
    converted = convert(model, trace(model, (x[:2],)), layers)
    return converted, refit(model, converted, every(x), NOTHING_KEPT, {})


def pointwise(norm: bool) -> nn.Sequential:
    """A pointwise layer between two others, with or without a batch norm to take its mean."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(16)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False), *middle,
        nn.ReLU(), nn.Conv2d(16, 4, 1),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "out_order"),
    [
        (Pair(4, 1, 1, False), SHUFFLED[::-1]),
        (Pair(16, 16, 1, False), SHUFFLED[::-1]),
        (Pair(32, 16, 1, False), SHUFFLED[::-1]),
        # Its groups are of the channels as they come: they must come as they were.
        (Pair(16, 4, 1, False), FORWARD),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", ["conv1", "conv2"])
def test_planted_pairs_survive_conversion_refit_and_files(
    pair: Pair, out_order: tuple[int, ...], first: str, tmp_path: Path
) -> None:
    """Beside a layer in groups that wants the channels between them in another order."""
    model, x = residual(), images()
    layers = {"conv1": pair, "conv2": Partition(4, SHUFFLED, out_order)}
    plant_pair(model.conv1, pair)
    plant_groups(model.conv2, layers["conv2"])
    expected = outputs(model, x)
    ordered = {name: layers[name] for name in sorted(layers, key=lambda name: name != first)}
    converted, losses = refitted(model, x, ordered)
    assert converted.edits["conv1"].structure == pair
    assert list(converted.model.conv1._modules)[:1] == ["conv"]
    assert losses == pytest.approx({"conv1": 0, "conv2": 0}, abs=1e-5)
    assert_close(outputs(converted.model, x), expected, rtol=2e-3, atol=2e-3)

    save_weights(tmp_path, converted)
    loaded = load(tmp_path, residual(seed=9))
    assert_close(outputs(loaded, x), outputs(converted.model, x), rtol=0, atol=0)
    assert [m.shape for m in loaded.parameters()] == [m.shape for m in converted.model.parameters()]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pair", [Pair(16, 4, 4, True), Pair(16, 2, 2, True), Pair(8, 1, 1, False)])
def test_planted_pointwise_pairs(pair: Pair, norm: bool, tmp_path: Path) -> None:
    model, x = pointwise(norm), images()
    plant_pair(model[2], pair)
    converted, losses = refitted(model, x, {"2": pair})
    assert ("shuffle" in converted.model[2]._modules) == pair.shuffle
    # A batch norm takes the mean where there is one, else the pair has a bias.
    assert (converted.model[2].pointwise.bias is None) == norm
    assert losses == pytest.approx({"2": 0}, abs=1e-5)
    assert_close(outputs(converted.model, x), outputs(model, x), rtol=1e-3, atol=1e-3)
    save_weights(tmp_path, converted)
    loaded = load(tmp_path, pointwise(norm))
    assert_close(outputs(loaded, x), outputs(converted.model, x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_the_mean_of_a_pair_is_the_originals(norm: bool) -> None:
    """Of one that loses much, whatever takes the mean."""
    model, x = pointwise(norm), images()
    converted, losses = refitted(model, x, {"2": Pair(2, 1, 1, False)})
    assert losses["2"] > 0.05
    last = 4 if norm else 3
    means = (outputs(net[:last], x).mean((0, 2, 3)) for net in (converted.model, model))
    assert_close(*means, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def least_squares(inputs: Tensor, outputs: Tensor, kernel: int) -> float:
    """The square error of the best dense layer, and of its bias, by an independent solver."""
    u = F.unfold(inputs, kernel).transpose(1, 2).flatten(0, 1).double()
    u = torch.cat([u, torch.ones(len(u), 1)], 1)
    y = outputs.movedim(1, -1).flatten(0, 2).double()
    return float((u @ torch.linalg.lstsq(u, y).solution - y).square().sum())


def test_dense_layers_downstream_mend_what_was_lost() -> None:
    """Almost as far as any weights could; the layers before it stay as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)
    ).eval()
    x = images(256)
    converted, losses = refitted(model, x, {"2": Grouped(4)})
    net = converted.model
    assert set(losses) == {"2"}
    assert torch.equal(net[0].weight, model[0].weight)
    assert not torch.equal(net[4].weight, model[4].weight)
    seen, target = outputs(net[:4], x), outputs(model, x)
    trained = float((outputs(model[4], seen) - target).square().sum())
    mended = float((outputs(net[4], seen) - target).square().sum())
    least = least_squares(seen, target, 3)
    assert least < 0.9 * trained
    assert least * (1 - 1e-6) <= mended <= 1.01 * least


def test_layers_whose_mean_cannot_move_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    ).eval()
    x = images(128)
    before = copy.deepcopy(model)
    converted, _ = refitted(model, x, {"0": Pair(2, 1, 1, False)})
    moved = [
        i for i in range(1, 5)
        if not torch.equal(converted.model[i].weight, model[i].weight)
    ]  # fmt: skip
    assert moved == [1, 4]
    assert not torch.equal(converted.model[5].running_mean, model[5].running_mean)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), f"{name} of the original was changed"


def test_pairs_keep_what_counts() -> None:
    """The channel that counts most loses less than it would if all counted alike."""
    model, x = pointwise(norm=False), images()
    mapped, target = trace(model, (x[:2],)), outputs(model[:3], x)
    counts = torch.full((16,), 0.5, dtype=torch.float64)
    counts[5] = 8.5
    errors = []
    for importance in ({}, {"2": counts}):
        converted = convert(model, mapped, {"2": Pair(3, 1, 1, False)})
        refit(model, converted, every(x), NOTHING_KEPT, importance)
        off = outputs(converted.model[:3], x) - target
        errors.append(off.double().square().sum((0, 2, 3)))
    plain, weighed = errors
    assert weighed[5] < 0.5 * plain[5]
    assert (counts * weighed).sum() < (counts * plain).sum()
    assert plain.sum() < weighed.sum()
