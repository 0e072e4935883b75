"""The networks that are timed as wholes: random weights, real statistics in every batch norm."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv.nn import ChannelShuffle, GroupConv2d

# Images per batch, and batches, from which batch norms take their statistics.
_BATCH, _BATCHES = 4, 2


def vision(name: str, **config: float) -> Callable[[], nn.Module]:
    """What makes a network of torchvision, with random weights; ``config`` is for its class."""

    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, **config)

    return make


def timm_model(name: str) -> Callable[[], nn.Module]:
    """What makes a network of timm, with random weights."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


def _shufflenet_v1(groups: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from groupconv.models import shufflenet_v1

        net = shufflenet_v1(groups)
        # Eager PyTorch is a peer: it runs its own layers and not ours.
        for part in net.modules():
            if type(part) is GroupConv2d:
                part.__class__ = nn.Conv2d
            elif type(part) is ChannelShuffle:
                part.__class__ = nn.ChannelShuffle
        return net

    return make


def _resnet50_grouped() -> nn.Module:
    """ResNet-50 with 45% of its MACs: in every block the 3x3 layer has 4 groups, the pointwise ones
    2, as if their channels were in the right order already."""
    from torchvision import models

    net = models.resnet50(weights=None)
    for block in net.modules():
        if isinstance(block, models.resnet.Bottleneck):
            for name, groups in (("conv1", 2), ("conv2", 4), ("conv3", 2)):
                dense = getattr(block, name)
                grouped = nn.Conv2d(
                    dense.in_channels,
                    dense.out_channels,
                    dense.kernel_size,
                    stride=dense.stride,
                    padding=dense.padding,
                    groups=groups,
                    bias=False,
                )
                setattr(block, name, grouped)
    return net


def _tiny() -> nn.Module:
    """Hardly any arithmetic: its time is what a call costs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
    )


TINY = "tiny"
# Name to what makes the network.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": vision("resnet50"),
    "resnet50_grouped": _resnet50_grouped,
    "resnext50_32x4d": vision("resnext50_32x4d"),
    "regnetx_004": timm_model("regnetx_004"),
    "regnety_016": timm_model("regnety_016"),
    "shufflenet_v2_x1_0": vision("shufflenet_v2_x1_0"),
    "shufflenet_v1_g3": _shufflenet_v1(3),
    "shufflenet_v1_g8": _shufflenet_v1(8),
    "mobilenetv1": timm_model("mobilenetv1_100"),
    "mobilenetv2_100": vision("mobilenet_v2"),
    "mobilenet_v3_large": vision("mobilenet_v3_large"),
    "efficientnet_lite0": timm_model("efficientnet_lite0"),
    "efficientnet_b0": vision("efficientnet_b0"),
    "mixnet_s": timm_model("mixnet_s"),
    "xception": timm_model("legacy_xception"),
    "convnext_tiny": vision("convnext_tiny"),
    "squeezenet1_1": vision("squeezenet1_1"),
    "ghostnet_100": timm_model("ghostnet_100"),
    TINY: _tiny,
}
QUICK = ("shufflenet_v1_g3", "mobilenetv2_100", "resnext50_32x4d")
_SIZES = {"xception": 299, TINY: 16}


def size(name: str) -> int:
    """Rows and columns of a network's images."""
    return _SIZES.get(name, 224)


def images(name: str, batch: int, seed: int = 1) -> Tensor:
    """Images ``(batch, 3, size, size)`` for a network."""
    return smooth(batch, size(name), seed)


def smooth(batch: int, side: int, seed: int = 1) -> Tensor:
    """Random images ``(batch, 3, side, side)``, of mean 0 and variance about 1.

    White noise would be averaged away by the first layers of a network.
    """
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 8, 8, generator=random)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return smooth + 0.2 * torch.randn(batch, 3, side, side, generator=random)


def build(name: str) -> nn.Module:
    """A network in eval mode; the same weights at every call."""
    seen = (images(name, _BATCH, seed=100 + seed) for seed in range(_BATCHES))
    return settled(NETWORKS[name], seen)


def settled(make: Callable[[], nn.Module], batches: Iterable[Tensor]) -> nn.Module:
    """A network as if it were trained, in eval mode; the same weights at every call.

    Every batch norm has scales and shifts of its own and statistics of random images, so that no
    layer is one that folds away: timm starts the last scale of a block at 0, torchvision ConvNeXt's
    layer scales at 1e-6.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = make().eval()
        for key, parameter in net.named_parameters():
            if key.endswith("layer_scale"):
                parameter.fill_(1.0)
        norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
            # The mean over all batches, and not a moving one.
            norm.momentum = None
            norm.train()
        if norms:
            for batch in batches:
                net(batch)
        net.eval()
    return net.requires_grad_(False)
