"""Wilson's interval against known values, and the comparison of two networks."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from groupconv.data import Images
from groupconv.errors import DataError
from groupconv.optimize.evaluate import compare, outputs, run, wilson


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
    results = outputs(Fixed(remember), images)
    assert torch.equal(results, images)
    # The first image alone, to see how large the outputs are.
    assert seen == [1, 128, 128, 44]
    seen.clear()
    outputs(Fixed(remember), torch.zeros(4, 1, 2048, 2048))
    assert seen == [1, 2, 2]
    assert results.dtype == torch.float32


@pytest.mark.parametrize("nest", [lambda y: (y,), lambda y: {"a": 3, "out": [y, y + 1]}])
def test_first_tensor_of_a_nest(nest: object) -> None:
    x = torch.ones(2, 3)
    assert torch.equal(run(Fixed(lambda x: nest(x * 2)), x), x * 2)


def test_networks_that_give_no_tensor_or_take_no_such_image() -> None:
    with pytest.raises(DataError, match="the model returns a str without a tensor"):
        run(Fixed(lambda x: "cat"), NUMBERED)
    with pytest.raises(
        DataError, match=r"does not accept images of shape \(4, 1, 1, 1\): .*channels"
    ):
        run(nn.Conv2d(3, 4, 1), NUMBERED)
