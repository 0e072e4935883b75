"""Small members of the families of convolutional networks that timm and torchvision have.

Each compiles and gives eager PyTorch's results; what PyTorch has to run of it is named here.
"""

import pytest
import torch
from compiler.eager import cuts, runs
from compiler.test_networks import models, realistic, smooth, timm_net
from torch import nn

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
SIZES = {}
# Operators that are not native, with all others that run beside them.
CUTS: dict[str, set[str]] = {}
# fmt: on
NAMES = [*(f"timm {name}" for name in TIMM), *(f"torchvision {name}" for name in VISION)]


def build(name: str) -> nn.Module:
    library, _, short = name.partition(" ")
    if library == "timm":
        return timm_net(short)()
    segments = short in models.list_models(module=models.segmentation)
    return models.get_model(short, weights=None, **{"weights_backbone": None} if segments else {})


@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    net = realistic(build(name), size)
    x = smooth(2, size, size)
    compiled = groupconv.compile(net, x)
    runs(compiled, net, x, tolerance=1e-4)
    assert set(cuts(compiled)) == CUTS.get(name, set())
