"""BigGAN's generator (Brock et al. 2019, https://arxiv.org/abs/1809.11096), 128 x 128 pixels."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from groupconv.errors import ArgumentError

# Channels that each block reads and writes, over those of the last (table 4 of the paper).
_CHANNELS = (16, 16, 8, 4, 2, 1)
# Numbers of the latent that each block sees, and of the class.
_LATENT, _SHARED = 20, 128
# Side of the first map, and of the one that attention sees.
_START, _ATTENTION = 4, 64


class BigGAN(nn.Module):
    """Residual blocks whose norms are scaled by the class and by a part of the latent each.

    Every convolution and linear layer has spectral norm, as in training.

    Args:
        num_classes: 1,000 in ImageNet.
        channels: of the last block, a multiple of 8; 96 in the paper.

    Attributes:
        latent_dim: numbers of the latent, 120.

    Shape:
        Input ``(N, latent_dim + num_classes)``, the latent and the class as one-hot, side by side;
        output ``(N, 3, 128, 128)`` from -1 to 1.

    Raises:
        ArgumentError: an argument breaks a rule.
    """

    latent_dim = _LATENT * len(_CHANNELS)

    def __init__(self, num_classes: int = 1000, channels: int = 96) -> None:
        super().__init__()
        if num_classes < 1:
            raise ArgumentError(f"BigGAN: num_classes={num_classes!r} must be a positive integer")
        if channels < 8 or channels % 8:
            raise ArgumentError(f"BigGAN: channels={channels!r} must be a positive multiple of 8")
        widths = [channels * factor for factor in _CHANNELS]
        condition = _SHARED + _LATENT
        self.num_classes = num_classes
        self.shared = nn.Linear(num_classes, _SHARED, bias=False)
        self.linear = _normed(nn.Linear(_LATENT, widths[0] * _START**2))
        self.blocks = nn.ModuleList(
            _Block(reads, writes, condition) for reads, writes in itertools.pairwise(widths)
        )
        self.attention = _Attention(widths[-2])
        self.norm = nn.BatchNorm2d(widths[-1])
        self.conv = _normed(nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        latent, classes = x.split([self.latent_dim, self.num_classes], 1)
        first, *parts = latent.split(_LATENT, 1)
        embedded = self.shared(classes)
        x = self.linear(first).unflatten(1, (-1, _START, _START))
        for block, part in zip(self.blocks, parts, strict=True):
            x = block(x, torch.cat([embedded, part], 1))
            if x.shape[-1] == _ATTENTION:
                x = self.attention(x)
        return torch.tanh(self.conv(F.relu(self.norm(x))))


class _ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift depend on the image's class."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = _normed(nn.Linear(condition, channels, bias=False))
        self.bias = _normed(nn.Linear(condition, channels, bias=False))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = (layer(condition)[:, :, None, None] for layer in (self.gain, self.bias))
        return self.norm(x) * (1 + gain) + bias


class _Block(nn.Module):
    """Two 3x3 convolutions at twice the resolution."""

    def __init__(self, reads: int, writes: int, condition: int) -> None:
        super().__init__()
        self.norm1 = _ConditionalBatchNorm(reads, condition)
        self.conv1 = _normed(nn.Conv2d(reads, writes, 3, padding=1))
        self.norm2 = _ConditionalBatchNorm(writes, condition)
        self.conv2 = _normed(nn.Conv2d(writes, writes, 3, padding=1))
        self.shortcut = _normed(nn.Conv2d(reads, writes, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2)
        y = self.conv2(F.relu(self.norm2(self.conv1(y), condition)))
        return y + self.shortcut(F.interpolate(x, scale_factor=2))


class _Attention(nn.Module):
    """Each position reads all others (Zhang et al. 2019, https://arxiv.org/abs/1805.08318)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = _normed(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.key = _normed(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.value = _normed(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.out = _normed(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key = F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, 2)
        read = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(read)


def _normed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    return spectral_norm(layer)
