"""Images to judge by are those that nothing was fitted to."""

import pytest
import torch

from groupconv.data import Images
from groupconv.errors import DataError
from groupconv.recovery import Recovery
from groupconv.recovery.lessons import judged


def numbered(numbers: list[int]) -> Images:
    values = torch.tensor(numbers, dtype=torch.float32)
    return Images(values[:, None, None, None].expand(-1, 3, 2, 2), values.long(), "numbers")


def numbers(images: object) -> set[int]:
    assert isinstance(images, Images)
    assert images.labels is not None
    found = images.images[:, 0, 0, 0].tolist()
    assert found == images.labels.tolist()
    return {int(number) for number in found}


@pytest.mark.parametrize(
    ("fitted", "train"),
    [
        (range(100), range(1_000)),
        (range(100), range(100)),
        (range(95), range(100)),
        (range(100, 200), range(100)),
        (range(100), range(50)),
    ],
    ids=["some of them", "the same", "nearly the same", "others", "more than those"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_fitted_to_what_judges(fitted: range, train: range, seed: int) -> None:
    # Taken by the same seed, as people do.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    images = numbered([order[i] if i < len(order) else i for i in fitted])
    recovery = Recovery("1min", train=numbered(list(train)))
    kept, rest, apart = judged(images, recovery, seed)
    judges = numbers(apart)
    assert len(judges) == len(train) // 10
    assert not judges & numbers(kept)
    assert not judges & numbers(rest.train)
    assert judges | numbers(rest.train) == set(train)
    # No more are taken from the calibration than have to be.
    fresh = set(train) - numbers(images)
    assert len(kept) == len(images) - max(0, len(judges) - len(fresh))
    assert judges <= fresh or fresh <= judges


def test_all_images_alike() -> None:
    same = numbered([7] * 20)
    with pytest.raises(DataError, match="numbers: every image is needed to judge by"):
        judged(same, Recovery("1min", train=same), 0)


def test_without_images_of_its_own() -> None:
    images = numbered(list(range(40)))
    kept, recovery, apart = judged(images, Recovery("1min"), 0)
    assert len(apart) == 4
    assert numbers(kept) | numbers(apart) == set(range(40))
    assert not numbers(kept) & numbers(apart)
    assert recovery.train is None
