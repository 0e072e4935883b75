"""Networks that no kept library has."""

from groupconv.models.fashion_resnet import FashionResNet, fashion_resnet
from groupconv.models.shufflenet_v1 import ShuffleNetV1, shufflenet_v1

__all__ = ["FashionResNet", "ShuffleNetV1", "fashion_resnet", "shufflenet_v1"]
