"""Small members of the families of convolutional networks that timm and torchvision have.

Each compiles and gives eager PyTorch's results; what PyTorch has to run of it is named here.
"""

import copy

import pytest
import torch
from compiler.eager import cuts, runs
from compiler.test_networks import models, realistic, smooth, timm_net
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import groupconv

# fmt: off
TIMM = (
    "bat_resnext26ts", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cpubone_nano",
    "cs3darknet_s", "csatv2", "cspnext_tiny", "cspresnet50", "darknet17", "densenetblur121d",
    "dla34", "dla46_c", "dla46x_c", "dpn48b", "eca_nfnet_l0", "eca_resnext26ts", "ecaresnet26t",
    "edgenext_xx_small", "efficientnet_es", "efficientnet_lite0", "efficientvit_b0",
    "ese_vovnet19b_dw", "ese_vovnet19b_slim_dw", "fasternet_t0", "fastvit_t8", "fbnetc_100",
    "fbnetv3_b", "gcresnext26ts", "gernet_s", "ghostnet_050", "ghostnetv2_100", "ghostnetv3_050",
    "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_v4", "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_seresnext26_32x4d",
    "legacy_xception", "lowformer_b0", "mambaout_femto", "mixnet_s", "mnasnet_small",
    "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobileone_s0",
    "mobilevit_xxs", "mobilevitv2_050", "nf_regnet_b0", "nf_resnet26", "poolformer_s12",
    "poolformerv2_s12", "rdnet_tiny", "regnetx_002", "regnety_002", "regnetz_005",
    "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "res2next50", "resnest14d",
    "resnet10t", "resnetblur18", "resnetrs50", "resnetv2_18", "rexnet_100", "selecsls42",
    "semnasnet_050", "seresnext26ts", "shvit_s1", "skresnet18", "spnasnet_100", "starnet_s050",
    "swiftformer_xs", "tf_mobilenetv3_small_minimal_100", "tinynet_e", "tresnet_m", "vovnet39a",
    "xception41", "xception41p",
)
VISION = (
    "alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0",
    "efficientnet_v2_s", "fcn_resnet50", "googlenet", "inception_v3", "lraspp_mobilenet_v3_large",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf",
    "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "vgg11_bn",
    "wide_resnet50_2",
)
# Rows and columns where 64 are too few.
SIZES = {"timm bat_resnext26ts": 256, "timm inception_v4": 128, "torchvision inception_v3": 128}
# Operators that PyTorch runs, those that are native elsewhere but not beside others included.
CUTS = {
    "timm bat_resnext26ts": {"bmm.default", "cat.default", "div.Tensor", "expand.default",
        "reshape.default", "split.Tensor", "sum.dim_IntList"},
    "timm cpubone_nano": {"_safe_softmax.default", "bmm.default", "expand.default",
        "native_group_norm.default", "permute.default", "reshape.default", "split.Tensor",
        "transpose.int"},
    "timm csatv2": {"_scaled_dot_product_flash_attention_for_cpu.default", "addcmul.default",
        "amax.default", "expand.default", "index.Tensor", "mean.dim", "mm.default",
        "movedim.int", "permute.default", "reshape.default", "transpose.int", "unbind.int",
        "unflatten.int"},
    "timm densenetblur121d": {"reflection_pad2d.default"},
    "timm edgenext_xx_small": {"bmm.default", "expand.default", "linalg_vector_norm.default",
        "permute.default", "reshape.default", "unbind.int"},
    "timm gcresnext26ts": {"bmm.default"},
    "timm iformer_t": {"_safe_softmax.default", "bmm.default"},
    "timm lowformer_b0": {"_safe_softmax.default", "bmm.default", "expand.default",
        "native_group_norm.default", "permute.default", "reshape.default", "split.Tensor",
        "transpose.int"},
    "timm mobilevit_xxs": {"_scaled_dot_product_flash_attention_for_cpu.default",
        "reshape.default", "transpose.int"},
    "timm poolformer_s12": {"native_group_norm.default"},
    "timm shvit_s1": {"bmm.default", "native_group_norm.default"},
    "timm convnextv2_atto": {"addcmul.default", "mean.dim"},
    "timm efficientvit_b0": {"bmm.default", "reshape.default", "transpose.int"},
    "timm mambaout_femto": {"cat.default"},
    "timm mobilevitv2_050": {"native_group_norm.default", "permute.default",
        "reshape.default", "sum.dim_IntList"},
    "timm poolformerv2_s12": {"native_group_norm.default"},
    "timm resnest14d": {"mul.Tensor", "sum.dim_IntList"},
    "timm resnetblur18": {"reflection_pad2d.default"},
    "timm skresnet18": {"mul.Tensor", "sum.dim_IntList"},
    "timm tresnet_m": {"permute.default", "reflection_pad2d.default", "reshape.default"},
}
# fmt: on
NAMES = [*(f"timm {name}" for name in TIMM), *(f"torchvision {name}" for name in VISION)]


def build(name: str) -> nn.Module:
    library, _, short = name.partition(" ")
    if library == "timm":
        return timm_net(short)()
    segments = short in models.list_models(module=models.segmentation)
    return models.get_model(short, weights=None, **{"weights_backbone": None} if segments else {})


def error(net: nn.Module, x: Tensor) -> float:
    """Of eager PyTorch against float64, over the largest number of the worst output."""
    with torch.no_grad():
        rough = pytree.tree_leaves(net(x))
        exact = pytree.tree_leaves(copy.deepcopy(net).double()(x.double()))
    return max(
        ((y - z).abs().max() / z.abs().max()).item() for y, z in zip(rough, exact, strict=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.release if number % 4 else pytest.mark.slow)
        for number, name in enumerate(NAMES)
    ],
)
def test_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    net, x = realistic(build(name), size), smooth(2, size, size)
    compiled = groupconv.compile(net, x)
    runs(compiled, net, x, tolerance=max(1e-4, 4 * error(net, x)))
    assert {cut.removeprefix("aten.") for cut in cuts(compiled)} == CUTS.get(name, set())
