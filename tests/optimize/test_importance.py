"""Weights of output channels against derivatives worked out by hand."""

from itertools import pairwise

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.optimize.importance import output_importance


def pointwise(*channels: int, between: type[nn.Module] = nn.Identity) -> nn.Sequential:
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for i, o in pairwise(channels):
        steps += [nn.Conv2d(i, o, 1), between()]
    return nn.Sequential(*steps[:-1]).eval()


def test_one_output_gives_its_squared_weights() -> None:
    """With one output the signs do not matter: its derivative is the last layer's weight."""
    model = pointwise(3, 5, 1)
    found = output_importance(model, ["0", "2"], [torch.randn(7, 3, 4, 4)], seed=0)
    squares = model[2].weight.detach().double().flatten().square()
    assert_close(found["0"], squares / squares.mean(), rtol=1e-5, atol=0)
    assert_close(found["2"], torch.ones(1, dtype=torch.float64), rtol=0, atol=0)


def test_many_outputs_are_summed_by_random_signs() -> None:
    model = pointwise(3, 6, 4)
    found = output_importance(model, ["0"], [torch.randn(500, 3, 2, 2)] * 4, seed=1)["0"]
    squares = model[2].weight.detach().double()[:, :, 0, 0].square().sum(0)
    # 8,000 draws: the signs' cross terms are down to a few hundredths.
    assert_close(found, squares / squares.mean(), rtol=0.1, atol=0.03)


def test_an_activation_in_place_takes_part() -> None:
    model = pointwise(3, 5, 1, between=lambda: nn.ReLU(inplace=True))  # type: ignore[arg-type]
    x = torch.randn(64, 3, 4, 4)
    open_share = (model[0](x) > 0).double().mean((0, 2, 3))
    squares = open_share * model[2].weight.detach().double().flatten().square()
    found = output_importance(model, ["0"], x.split(16), seed=0)["0"]
    assert_close(found, (squares / squares.mean()).clamp_min(1e-2), rtol=1e-5, atol=0)


def test_channels_that_nothing_reads_keep_a_little() -> None:
    model = pointwise(3, 4, 2)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    found = output_importance(model, ["0"], [torch.randn(8, 3, 2, 2)], seed=0)["0"]
    assert found[1] == 1e-2
    assert (found[[0, 2, 3]] > 1e-2).all()


class Detached(nn.Module):
    """The first layer reaches the output only as a number that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) * self.a(x).argmax(1, keepdim=True)


def test_without_a_derivative_all_count_alike() -> None:
    found = output_importance(Detached(), ["a", "b"], [torch.randn(4, 3, 2, 2)], seed=0)
    assert_close(found["a"], torch.ones(4, dtype=torch.float64), rtol=0, atol=0)
    assert found["b"].shape == (2,)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen: bool) -> None:
    model = pointwise(3, 5, 2).requires_grad_(not frozen)
    with torch.no_grad():
        found = output_importance(model, ["0"], [torch.randn(4, 3, 2, 2)], seed=0)
    assert found["0"].std() > 0
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
