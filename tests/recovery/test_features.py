"""Features read in two networks: in the teacher's order of channels, gradients apart or not."""

import copy

import pytest
import torch
from networks import images
from torch import nn

from groupconv.optimize.convert import convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.trace import trace
from groupconv.recovery.features import Feature, Taps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip


def test_the_same_features_in_another_order() -> None:
    teacher = network()
    student = copy.deepcopy(teacher)
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    with torch.no_grad():
        for tensor in (student[0].weight, student[0].bias, student[1].weight, student[1].bias,
                       student[1].running_mean, student[1].running_var):  # fmt: skip
            tensor.copy_(tensor[order].clone())
        student[3].weight.copy_(student[3].weight[:, order].clone())
    x = images(4)
    same = Taps(
        teacher, student, [Feature("1", "1", tuple(order)), Feature("3", "3", tuple(range(8)))],
        apart=False,
    )  # fmt: skip
    wrong = Taps(teacher, student, [Feature("1", "1", tuple(range(8)))], apart=False)
    for taps, close in ((same, True), (wrong, False)):
        with taps.open():
            teacher(x)
            student(x)
            assert (float(taps.loss().detach()) < 1e-10) == close
    assert not any(m._forward_hooks for net in (teacher, student) for m in net.modules())


@pytest.mark.parametrize("apart", [True, False])
def test_gradients_stop_at_a_feature(apart: bool) -> None:
    teacher, student, x = network(), network(), images(4)
    with torch.no_grad():
        student[3].weight.add_(0.1)
    features = [Feature("1", "1", tuple(range(8))), Feature("3", "3", tuple(range(8)))]
    taps = Taps(teacher, student, features, apart=apart)
    with taps.open():
        teacher(x)
        student(x)
        taps.loss().backward()
    assert student[3].weight.grad.abs().sum() > 0
    # The first feature is right as it is: only what comes after it can blame the first layer.
    assert (student[0].weight.grad.abs().sum() > 0) != apart


def test_features_of_a_converted_network() -> None:
    """A cut that keeps all that matters: every feature is where it is said to be."""
    model, x = network(), images(4)
    in_order, out_order = (5, 0, 3, 6, 1, 2, 4, 7), (7, 2, 1, 4, 0, 3, 5, 6)
    with torch.no_grad():
        kept = torch.zeros(8, 8, 1, 1)
        for inputs, outputs in zip((in_order[:4], in_order[4:]), (out_order[:4], out_order[4:]),
                                   strict=True):  # fmt: skip
            kept[torch.tensor(outputs)[:, None], torch.tensor(inputs)] = 1
        model[3].weight.mul_(kept)
    mapped = trace(model, (x,))
    converted = convert(model, mapped, {"3": Partition(2, in_order, out_order)})
    assert [feature.student for feature in converted.features] == ["3"]
    taps = Taps(model, converted.model, converted.features, apart=False)
    with taps.open():
        model(x)
        converted.model(x)
        assert float(taps.loss().detach()) < 1e-10
