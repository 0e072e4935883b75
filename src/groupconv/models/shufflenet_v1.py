"""ShuffleNet v1 (Zhang et al. 2018, https://arxiv.org/abs/1707.01083)."""

import itertools
import math

from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.nn import GroupConv2d, ShuffleUnit

# Channels of the three stages at width 1, by number of groups (table 1 of the paper).
_STAGE_CHANNELS = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
_STAGE_UNITS = (4, 8, 4)
_STEM_CHANNELS = 24


class ShuffleNetV1(nn.Module):
    """Grouped pointwise layers joined by channel shuffles.

    Args:
        groups: 1, 2, 3, 4 or 8, of the pointwise layers.
        width: multiplies the channels of every layer, the first included; 0.25, 0.5, 1, 1.5 and 2
            are usual. Products go to the nearest number that the groups divide.
        num_classes: size of the output.

    Shape:
        Input ``(N, 3, H, W)``, 224x224 in the paper; output logits ``(N, num_classes)``.

    Raises:
        ArgumentError: groups is not one of the paper's, or width is so small that the channels
            don't grow from stage to stage.
    """

    def __init__(self, groups: int = 3, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        if groups not in _STAGE_CHANNELS:
            raise ArgumentError(
                f"ShuffleNetV1: groups={groups!r} must be one of {sorted(_STAGE_CHANNELS)}"
            )
        channels, *stage_channels = _channels(groups, width)
        self.conv1 = nn.Sequential(
            GroupConv2d(3, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        for stage, (out_channels, units) in enumerate(
            zip(stage_channels, _STAGE_UNITS, strict=True)
        ):
            layers = []
            for unit in range(units):
                layers.append(
                    ShuffleUnit(
                        channels,
                        out_channels,
                        groups,
                        stride=2 if unit == 0 else 1,
                        first_grouped=(stage, unit) != (0, 0),
                    )
                )
                channels = out_channels
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.maxpool(self.conv1(x)))
        return self.fc(self.pool(x).flatten(1))


def _channels(groups: int, width: float) -> list[int]:
    """Of the first layer and of each stage."""
    if not 0 < width < math.inf:
        raise ArgumentError(f"ShuffleNetV1: width={width!r} must be a positive number")
    channels = [_nearest(_STEM_CHANNELS * width, groups)]
    # A quarter of a stage's channels are hidden ones, which the groups divide too.
    channels += [_nearest(full * width, 4 * groups) for full in _STAGE_CHANNELS[groups]]
    if not channels[0] or any(a >= b for a, b in itertools.pairwise(channels)):
        raise ArgumentError(
            f"ShuffleNetV1: width={width!r} is too small for groups={groups}: it gives {channels} "
            "channels, which must grow from stage to stage"
        )
    return channels


def _nearest(channels: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, the larger of two."""
    return int(channels / divisor + 0.5) * divisor


def shufflenet_v1(groups: int = 3, width: float = 1.0, num_classes: int = 1000) -> ShuffleNetV1:
    """ShuffleNet v1 with random weights; see :class:`ShuffleNetV1`."""
    return ShuffleNetV1(groups, width, num_classes)
