"""ShuffleNet v1 (Zhang et al. 2018, https://arxiv.org/abs/1707.01083)."""

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


class ShuffleNetV1(nn.Module):
    """Grouped pointwise layers joined by channel shuffles.

    Args:
        groups: 1, 2, 3, 4 or 8, of the pointwise layers.
        width: multiplies every stage's channels; 0.25, 0.5, 1, 1.5 or 2.
        num_classes: size of the output.

    Shape:
        Input ``(N, 3, H, W)``, 224x224 in the paper; output logits ``(N, num_classes)``.

    Raises:
        ArgumentError: groups is not one of the paper's, or width gives channels that can't be
            split.
    """

    def __init__(self, groups: int = 3, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        if groups not in _STAGE_CHANNELS:
            raise ArgumentError(
                f"ShuffleNetV1: groups={groups!r} must be one of {sorted(_STAGE_CHANNELS)}"
            )
        self.conv1 = nn.Sequential(
            GroupConv2d(3, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = 24, []
        for stage, (full, units) in enumerate(
            zip(_STAGE_CHANNELS[groups], _STAGE_UNITS, strict=True)
        ):
            out_channels = int(full * width)
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


def shufflenet_v1(groups: int = 3, width: float = 1.0, num_classes: int = 1000) -> ShuffleNetV1:
    """ShuffleNet v1 with random weights; see :class:`ShuffleNetV1`."""
    return ShuffleNetV1(groups, width, num_classes)
