import torch
from torch import Tensor, nn

from groupconv.memory_format import fastest_format


class Viewer(nn.Module):
    """Counts on channels that are not last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def test_channels_are_last_unless_a_network_asks_for_others() -> None:
    convolution, images = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    assert fastest_format(images, convolution) is torch.channels_last
    assert fastest_format(images, convolution, Viewer()) is torch.contiguous_format


def test_sequences_lie_in_one_way_only() -> None:
    assert fastest_format(torch.randn(2, 3, 8), nn.Conv1d(3, 4, 3)) is torch.contiguous_format
