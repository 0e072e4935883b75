"""Batch norm re-estimated, and the student drawn to its teacher."""

import copy
import re

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.optimize.evaluate import outputs
from groupconv.optimize.recover import distil, parse_recover, reestimate_batch_norm


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("none", None), ("bn", 0), ("90s", 90), ("10min", 600), ("1.5h", 5400), ("0.5s", 0.5)],
)
def test_parse_recover(text: str, seconds: float | None) -> None:
    assert parse_recover(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "min", "-1s", "10 min", "10m", "BN", "1e3s", "all"])
def test_illegal_recover(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f'recover={text!r} must be "none", "bn"')):
        parse_recover(text)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_the_statistics_of_the_images(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3)).train(training)
    others = {name: p.clone() for name, p in model.named_parameters()}
    x = 5 + 2 * images(32)
    reestimate_batch_norm(model, x.split(16))
    with torch.no_grad():
        y = model[0](x)
    halves = torch.stack([half.var((0, 2, 3)) for half in y.split(16)])
    assert_close(model[1].running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert_close(model[1].running_var, halves.mean(0), rtol=1e-4, atol=1e-4)
    assert model[1].momentum == 0.3
    assert [m.training for m in model.modules()] == [training] * 3
    for name, p in model.named_parameters():
        assert_close(p, others[name], rtol=0, atol=0)
        assert p.grad is None


class Autoencoder(nn.Module):
    """Its outputs are images, not classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.conv(x), "aside"


def moved_away(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return student


@pytest.mark.parametrize("build", [residual, Autoencoder])
def test_distil(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    teacher = build().eval()
    before = copy.deepcopy(teacher.state_dict())
    student = moved_away(teacher)
    x = images(64)
    epochs: list[int] = []

    def batches(epoch: int) -> tuple[Tensor, ...]:
        epochs.append(epoch)
        return x[torch.randperm(len(x))].split(32)

    def distance() -> float:
        return float((outputs(student, x) - outputs(teacher, x)).square().mean())

    far = distance()
    steps = distil(teacher, student, batches, 0.6)
    assert distance() < 0.7 * far
    assert steps > 2
    assert epochs == list(range(len(epochs)))
    assert 2 * (len(epochs) - 1) <= steps <= 2 * len(epochs)
    assert not any(m.training for m in student.modules())
    assert not any(m.training for m in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the teacher was changed"
    assert all(p.grad is None for p in teacher.parameters())


def test_distil_without_time_does_nothing() -> None:
    teacher = residual()
    student = moved_away(teacher).train()
    before = copy.deepcopy(student.state_dict())
    assert distil(teacher, student, lambda _: [images(8)], 1e-9) == 0
    assert not student.training
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
