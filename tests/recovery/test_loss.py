"""The distance between a student and its teacher, for whatever they return."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from groupconv.errors import ArgumentError
from groupconv.recovery.loss import comparable, distance, is_classes


def test_classes_at_a_temperature() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7).unbind()
    p, q = (F.softmax(x.double() / 4, 1) for x in (teacher, student))
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert_close(distance(student, teacher, None).double(), expected, rtol=1e-5, atol=1e-6)
    assert float(distance(teacher, teacher, None)) == pytest.approx(0, abs=1e-6)


def test_labels_have_half_of_the_say() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7).unbind()
    labels = torch.tensor([0, 6, 3, 3, 1])
    soft, hard = distance(student, teacher, None), F.cross_entropy(student, labels)
    assert_close(distance(student, teacher, labels), (soft + hard) / 2, rtol=1e-6, atol=1e-6)


def test_anything_else_by_its_squared_error() -> None:
    """Over the variance, so that the outputs of a network count alike whatever their scale."""
    torch.manual_seed(0)
    maps, points = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 2)
    teacher = {"maps": 100 * maps, "points": (points, torch.arange(3), "aside")}
    student = {
        "maps": 100 * maps + 10 * maps.std(correction=0),
        "points": (points, torch.arange(3) + 1, "other"),
    }
    assert float(distance(student, teacher, None)) == pytest.approx(0.01 / 2, rel=1e-4)
    assert not is_classes(student)


def test_what_can_not_be_compared() -> None:
    """Detectors find other numbers of boxes."""
    boxes = [{"boxes": torch.rand(n, 4), "labels": torch.zeros(n).long()} for n in (3, 5)]
    assert comparable(boxes[:1], boxes[1:]) == []
    with pytest.raises(ArgumentError, match="give a loss of their outputs"):
        distance(boxes[:1], boxes[1:], None)
    with pytest.raises(ArgumentError, match="loss=None can't compare"):
        distance(torch.tensor([1]), torch.tensor([1]), None)


@pytest.mark.parametrize(
    ("output", "classes"),
    [
        (torch.zeros(4, 2), True),
        ([torch.zeros(4, 2)], True),
        (torch.zeros(4, 1), False),
        (torch.zeros(4, 2, 1), False),
        ((torch.zeros(4, 2), torch.zeros(4, 2)), False),
        (torch.zeros(4, 2).long(), False),
    ],
)
def test_classes_are_told_from_the_rest(output: object, classes: bool) -> None:
    assert is_classes(output) == classes


def test_a_constant_teacher_gives_a_finite_loss() -> None:
    assert math.isfinite(float(distance(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), None)))
