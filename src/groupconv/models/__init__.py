"""Networks that no kept library has."""

from groupconv.models.biggan import BigGAN
from groupconv.models.fashion_resnet import FashionResNet, fashion_resnet
from groupconv.models.shufflenet_v1 import ShuffleNetV1, shufflenet_v1
from groupconv.models.stylegan2 import StyleGAN2
from groupconv.models.yolov3 import YOLOv3

__all__ = [
    "BigGAN",
    "FashionResNet",
    "ShuffleNetV1",
    "StyleGAN2",
    "YOLOv3",
    "fashion_resnet",
    "shufflenet_v1",
]
