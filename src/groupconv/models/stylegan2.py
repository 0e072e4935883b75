"""StyleGAN2's generator (Karras et al. 2020, https://arxiv.org/abs/1912.04958)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv.errors import ArgumentError

_LATENT, _LAYERS = 512, 8
# Channels at 4 x 4 pixels, and times the side at most (configuration F).
_MOST, _TIMES_SIDE = 512, 1 << 15
_GAIN = math.sqrt(2)


class StyleGAN2(nn.Module):
    """A mapping of latents to styles, and convolutions that the styles scale.

    A style scales the inputs of a convolution, and the outputs are scaled to the variance that
    they had without it. That is the paper's modulation of the weights for each image, but the
    convolution is one and the same for all images.

    Args:
        size: height and width of the images, a power of two of at least 8; 1,024 in the paper.
        width: multiplies the channels of every layer; 1 in the paper.

    Shape:
        Input latents ``(N, 512)``, output ``(N, 3, size, size)``, white at about 1.

    Raises:
        ArgumentError: an argument breaks a rule.
    """

    latent_dim = _LATENT

    def __init__(self, size: int = 1024, width: float = 1.0) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ArgumentError(f"StyleGAN2: size={size!r} must be a power of two of at least 8")
        if _channels(size, width) < 1:
            raise ArgumentError(f"StyleGAN2: width={width!r} leaves no channels at {size} x {size}")
        self.mapping = nn.ModuleList(nn.Linear(_LATENT, _LATENT) for _ in range(_LAYERS))
        self.constant = nn.Parameter(torch.randn(1, _channels(4, width), 4, 4))
        self.first = _Layer(_channels(4, width), _channels(4, width), 4, up=False)
        self.first_rgb = _ToRGB(_channels(4, width))
        self.blocks = nn.ModuleList(
            _Block(_channels(1 << (i - 1), width), _channels(1 << i, width), 1 << i)
            for i in range(3, size.bit_length())
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                # Styles start at 1.
                nn.init.constant_(module.bias, 0.0 if module in self.mapping else 1.0)

    def forward(self, z: Tensor) -> Tensor:
        style = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.mapping:
            style = F.leaky_relu(layer(style), 0.2) * _GAIN
        x = self.first(self.constant.expand(len(z), -1, -1, -1), style)
        image = self.first_rgb(x, style)
        for block in self.blocks:
            x, image = block(x, image, style)
        return image


def _channels(side: int, width: float) -> int:
    return round(width * min(_MOST, _TIMES_SIDE // side))


class _Block(nn.Module):
    """Twice the resolution, two convolutions, and what they add to the image."""

    def __init__(self, reads: int, writes: int, side: int) -> None:
        super().__init__()
        self.up = _Layer(reads, writes, side, up=True)
        self.same = _Layer(writes, writes, side, up=False)
        self.rgb = _ToRGB(writes)
        self.filter = _Filter()

    def forward(self, x: Tensor, image: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        x = self.same(self.up(x, style), style)
        return x, self.filter.up(image) + self.rgb(x, style)


class _Layer(nn.Module):
    """A scaled 3x3 convolution, noise, bias and activation."""

    def __init__(self, reads: int, writes: int, side: int, up: bool) -> None:
        super().__init__()
        self.modulated = _Modulated(reads, writes, up)
        self.filter = _Filter() if up else None
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.noise: Tensor
        self.register_buffer("noise", torch.randn(1, 1, side, side))
        self.bias = nn.Parameter(torch.zeros(writes, 1, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.modulated(x, style)
        if self.filter is not None:
            x = self.filter.smooth(x)
        x = x + self.noise_strength * self.noise + self.bias
        return F.leaky_relu(x, 0.2) * _GAIN


class _ToRGB(nn.Module):
    """The image's three channels."""

    def __init__(self, reads: int) -> None:
        super().__init__()
        self.affine = nn.Linear(_LATENT, reads)
        self.conv = nn.Conv2d(reads, 3, 1)
        nn.init.normal_(self.conv.weight, std=1 / math.sqrt(reads))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.conv(x * self.affine(style)[:, :, None, None])


class _Modulated(nn.Module):
    """A 3x3 convolution of scaled inputs, its outputs scaled to unit variance.

    ``energy`` has the summed squares of the weights for each output and input. In training it is
    taken from the weights; after that it is a constant, so that the scales stay those of the
    trained network where another convolution stands in place of this one.
    """

    def __init__(self, reads: int, writes: int, up: bool) -> None:
        super().__init__()
        self.affine = nn.Linear(_LATENT, reads)
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if up:
            self.conv = nn.ConvTranspose2d(reads, writes, 3, stride=2, bias=False)
        else:
            self.conv = nn.Conv2d(reads, writes, 3, padding=1, bias=False)
        nn.init.normal_(self.conv.weight, std=1 / math.sqrt(9 * reads))
        self.energy: Tensor
        self.register_buffer("energy", self._energy().detach())

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        if self.training:
            energy = self._energy()
            self.energy = energy.detach()
        else:
            energy = self.energy
        scale = self.affine(style)
        norm = torch.rsqrt(F.linear(scale.square(), energy) + 1e-8)
        return self.conv(x * scale[:, :, None, None]) * norm[:, :, None, None]

    def _energy(self) -> Tensor:
        energy = self.conv.weight.square().sum((2, 3))
        return energy.T.contiguous() if isinstance(self.conv, nn.ConvTranspose2d) else energy


class _Filter(nn.Module):
    """The binomial filter that smooths what is interpolated."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.taps: Tensor
        # So that zeros between the pixels leave the mean as it was.
        self.register_buffer("taps", taps.outer(taps) / 16, persistent=False)

    def up(self, x: Tensor) -> Tensor:
        """``(N, C, 2 H, 2 W)``."""
        return F.conv_transpose2d(x, self._weight(x), stride=2, padding=1, groups=x.shape[1])

    def smooth(self, x: Tensor) -> Tensor:
        """``(N, C, H - 1, W - 1)``, of what a convolution has interpolated with zeros."""
        return F.conv2d(x, self._weight(x), padding=1, groups=x.shape[1])

    def _weight(self, x: Tensor) -> Tensor:
        return self.taps.expand(x.shape[1], 1, -1, -1)
