"""One small member of many CNN families: traced, converted, saved and loaded."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torchvision.models import get_model

from groupconv.optimize.convert import convert
from groupconv.optimize.fold import reorder
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import load, save_weights
from groupconv.optimize.trace import trace
from groupconv.optimize.walk import flat

# Name of torchvision, or timm:NAME of timm, and the image size where 64 is too small.
QUICK = [
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "timm:regnetx_002",
    "timm:convnext_atto",
]
SLOW = [
    "resnext50_32x4d", "wide_resnet50_2", "regnet_y_400mf", "densenet121", "vgg11_bn", "alexnet",
    "googlenet", "inception_v3@96", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
    "timm:mobilenetv1_100", "timm:mobilenetv4_conv_small", "timm:efficientnet_lite0",
    "timm:tf_efficientnet_lite0", "timm:ghostnet_050", "timm:mixnet_s", "timm:xception41",
    "timm:repvgg_a0", "timm:dla46_c", "timm:hrnet_w18_small", "timm:res2net50_26w_4s",
    "timm:cspdarknet53", "timm:eca_nfnet_l0", "timm:ese_vovnet19b_dw", "timm:dpn68",
    "timm:mobileone_s0", "timm:skresnet18", "timm:selecsls42", "timm:gernet_s",
]  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return pytest.importorskip("timm").create_model(name.removeprefix("timm:"))
    backbone = {"weights_backbone": None} if name.split("_")[0] in _SEGMENTATION else {}
    fixed = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, **backbone, **fixed)


_SEGMENTATION = ("fcn", "deeplabv3", "lraspp")


def normalized(name: str) -> nn.Module:
    """With statistics and weights of its own in every norm, so that no two channels are alike."""
    model = build(name).eval()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            low, high = (0.5, 1.5) if key.endswith(("weight", "var")) else (-0.2, 0.2)
            tensor.data.uniform_(low, high, generator=generator)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    tensors = out.values() if isinstance(out, dict) else flat([out])
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def planted(model: nn.Module, name: str, rng: np.random.Generator) -> Partition:
    """Two random groups; the weights between them are set to zero."""
    conv = model.get_submodule(name)
    columns, rows = (rng.permutation(n) for n in (conv.in_channels, conv.out_channels))
    keep = torch.zeros_like(conv.weight)
    for outs, ins in zip(np.split(rows, 2), np.split(columns, 2), strict=True):
        keep[np.ix_(outs, ins)] = 1
    conv.weight.mul_(keep)
    return Partition(2, tuple(columns.tolist()), tuple(rows.tolist()))


def check(name: str, folder: Path) -> None:
    name, _, size = name.partition("@")
    model = normalized(name)
    rng, x = np.random.default_rng(0), torch.randn(2, 3, *[int(size or 64)] * 2)
    mapped = trace(model, (x,))
    expected = outputs(model, x)
    scale = float(expected.abs().max())

    def compare(net: nn.Module, tolerance: float) -> None:
        assert_close(outputs(net, x), expected, rtol=tolerance, atol=tolerance * scale)

    compare(convert(model, mapped, {}).model, 1e-6)
    reordered = copy.deepcopy(model)
    orders = {
        i: rng.permutation(space.channels).tolist()
        for i, space in enumerate(mapped.spaces)
        if space.fixed is None
    }
    reorder(reordered, mapped.members, orders)
    compare(reordered, 1e-5)

    cut = [
        conv.name
        for conv in mapped.convs
        if not conv.spec.linear
        and conv.spec.groups == 1
        and conv.spec.in_channels % 2 == conv.spec.out_channels % 2 == 0
    ]
    plan = {layer: planted(model, layer, rng) for layer in cut}
    expected = outputs(model, x)
    converted = convert(model, mapped, plan)
    compare(converted.model, 1e-5)
    assert set(converted.edits) == set(cut)
    save_weights(folder, converted)
    compare(load(folder, build(name)), 1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SLOW)
def test_family(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
