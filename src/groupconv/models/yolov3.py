"""YOLO v3 (Redmon and Farhadi 2018, https://arxiv.org/abs/1804.02767)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError

# Residual blocks of the five stages of Darknet-53 (table 1 of the paper).
_BLOCKS = (1, 2, 8, 8, 4)
# Width and height of the boxes that each head starts from, in pixels, the coarsest head first, and
# the pixels that one position of its map stands for.
ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
STRIDES = (32, 16, 8)
# Of a box: its centre, its size, and whether there is anything in it.
_BOX = 5


class YOLOv3(nn.Module):
    """Darknet-53, and three heads that share its features.

    Args:
        num_classes: of the objects; 80 in COCO.
        width: multiplies the channels of every layer but the heads' outputs; 1 in the paper.

    Shape:
        Input ``(N, 3, H, W)`` with values from 0 to 1, H and W multiples of 32; output one map
        ``(N, 3 * (5 + num_classes), H / s, W / s)`` for each of the strides 32, 16 and 8.

    Raises:
        ArgumentError: an argument breaks a rule.
    """

    def __init__(self, num_classes: int = 80, width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ArgumentError(f"YOLOv3: num_classes={num_classes!r} must be a positive integer")
        if not width * 32 >= 2 or width * 32 % 2:
            raise ArgumentError(
                f"YOLOv3: width={width!r} times 32 must be an even number of channels; 0.25, 0.5 "
                "and 1 are"
            )
        self.num_classes = num_classes

        def c(channels: int) -> int:
            return round(width * channels)

        outputs = len(ANCHORS[0]) * (_BOX + num_classes)
        # Modules stand in the order in which Darknet's files have their weights.
        self.stem = _conv(3, c(32), 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _conv(c(32 << i), c(64 << i), 3, stride=2),
                *(_Residual(c(64 << i)) for _ in range(blocks)),
            )
            for i, blocks in enumerate(_BLOCKS)
        )
        self.heads = nn.ModuleList(
            _Head(c(inputs), c(wide), outputs, above=None if i == 0 else c(wide))
            for i, (inputs, wide) in enumerate(((1024, 512), (768, 256), (384, 128)))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, features = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps, above = [], None
        for head, feature in zip(self.heads, reversed(features[2:]), strict=True):
            above, found = head(feature, above)
            maps.append(found)
        return maps[0], maps[1], maps[2]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels // 2, 1)
        self.conv2 = _conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class _Head(nn.Module):
    """Five layers whose result the next head takes too, and two that make the boxes.

    Args:
        inputs: channels of the features and of what comes from above, together.
        wide: channels after the first layer.
        outputs: of a position.
        above: channels that come from the head above, which halve on the way; None: there is none.
    """

    def __init__(self, inputs: int, wide: int, outputs: int, above: int | None) -> None:
        super().__init__()
        if above is not None:
            self.above = nn.Sequential(_conv(2 * wide, wide, 1), nn.Upsample(scale_factor=2))
        self.body = nn.Sequential(
            _conv(inputs, wide, 1),
            _conv(wide, 2 * wide, 3),
            _conv(2 * wide, wide, 1),
            _conv(wide, 2 * wide, 3),
            _conv(2 * wide, wide, 1),
        )
        self.conv = _conv(wide, 2 * wide, 3)
        self.boxes = nn.Conv2d(2 * wide, outputs, 1)

    def forward(self, feature: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        if above is not None:
            feature = torch.cat([self.above(above), feature], 1)
        x = self.body(feature)
        return x, self.boxes(self.conv(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    )


def decode(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of the three maps of :class:`YOLOv3`, in pixels of the input.

    Returns:
        Corners ``(N, B, 4)`` as x1, y1, x2, y2; whether there is an object, ``(N, B)``; and of what
        class, ``(N, B, classes)``, each from 0 to 1.
    """
    # Imported here: it takes seconds, and every command reads this module.
    from torchvision.ops import box_convert

    boxes, objects, classes = [], [], []
    for found, anchors, stride in zip(maps, ANCHORS, STRIDES, strict=True):
        n, _, h, w = found.shape
        found = found.unflatten(1, (len(anchors), -1)).permute(0, 1, 3, 4, 2)
        y, x = torch.meshgrid(
            torch.arange(h, device=found.device),
            torch.arange(w, device=found.device),
            indexing="ij",
        )
        centre = (found[..., :2].sigmoid() + torch.stack([x, y], -1)) * stride
        size = found[..., 2:4].exp() * found.new_tensor(anchors)[:, None, None]
        boxes.append(torch.cat([centre, size], -1).reshape(n, -1, 4))
        objects.append(found[..., 4].sigmoid().reshape(n, -1))
        classes.append(found[..., _BOX:].sigmoid().reshape(n, boxes[-1].shape[1], -1))
    corners = box_convert(torch.cat(boxes, 1), "cxcywh", "xyxy")
    return corners, torch.cat(objects, 1), torch.cat(classes, 1)


def detect(
    maps: Sequence[Tensor], *, min_score: float = 0.25, max_overlap: float = 0.45
) -> list[dict[str, Tensor]]:
    """The objects in each image, as torchvision's detectors give them.

    Args:
        maps: of :class:`YOLOv3`.
        min_score: of an object and its class together.
        max_overlap: intersection over union from which on the lesser of two boxes of a class goes.

    Returns:
        for each image ``boxes`` ``(B, 4)``, ``scores`` and ``labels`` ``(B,)``, the best first.
    """
    from torchvision.ops import batched_nms

    found = []
    for corners, objects, classes in zip(*decode(maps), strict=True):
        scores = objects[:, None] * classes
        which, labels = (scores > min_score).nonzero(as_tuple=True)
        boxes, scores = corners[which], scores[which, labels]
        kept = batched_nms(boxes, scores, labels, max_overlap)
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found
