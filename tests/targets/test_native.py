"""Networks on the library's own kernels: the same outputs, the module itself as it was."""

import copy

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.targets import get_target


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_what_the_target_times_gives_the_same_outputs() -> None:
    """And leaves the network and the images as they were, their order in memory too."""
    model, x = residual(), images(3)
    whole, expected = copy.deepcopy(model.state_dict()), outputs(model, x)
    given = x.clone()
    call = get_target("native").build(model, (x,))
    assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, given)
    assert type(model.conv1) is nn.Conv2d
    assert model.conv1.weight.is_contiguous()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_inputs_without_a_height_are_timed_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU()).eval(), torch.randn(2, 4, 9)
    assert_close(get_target("native").build(model, (x,))(), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_a_layer_alone_costs_no_change_of_layout() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=2).eval()
    y = get_target("native").build(layer, (torch.randn(2, 4, 12, 12),))()
    assert isinstance(y, Tensor)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ArgumentError, match="training mode"):
        get_target("native").build(nn.Conv2d(3, 8, 3), (images(2),))
