"""Wilson's interval against known values, and the comparison of two networks."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from groupconv.data import Images
from groupconv.errors import DataError
from groupconv.optimize.evaluate import compare, wilson
from groupconv.optimize.visit import images_at_once, outputs, rows


class Fixed(nn.Module):
    """Gives ``function(batch)``; its one parameter says where it lives."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    interval = wilson(hits, total)
    assert [round(end, 4) for end in interval] == [low, high]
    assert interval == pytest.approx(binomtest(hits, total).proportion_ci(method="wilson"))
    missed = wilson(total - hits, total)
    assert interval == pytest.approx((1 - missed[1], 1 - missed[0]))


@pytest.mark.parametrize("total", [1, 7, 120, 1000])
def test_wilson_of_all_or_none_ends_there(total: int) -> None:
    assert wilson(total, total)[1] == 1
    assert wilson(0, total)[0] == 0


def test_wilson_narrows() -> None:
    assert wilson(5, 10, z=0) == (0.5, 0.5)
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def one_hot(classes: list[int]) -> nn.Module:
    """A classifier that gives the listed class for images 0, 1, 2, ..."""
    return Fixed(lambda x: torch.eye(3)[torch.tensor(classes)[x[:, 0, 0, 0].long()]])


NUMBERED = torch.arange(4.0).reshape(4, 1, 1, 1)


def test_compare_with_labels() -> None:
    before, after = one_hot([0, 1, 2, 2]), one_hot([0, 1, 1, 0])
    quality = compare(before, after, Images(NUMBERED, torch.tensor([0, 1, 1, 2]), "test"))
    assert quality.images == 4
    assert (quality.accuracy_before, quality.accuracy_after) == (0.75, 0.75)
    assert quality.interval_before == quality.interval_after == wilson(3, 4)
    assert quality.agreement == 0.5
    # Two of four unit vectors became orthogonal ones.
    assert quality.output_error == pytest.approx(1.0)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1, 3])])
def test_compare_without_labels_or_with_those_of_other_classes(labels: Tensor | None) -> None:
    quality = compare(
        one_hot([0, 1, 2, 2]), one_hot([0, 1, 2, 0]), Images(NUMBERED, labels, "test")
    )
    assert (quality.accuracy_before, quality.accuracy_after) == (None, None)
    assert (quality.interval_before, quality.interval_after) == (None, None)
    assert quality.agreement == 0.75


@pytest.mark.parametrize("function", [lambda x: x + 1, lambda x: x.flatten(1) + 1])
def test_compare_outputs_that_are_no_classes(function: object) -> None:
    images = Images(NUMBERED, torch.tensor([0, 1, 1, 2]), "test")
    quality = compare(Fixed(function), Fixed(lambda x: 1.5 * function(x)), images)
    assert quality.agreement is None
    assert quality.accuracy_after is None
    assert quality.output_error == pytest.approx(0.5)


def test_every_batch_in_order() -> None:
    seen: list[int] = []

    def remember(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.double()

    images = torch.arange(300.0).reshape(300, 1, 1, 1)
    (results,) = outputs(Fixed(remember), images)
    assert torch.equal(results, images)
    assert seen == [128, 128, 44]
    assert results.dtype == torch.float32
    seen.clear()
    outputs(Fixed(remember), images[:5], at_once=2)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize(
    ("pixels", "near", "far"),
    [(1, 128, 128), (224 * 224, 7, 128), (2048 * 2048, 1, 2), (1 << 24, 1, 1)],
)
def test_fewer_large_images_at_once(pixels: int, near: int, far: int) -> None:
    assert images_at_once(pixels, torch.device("cpu")) == near
    assert images_at_once(pixels, torch.device("cuda")) == far


def test_all_tensors_that_have_a_row_for_each_image() -> None:
    def nest(y: Tensor) -> object:
        return {"a": 3, "out": [y, y + 1], "total": y.sum(), "table": y.new_ones(7, 2)}

    x = torch.ones(2, 3)
    found = rows(Fixed(lambda x: nest(x * 2)), x)
    assert len(found) == 2
    assert torch.equal(torch.stack(found), torch.stack([2 * x, 2 * x + 1]))


def test_what_modules_inside_return() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[3].register_forward_hook(lambda *_: pytest.fail("it runs after the last that is asked for"))
    x = torch.randn(5, 3)
    found = outputs(net, x, ["2", "1"], at_once=3)
    with torch.no_grad():
        assert torch.equal(found[1], torch.cat([net[1](part) for part in x.split(3)]))
    assert torch.equal(found[0], found[1].relu())


def test_networks_that_give_no_tensor_or_take_no_such_image() -> None:
    with pytest.raises(DataError, match="the model returns a str without a tensor of a row for"):
        rows(Fixed(lambda x: "cat"), NUMBERED)
    with pytest.raises(DataError, match="the model returns a Tensor without a tensor of a row for"):
        rows(Fixed(lambda x: x.sum()), NUMBERED)
    with pytest.raises(
        DataError, match=r"does not accept images of shape \(4, 1, 1, 1\): .*channels"
    ):
        rows(nn.Conv2d(3, 4, 1), NUMBERED)


def test_what_a_network_does_is_told_from_what_it_returns() -> None:
    images = Images(torch.randn(4, 3, 8, 6), None, "test")
    pixels = nn.Conv2d(3, 5, 1)
    found = compare(pixels, pixels, images)
    assert (found.task, found.agreement, found.output_error) == ("segment", 1.0, 0.0)
    assert compare(nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), images).task == "other"
    assert compare(nn.Conv2d(3, 1, 3), nn.Conv2d(3, 1, 3), images).task == "generate"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("classify", r"expected \(N, classes\)"),
        ("detect", "expected a dictionary of boxes, labels and scores for each image"),
        ("generate", r"expected images, \(N, 1, H, W\) or \(N, 3, H, W\)"),
    ],
)
def test_a_task_that_the_network_does_not_do(task: str, expected: str) -> None:
    net = nn.Conv2d(3, 5, 1)
    images = Images(torch.randn(4, 3, 8, 6), None, "test")
    told = rf"task='{task}': the model returns a Tensor, first a tensor of shape \(1, 5, 8, 6\); "
    with pytest.raises(DataError, match=told + expected):
        compare(net, net, images, task)


def test_three_classes_of_pixels_are_no_picture_if_one_says_so() -> None:
    images = Images(torch.randn(4, 3, 8, 6), None, "test")
    nets = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        same = (nets[0](images.images).argmax(1) == nets[1](images.images).argmax(1)).float().mean()
    found = compare(*nets, images, "segment")
    assert (found.agreement, found.psnr) == (pytest.approx(float(same)), None)


def test_detectors_are_compared_by_the_objects_they_find() -> None:
    def found(shift: float, first: int) -> object:
        def forward(x: Tensor) -> list[dict[str, Tensor]]:
            one = {
                "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]]) + shift,
                "labels": torch.tensor([first, 2]),
                "scores": torch.tensor([0.9, 0.8]),
            }
            return [one] * len(x)

        return Fixed(forward)

    images = Images(torch.zeros(3, 1, 50, 50), None, "test")
    same = compare(found(0, 1), found(0, 1), images)
    assert (same.task, same.agreement, same.overlap) == ("detect", 1.0, 1.0)
    assert same.output_error is None
    # 9 of 11 by 10 and 9 of 11 by 20 are left of the shifted boxes; one is of another class now.
    moved = compare(found(0, 1), found(1, 3), images)
    assert moved.agreement == pytest.approx(0.5)
    assert moved.overlap == pytest.approx(9 * 19 / (2 * 200 - 9 * 19))
