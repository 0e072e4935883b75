"""The networks of the literature that :mod:`benchmarks.systems` takes through the whole job."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.zoo import settled, smooth, timm_model, vision
from groupconv.models.biggan import BigGAN
from groupconv.models.shufflenet_v1 import ShuffleNetV1
from groupconv.models.stylegan2 import StyleGAN2
from groupconv.models.yolov3 import YOLOv3

# Images to calibrate on, of a full size and of a small network.
_IMAGES, _FEW = 64, 16
# MobileNets have less to give: what could be separated in them is separated.
_MOBILE = "1.22x"
_CLASSES, _FEW_CLASSES = 1000, 5


@dataclass(frozen=True)
class System:
    """One network, at full size and as a small one by the same code.

    Args:
        make, make_small: the networks.
        macs, params: that its authors count, or None where they don't say.
        size, small_size: rows and columns of the images.
        keep: layers to leave as they are.
        small_keep: more of them in the small one.
        budget: of its time on the target.
        small_budget: of its multiply-adds: many of some are in layers that can't change, or are
            kept so that the survey is short.
        latents: the inputs of a generator for so many images, instead of images.
        finds: whether it finds objects: then it runs in PyTorch alone, if need be with native code
            for its parts, and no file format holds it.
    """

    make: Callable[[], nn.Module]
    make_small: Callable[[], nn.Module]
    macs: float | None
    params: float | None
    size: int = 224
    small_size: int = 64
    keep: tuple[str, ...] = ("first", "last")
    small_keep: tuple[str, ...] = ()
    budget: str = "1.35x"
    small_budget: str = "70%macs"
    latents: Callable[[bool, int], Tensor] | None = None
    finds: bool = False

    def inputs(self, small: bool, count: int | None = None) -> Tensor:
        """So many inputs, by default as many as are calibrated on; the same at every call."""
        count = count or (_FEW if small else _IMAGES)
        if self.latents is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                return self.latents(small, count)
        return smooth(count, self.small_size if small else self.size)

    def build(self, small: bool) -> nn.Module:
        """In evaluation mode, with random weights; every batch norm has real statistics."""
        return settled(self.make_small if small else self.make, self.inputs(small, 8).split(4))


def _small_resnet(groups: int = 1, width_per_group: int = 16) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], groups=groups, width_per_group=width_per_group
    )


def _small_densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16)


def _small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)])


def _small_efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    stages = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(6, 5, 2, 8, 16, 2)]
    return EfficientNet(stages, dropout=0.2, last_channel=128)


def _mask_rcnn() -> nn.Module:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)


def small_mask_rcnn(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """torchvision's, on a pyramid of two levels, with heads of few channels."""
    from torchvision.models import detection, resnet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    net = detection.MaskRCNN(
        BackboneWithFPN(body, {"layer1": "0", "layer2": "1"}, [64, 128], 32),
        min_size=64, max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        box_head=TwoMLPHead(32 * 7 * 7, 32), box_predictor=FastRCNNPredictor(32, 4),
        mask_head=MaskRCNNHeads(32, (16,), 1), mask_predictor=MaskRCNNPredictor(16, 8, 4),
        box_detections_per_img=5, rpn_post_nms_top_n_test=20,
    )  # fmt: skip
    # Untrained, a mask is as likely as not: all of a box is taken.
    nn.init.constant_(net.roi_heads.mask_predictor.mask_fcn_logits.bias, 2.0)
    return net


def _biggan(classes: int, channels: int) -> nn.Module:
    net = BigGAN(classes, channels)
    # At the beginning of training it is 0, and attention does nothing.
    nn.init.constant_(net.attention.gamma, 0.5)
    return net


def _with_class(small: bool, count: int) -> Tensor:
    classes = _FEW_CLASSES if small else _CLASSES
    latent = torch.randn(count, BigGAN.latent_dim)
    return torch.cat([latent, torch.eye(classes)[torch.randint(classes, (count,))]], 1)


