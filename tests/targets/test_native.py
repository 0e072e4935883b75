"""Networks on the library's own kernels: the same outputs, the module itself as it was."""

import copy

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn

from groupconv import nn as gnn
from groupconv.targets import get_target
from groupconv.targets.native import on_kernels

OURS = {
    nn.Conv1d: gnn.GroupConv1d,
    nn.Conv2d: gnn.GroupConv2d,
    nn.Conv3d: gnn.GroupConv3d,
    nn.ConvTranspose1d: gnn.GroupConvTranspose1d,
    nn.ConvTranspose2d: gnn.GroupConvTranspose2d,
    nn.ConvTranspose3d: gnn.GroupConvTranspose3d,
}


class Doubled(nn.Conv2d):
    """Of a user, with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"groups": 4, "bias": False}, {"groups": 2, "dilation": 2}],
    ids=str,
)
def test_every_class_of_torch_runs_on_ours(
    cls: type[nn.modules.conv._ConvNd], options: dict[str, int | bool]
) -> None:
    torch.manual_seed(0)
    layer = cls(8, 12, 3, **options).eval()
    x = torch.randn(2, 8, *[9] * len(layer.kernel_size))
    net = on_kernels(layer)
    assert type(net) is OURS[cls]
    assert type(layer) is cls
    assert_close(outputs(net, x), outputs(layer, x), rtol=1e-5, atol=1e-5)
    assert net.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_stays_what_it_is(mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode=mode).eval()
    x = torch.randn(2, 4, 7, 6)
    net = on_kernels(layer)
    assert net.padding_mode == mode
    assert_close(outputs(net, x), outputs(layer, x), rtol=1e-5, atol=1e-5)


def test_a_network_and_what_is_left_alone() -> None:
    torch.manual_seed(0)
    seen: list[tuple[int, ...]] = []
    shared = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), shared, Doubled(8, 8, 1), shared,
        gnn.GroupConv2d(8, 8, 1, groups=2), nn.Flatten(), nn.LazyLinear(5),
    ).eval()  # fmt: skip
    x = images(4)
    model(x)
    model[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    before = copy.deepcopy(model.state_dict())
    classes = [type(part) for part in model.modules()]
    expected = outputs(model, x)
    seen.clear()
    net = on_kernels(model)
    assert_close(outputs(net, x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [(4, 8, 10, 10)]
    kinds = [type(part) for part in net]
    assert kinds[0] is kinds[3] is kinds[6] is gnn.GroupConv2d
    assert kinds[4] is Doubled
    assert net[3] is net[5]
    assert [type(part) for part in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
