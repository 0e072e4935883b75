"""Layers whose weight a norm computes: baked, traced, converted, loaded."""

from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from groupconv.optimize.bake import bake
from groupconv.optimize.convert import convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import load, save_weights
from groupconv.optimize.trace import trace

WRAPS = [spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm]


def build(wrap: object) -> nn.Sequential:
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    return nn.Sequential(convs[0], nn.ReLU(), wrap(convs[1]), convs[2])


@pytest.mark.parametrize("wrap", WRAPS)
def test_baked_and_converted(wrap: object, tmp_path: Path) -> None:
    x, model = torch.randn(2, 3, 8, 8), build(wrap).eval()
    with torch.no_grad():
        expected = model(x)
        assert "2" in trace(model, (x,)).skipped
        plain, names = bake(model)
        assert names == ("2",)
        assert_close(plain(x), expected, rtol=1e-6, atol=1e-6)
        assert_close(model(x), expected, rtol=0, atol=0)
        mapped = trace(plain, (x,))
        assert mapped.skipped == {}
        converted = convert(plain, mapped, {"2": Partition.identity(2, 8, 8)})
        save_weights(tmp_path, converted, (), names)
        assert_close(load(tmp_path, build(wrap))(x), converted.model(x), rtol=0, atol=0)


def test_nothing_to_bake() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert bake(model) == (model, ())
