"""Whole networks: eager PyTorch's results at every batch and size, and what PyTorch has to run."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiler.eager import cuts, runs
from torch import Tensor, nn

import groupconv
from groupconv.compiler.compiled import Compiled
from groupconv.models import shufflenet_v1

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def smooth(batch: int, *size: int, seed: int = 1, channels: int = 3) -> Tensor:
    """Images of mean 0 and variance about 1; layers don't average them away as they do noise."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 4, 4, generator=random)
    images = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return images + 0.3 * torch.randn(images.shape, generator=random)


@torch.no_grad()
def realistic(net: nn.Module, size: int) -> nn.Module:
    """In evaluation mode, no layer of which folds away: scales and shifts of its own for every
    normalisation, and batch norms with the statistics of images."""
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if name.endswith(("gamma", "layer_scale", "layer_scale.scale")):
            parameter.fill_(1.0)
    net.eval()
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
        # The mean over all batches, and not a moving one.
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    for seed in range(4):
        net(smooth(8, size, size, seed=10 + seed))
    return net.eval().requires_grad_(False)


def timm_net(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False)


def vision(name: str) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None)


# Those that the benchmark times, and the smallest size of images that they take.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (vision("resnet50"), 32),
    "resnext50_32x4d": (vision("resnext50_32x4d"), 32),
    "regnetx_004": (timm_net("regnetx_004"), 32),
    "regnety_016": (timm_net("regnety_016"), 32),
    "shufflenet_v2_x1_0": (vision("shufflenet_v2_x1_0"), 32),
    "shufflenet_v1_g3": (lambda: shufflenet_v1(3), 64),
    "shufflenet_v1_g8": (lambda: shufflenet_v1(8), 64),
    "mobilenetv1": (timm_net("mobilenetv1_100"), 32),
    "mobilenetv2_100": (vision("mobilenet_v2"), 32),
    "mobilenet_v3_large": (vision("mobilenet_v3_large"), 32),
    "efficientnet_lite0": (timm_net("efficientnet_lite0"), 32),
    "efficientnet_b0": (vision("efficientnet_b0"), 32),
    "mixnet_s": (timm_net("mixnet_s"), 32),
    "xception": (timm_net("legacy_xception"), 64),
    "convnext_tiny": (vision("convnext_tiny"), 32),
    "squeezenet1_1": (vision("squeezenet1_1"), 32),
    "ghostnet_100": (timm_net("ghostnet_100"), 32),
}
QUICK = ("shufflenet_v2_x1_0", "mobilenet_v3_large", "mixnet_s", "ghostnet_100")
SWEPT = [
    pytest.param(name, marks=pytest.mark.release if number % 4 else pytest.mark.slow)
    for number, name in enumerate(NETWORKS)
]


def native(name: str, *sizes: tuple[int, ...]) -> Compiled:
    """The network, found to equal eager for images of all ``sizes``, batch first."""
    make, smallest = NETWORKS[name]
    torch.manual_seed(0)
    net = realistic(make(), 2 * smallest)
    compiled = groupconv.compile(net, smooth(*sizes[0]))
    for size in sizes:
        runs(compiled, net, smooth(*size), tolerance=1e-4)
    assert cuts(compiled) == {}
    return compiled


@pytest.mark.parametrize("name", QUICK)
def test_network(name: str) -> None:
    smallest = NETWORKS[name][1]
    native(name, (2, smallest, smallest))


@pytest.mark.parametrize("name", SWEPT)
def test_networks_at_two_sizes(name: str) -> None:
    smallest = NETWORKS[name][1]
    sizes = ((smallest, smallest), (2 * smallest, 3 * smallest))
    compiled = native(name, *((batch, *size) for batch in (1, 2, 5) for size in sizes))
    x = smooth(2, smallest, smallest)
    ours = compiled(x.to(memory_format=torch.channels_last))
    assert (ours - compiled(x)).abs().max() <= 1e-4 * ours.abs().max()


@pytest.mark.parametrize("name", SWEPT)
def test_networks_at_odd_sizes(name: str) -> None:
    """Whatever eager PyTorch takes, down to one pixel."""
    make, smallest = NETWORKS[name]
    net = realistic(make(), 2 * smallest)
    usable = []
    for size in ((1, 1), (1, 50), (37, 1), (223, 227)):
        try:
            with torch.no_grad():
                net(smooth(1, *size))
        except RuntimeError:
            continue
        usable.append((1, *size))
    assert usable
    native(name, *usable)
