"""ShuffleNet v1: sizes of the paper and of the usual implementations, gradients, illegal widths."""

import math

import pytest
import torch

from groupconv.errors import ArgumentError
from groupconv.models import ShuffleNetV1, shufflenet_v1
from groupconv.optimize import profile


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("groups", "parameters", "macs"),
    [
        (1, 1_531_936, 143),
        (2, 1_733_848, 140),
        (3, 1_865_728, 137),
        (4, 1_968_344, 133),
        (8, 2_434_768, 137),
    ],
)
def test_sizes_at_width_1(groups: int, parameters: int, macs: int) -> None:
    """The paper's table 1 has 143, 140, 137, 133 and 137 million multiply-adds of convolutions."""
    with torch.device("meta"):
        model = shufflenet_v1(groups).eval()
    assert _parameters(model) == parameters
    found = profile(model, torch.empty(1, 3, 224, 224, device="meta"), latency=False).macs
    assert (found - model.fc.weight.numel()) / 1e6 == pytest.approx(macs, abs=0.55)


@pytest.mark.parametrize(
    ("groups", "width", "parameters"),
    [
        (1, 0.25, 209_746),
        (1, 0.5, 534_484),
        (1, 0.75, 975_214),
        (3, 0.25, 305_902),
        (3, 0.5, 718_324),
        (3, 0.75, 1_238_266),
    ],
)
def test_sizes_at_other_widths(groups: int, width: float, parameters: int) -> None:
    """As published by others who scale every layer, the first too, as the paper says."""
    with torch.device("meta"):
        assert _parameters(shufflenet_v1(groups, width)) == parameters


@pytest.mark.parametrize("width", [0.25, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_every_width_has_legal_channels(groups: int, width: float) -> None:
    with torch.device("meta"):
        model = shufflenet_v1(groups, width, num_classes=10).eval()
        whole = shufflenet_v1(groups)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
    for stage, full in zip(model.stages, whole.stages, strict=True):
        channels, wanted = (part[-1].conv3.out_channels for part in (stage, full))
        assert abs(channels - wanted * width) <= 2 * groups
        assert channels % (4 * groups) == 0


def test_gradients_reach_every_parameter() -> None:
    model = shufflenet_v1(3, 0.25, num_classes=10)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "groups=5"),
        ((3, 0), "width=0 must be"),
        ((3, -1.0), "width=-1.0 must be"),
        ((3, math.nan), "width=nan must be"),
        ((3, math.inf), "width=inf must be"),
        ((8, 0.01), "width=0.01 is too small for groups=8"),
    ],
)
def test_illegal_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ShuffleNetV1(*arguments)
