"""Objects that one detector finds, found again by another.

Detectors return for each image a dictionary of ``boxes`` ``(B, 4)``, ``labels`` and ``scores``
``(B,)``, and perhaps ``masks`` ``(B, 1, H, W)`` from 0 to 1, as torchvision's do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Boxes that overlap less are of different objects, as is usual since PASCAL VOC.
_SAME = 0.5


@dataclass(frozen=True)
class Matches:
    """Objects of two detectors, matched one to one.

    Args:
        before, after: how many each found.
        overlaps: intersection over union of each pair: of the masks, or else of the boxes.
    """

    before: int
    after: int
    overlaps: tuple[float, ...]

    @property
    def f1(self) -> float:
        """Harmonic mean of the share found again and the share that is right; 1 of nothing."""
        found = self.before + self.after
        return 2 * len(self.overlaps) / found if found else 1.0

    @property
    def overlap(self) -> float | None:
        """Mean of the overlaps, None without any."""
        return sum(self.overlaps) / len(self.overlaps) if self.overlaps else None


def holds_objects(returned: Any) -> bool:
    """Whether a network returned objects for each image."""
    if not isinstance(returned, Sequence) or not returned:
        return False
    keys = {"boxes", "labels", "scores"}
    return all(isinstance(found, Mapping) and keys <= found.keys() for found in returned)


def match_all(
    before: Iterable[Mapping[str, Tensor]], after: Iterable[Mapping[str, Tensor]]
) -> Matches:
    """Objects of the same images in two detectors, see :func:`match`."""
    each = [match(*pair) for pair in zip(before, after, strict=True)]
    return Matches(
        sum(m.before for m in each),
        sum(m.after for m in each),
        tuple(overlap for m in each for overlap in m.overlaps),
    )


def match(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Matches:
    """Objects of one image in two detectors.

    As in COCO's evaluation each of the second, the surest first, takes of those of its class that
    are left the one that it overlaps most, if their boxes overlap by half.

    Args:
        before, after: of the first and the second.
    """
    # Imported here: it takes seconds, and every command reads this module.
    from torchvision.ops import box_iou

    ious = box_iou(before["boxes"], after["boxes"])
    ious[before["labels"][:, None] != after["labels"][None, :]] = 0
    overlaps = []
    for number in after["scores"].argsort(descending=True, stable=True).tolist():
        if not len(ious):
            break
        best, place = ious[:, number].max(0)
        if best < _SAME:
            continue
        ious[place] = 0
        if "masks" in before and "masks" in after:
            pair = before["masks"][place] >= 0.5, after["masks"][number] >= 0.5
            union = int(torch.logical_or(*pair).sum())
            overlaps.append(int(torch.logical_and(*pair).sum()) / union if union else 1.0)
        else:
            overlaps.append(float(best))
    return Matches(len(before["boxes"]), len(after["boxes"]), tuple(overlaps))