# Multiply-adds and parameters are those of the papers; of ResNet-50 and DenseNet-121, whose
# PyTorch forms differ, of torchvision's documentation, and of YOLO v3 of Darknet's log and file.
SYSTEMS: dict[str, System] = {
    "mobilenet_v1": System(
        timm_model("mobilenetv1_100"), timm_model("mobilenetv1_100"), 569e6, 4.2e6,
        small_keep=("blocks.[0-3].*", "blocks.4.1.*"), budget=_MOBILE, small_budget="98%macs",
    ),
    "mobilenet_v2": System(
        vision("mobilenet_v2"), vision("mobilenet_v2", width_mult=0.25), 300e6, 3.4e6,
        budget=_MOBILE,
    ),
    "mobilenet_v3_large": System(
        vision("mobilenet_v3_large"), vision("mobilenet_v3_small", width_mult=0.5), 219e6, 5.4e6,
        budget=_MOBILE,
    ),
    "mobilenet_v3_small": System(
        vision("mobilenet_v3_small"), vision("mobilenet_v3_small", width_mult=0.5), 56e6, 2.5e6,
        budget=_MOBILE,
    ),
    "shufflenet_v1": System(
        lambda: ShuffleNetV1(3), lambda: ShuffleNetV1(3, 0.25), 137e6, 1_865_728,
        small_budget="99%macs",
    ),
    "shufflenet_v2": System(
        vision("shufflenet_v2_x1_0"), vision("shufflenet_v2_x0_5"), 146e6, 2.3e6
    ),
    "xception": System(
        timm_model("legacy_xception"), timm_model("legacy_xception"), 8.4e9, 22_855_952, size=299,
        small_keep=("block[1-9]*", "conv4.*"), small_budget="97%macs",
    ),
    "resnext50": System(
        vision("resnext50_32x4d"), lambda: _small_resnet(8, 4), 4.2e9, 25.0e6
    ),
    "regnetx_004": System(timm_model("regnetx_004"), timm_model("regnetx_002"), 400e6, 5.2e6),
    "yolov3": System(
        YOLOv3, lambda: YOLOv3(3, 0.125), 65.86e9 / 2, 61.9e6, size=416,
        keep=("first", "heads.*"),
    ),
    "mask_rcnn": System(
        _mask_rcnn, small_mask_rcnn, None, 44_401_393, size=800, small_budget="85%macs",
        finds=True,
    ),
    "biggan": System(
        lambda: _biggan(_CLASSES, 96), lambda: _biggan(_FEW_CLASSES, 8), None, 70_433_988,
        keep=("first", "last", "*.gain", "*.bias"), latents=_with_class,
    ),
    "stylegan2": System(
        StyleGAN2, lambda: StyleGAN2(32, 1 / 16), None, 30_370_060,
        keep=("first", "mapping.*", "*.affine"),
        latents=lambda _, count: torch.randn(count, StyleGAN2.latent_dim),
    ),
    "squeezenet": System(vision("squeezenet1_1"), vision("squeezenet1_1"), None, 1.24e6),
    "vgg16": System(
        vision("vgg16"), vision("vgg11"), 15.3e9, 138e6, keep=("first", "classifier.*"),
        small_keep=("features.[6-9]", "features.1?"), small_budget="95%macs",
    ),
    "resnet50": System(vision("resnet50"), _small_resnet, 4.09e9, 25_557_032),
    "densenet121": System(vision("densenet121"), _small_densenet, 2.83e9, 7_978_856),
    "efficientnet_b0": System(
        vision("efficientnet_b0"), _small_efficientnet, 390e6, 5.3e6
    ),
    "convnext_tiny": System(
        vision("convnext_tiny"), _small_convnext, 4.5e9, 28.6e6, small_budget="95%macs"
    ),
}  # fmt: skip
