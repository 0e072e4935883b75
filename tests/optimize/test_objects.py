"""Objects found again, against pairs worked out by hand."""

import pytest
import torch
from torch import Tensor

from groupconv.optimize.objects import Matches, holds_objects, match, match_all

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}


def objects(*found: tuple[float, int, float]) -> dict[str, Tensor]:
    """Boxes of 10 by 10, each from its left edge, of a class, with a score."""
    lefts = torch.tensor([left for left, *_ in found])
    return {
        "boxes": torch.stack([lefts, 0 * lefts, lefts + 10, 0 * lefts + 10], 1),
        "labels": torch.tensor([label for _, label, _ in found]),
        "scores": torch.tensor([score for *_, score in found]),
    }


def test_the_surest_chooses_first() -> None:
    before = objects((0, 1, 0.9), (2, 1, 0.8))
    # Both overlap the second most; the less sure one is left with the first.
    after = objects((2, 1, 0.6), (2.5, 1, 0.7))
    assert match(before, after).overlaps == pytest.approx((9.5 / 10.5, 8 / 12))


def test_boxes_of_another_class_or_too_far_away_are_others() -> None:
    before = objects((0, 1, 0.9), (50, 2, 0.9))
    found = match(before, objects((0, 2, 0.9), (56, 2, 0.9)))
    assert found == Matches(2, 2, ())
    assert found.f1 == 0
    assert found.overlap is None


def test_each_is_found_once() -> None:
    found = match(objects((0, 1, 0.9)), objects((0, 1, 0.9), (1, 1, 0.8)))
    assert (found.before, found.after, found.overlaps) == (1, 2, (1.0,))
    assert found.f1 == pytest.approx(2 / 3)


def test_nothing_found() -> None:
    assert match(NOTHING, NOTHING).f1 == 1
    for pair in ((NOTHING, objects((0, 1, 0.9))), (objects((0, 1, 0.9)), NOTHING)):
        assert match(*pair).f1 == 0


def test_masks_count_where_there_are_some() -> None:
    before, after = objects((0, 1, 0.9)), objects((0, 1, 0.9))
    before["masks"] = torch.zeros(1, 1, 10, 20)
    after["masks"] = torch.zeros(1, 1, 10, 20)
    before["masks"][..., :8], after["masks"][..., :4] = 0.5, 0.9
    assert match(before, after).overlaps == (0.5,)


def test_all_images_together() -> None:
    one, two = objects((0, 1, 0.9)), objects((0, 1, 0.9), (30, 1, 0.5))
    found = match_all([one, two, NOTHING], [one, one, NOTHING])
    assert found == Matches(3, 2, (1.0, 1.0))
    assert found.f1 == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("returned", "holds"),
    [
        ([objects((0, 1, 0.9)), NOTHING], True),
        ([], False),
        (torch.zeros(2, 3), False),
        ([torch.zeros(2, 3)], False),
        ([{"boxes": torch.zeros(0, 4)}], False),
    ],
)
def test_what_holds_objects(returned: object, holds: bool) -> None:
    assert holds_objects(returned) is holds
