"""Shuffles and permutations folded into neighbouring weights: the same output, fewer modules."""

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv import nn as gnn
from groupconv.models import shufflenet_v1
from groupconv.optimize.fold import fold_permutations


def _normed(channels: int) -> nn.BatchNorm2d:
    """A batch norm that treats every channel differently."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            tensor.uniform_(0.5, 2.0)
        for tensor in (norm.bias, norm.running_mean):
            tensor.normal_()
    return norm


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(x)


def _movers(model: nn.Module) -> int:
    kinds = (nn.ChannelShuffle, gnn.ChannelPermutation)
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("seed", range(5))
def test_folds_into_producer_or_consumer(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        _normed(16),
        nn.ReLU(),
        gnn.ChannelShuffle(4),  # read by a grouped layer: goes into the convolution before
        gnn.GroupConv2d(16, 16, 1, groups=4),
        gnn.ChannelPermutation(torch.randperm(16)),  # goes into the pointwise layer after
        _normed(16),
        nn.Conv2d(16, 8, 1),
        gnn.ChannelPermutation(torch.randperm(8)),  # read as the output: into the layer before
    )
    x = torch.randn(2, 3, 8, 8)
    expected = _outputs(model, x)
    folded, names = fold_permutations(model, (x,))
    assert set(names) == {"3", "5", "8"}
    assert _movers(folded) == 0
    assert_close(_outputs(folded, x), expected, rtol=1e-5, atol=1e-5)
    assert _movers(model) == 3, "the user's model was changed"
    assert_close(_outputs(model, x), expected, rtol=0, atol=0)


def test_two_in_a_row_and_around_a_residual() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.one = gnn.ChannelPermutation(torch.randperm(8))
            self.two = gnn.ChannelShuffle(2)
            self.inner = nn.Conv2d(8, 8, 3, padding=1)
            self.after = gnn.ChannelPermutation(torch.randperm(8))
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.one(self.first(x)))
            return self.last(x + self.after(self.inner(x)))

    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 6, 6)
    folded, names = fold_permutations(model, (x,))
    assert set(names) == {"one", "two", "after"}
    assert_close(_outputs(folded, x), _outputs(model, x), rtol=1e-5, atol=1e-5)


def test_between_grouped_layers_stays() -> None:
    model = nn.Sequential(
        gnn.GroupConv2d(8, 8, 1, groups=2),
        gnn.ChannelShuffle(2),
        gnn.GroupConv2d(8, 8, 1, groups=2),
    )
    folded, names = fold_permutations(model, (torch.randn(2, 8, 4, 4),))
    assert names == ()
    assert folded is model


def test_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
            self.shuffle = gnn.ChannelShuffle(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.shuffle(self.b(self.shuffle(self.a(x)))))

    assert fold_permutations(Twice(), (torch.randn(2, 8, 4, 4),))[1] == ()


def test_shufflenet_folds_the_one_after_its_dense_pointwise_layer() -> None:
    torch.manual_seed(0)
    model, x = shufflenet_v1(groups=3, width=0.25).eval(), torch.randn(2, 3, 64, 64)
    folded, names = fold_permutations(model, (x,))
    assert names == ("stages.0.0.shuffle",)
    assert_close(_outputs(folded, x), _outputs(model, x), rtol=1e-5, atol=1e-5)
