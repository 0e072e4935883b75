"""Exact rewritings: the same numbers, and nothing else is touched."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from groupconv.targets.program import exported_for
from groupconv.targets.rewrites import replace_shuffles, replace_transposed


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def by_views(x: Tensor) -> Tensor:
    """As torchvision writes it."""
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def other_axes(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(2, 3).reshape(n, c, h, w)


def other_split(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 2, h, 2, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (by_views, 1),
        (lambda x: F.channel_shuffle(x, 4), 1),
        (lambda x: by_views(F.channel_shuffle(x, 2)) + x, 2),
        (other_axes, 0),
        (other_split, 0),
        (lambda x: x.transpose(1, 2).reshape(x.shape), 0),
    ],
    ids=["views", "operator", "two", "other axes", "other split", "a transposition"],
)
def test_shuffles(function, count: int) -> None:  # type: ignore[no-untyped-def]
    x = numbers(2, 12, 5, 6)
    graph = exported_for(Function(function).eval(), (x,)).module()
    assert replace_shuffles(graph) == count
    assert torch.equal(graph(x), function(x))
    # In the next capture there are no five axes where all were replaced.
    if count:
        again = torch.export.export(graph, (x,))
        assert max(len(n.meta["val"].shape) for n in again.graph.nodes if "val" in n.meta) == 4


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more", "dilation"),
    [
        (3, 2, 1, 1, 1),
        (3, 1, 1, 0, 1),
        ((1, 5), (1, 2), (0, 2), 0, 1),
        (4, 2, 1, 0, 1),
        (2, 3, 0, (2, 1), 1),
        (3, 2, 2, 1, 2),
        (1, 2, 0, 1, 1),
        (3, (2, 3), (2, 0), (1, 2), (3, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_transposed(groups, kernel, stride, padding, more, dilation, bias) -> None:  # type: ignore[no-untyped-def]
    layer = nn.ConvTranspose2d(8, 12, kernel, stride, padding, more, groups, bias, dilation).eval()
    x = numbers(2, 8, 5, 6)
    graph = exported_for(layer, (x,)).module()
    assert replace_transposed(graph) == 1 or (groups, padding, more, dilation) == (1, 0, 0, 1)
    assert_close(graph(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("stride", "padding", "more", "dilation"), [(2, 1, 1, 1), (3, 0, 2, 2)])
def test_transposed_in_one_axis(
    groups: int, stride: int, padding: int, more: int, dilation: int
) -> None:
    layer = nn.ConvTranspose1d(8, 12, 4, stride, padding, more, groups, True, dilation).eval()
    x = numbers(2, 8, 7)
    graph = exported_for(layer, (x,)).module()
    assert replace_transposed(graph) == 1
    assert_close(graph(x), layer(x), rtol=1e-5, atol=1e-6)


def test_what_the_format_has_stays() -> None:
    x = numbers(1, 8, 5, 6)
    graph = exported_for(nn.ConvTranspose2d(8, 12, 3, 2).eval(), (x,)).module()
    assert replace_transposed(graph) == 0
