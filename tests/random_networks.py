"""Random networks made of every kind of tie between channels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from groupconv import nn as gnn


def shuffled(x: Tensor, groups: int) -> Tensor:
    """As in torchvision's ShuffleNetV2."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scale(nn.Module):
    """One factor for each channel, as ConvNeXt's layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def randomize(model: nn.Module) -> nn.Module:
    """No two channels alike: norms with weights and statistics of their own."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            kind = nn.init.uniform_ if name.endswith(("var", "weight")) else nn.init.normal_
            kind(tensor, 0.5, 1.5) if kind is nn.init.uniform_ else kind(tensor, 0.0, 0.3)
    return model.eval()


def _norms(channels: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(channels),
        FrozenBatchNorm2d(channels),
        nn.GroupNorm(2, channels),
        nn.InstanceNorm2d(channels, affine=True),
        LayerNorm2d(channels),
        nn.Identity(),
    ]


def _activations(channels: int) -> list[nn.Module]:
    return [
        nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(inplace=True), nn.GELU(),
        nn.PReLU(channels), nn.PReLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.ELU(), nn.Softplus(),
    ]  # fmt: skip


class Step(nn.Module):
    """Modules, and a function of them and of the input."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.parts, x)


class RandomNetwork(nn.Module):
    """Stem, steps drawn by a seed, head; channels are multiples of 4.

    Args:
        seed: of the structure and of the weights.
        steps: how many ties there are between the stem and the head.
    """

    def __init__(self, seed: int, steps: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.channels = 8
        kinds = sorted(name for name in dir(self) if name.startswith("tie_"))
        picked = [kinds[pick(len(kinds))] for _ in range(steps)]
        self.kinds = [kind.removeprefix("tie_") for kind in picked]
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.steps = nn.Sequential(*(getattr(self, kind)() for kind in picked))
        self.head = self.end()
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(self.stem(x)))

    def unit(self, into: int, out: int) -> nn.Module:
        """A convolution, a norm, an activation."""
        norms, acts = _norms(out), _activations(out)
        conv = nn.Conv2d(into, out, 3, padding=1, bias=bool(pick(2)))
        return nn.Sequential(conv, norms[pick(len(norms))], acts[pick(len(acts))])

    def tie_unit(self) -> nn.Module:
        into, self.channels = self.channels, 4 * (1 + pick(4))
        return self.unit(into, self.channels)

    def tie_residual(self) -> nn.Module:
        a, b = self.unit(self.channels, 12), self.unit(12, self.channels)
        return Step(lambda a, b, x: F.relu(x + b(a(x))), a, b)

    def tie_product(self) -> nn.Module:
        a, scale = self.unit(self.channels, self.channels), Scale(self.channels)
        return Step(lambda a, scale, x: scale(x) * a(x).tanh(), a, scale)

    def tie_excite(self) -> nn.Module:
        down, up = nn.Conv2d(self.channels, 4, 1), nn.Conv2d(4, self.channels, 1)
        pool = nn.AdaptiveAvgPool2d(1)
        gate = nn.Sequential(pool, down, nn.ReLU(inplace=True), up, nn.Sigmoid())
        return Step(lambda gate, x: x * gate(x), gate)

    def tie_excite_linear(self) -> nn.Module:
        down, up = nn.Linear(self.channels, 4), nn.Linear(4, self.channels)
        gate = nn.Sequential(down, nn.ReLU(), up, nn.Sigmoid())
        return Step(lambda gate, x: x * gate(x.mean((2, 3)))[:, :, None, None], gate)

    def tie_concatenation(self) -> nn.Module:
        a = self.unit(self.channels, 4)
        self.channels += 4
        return Step(lambda a, x: torch.cat([a(x), x], 1), a)

    def tie_doubled(self) -> nn.Module:
        self.channels *= 2
        return Step(lambda a, x: a(torch.cat([x, x], 1)), self.tie_unit())

    def tie_twice_over(self) -> nn.Module:
        self.channels *= 2
        return Step(lambda a, x: a(torch.cat([x, x.relu()], 1)), self.tie_unit())

    def tie_halves(self) -> nn.Module:
        half = self.channels // 2

        def split(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
            left, right = x.chunk(2, 1)
            return torch.cat([a(left), b(right)], 1)

        return Step(split, self.unit(half, half), self.unit(half, half))

    def tie_slices(self) -> nn.Module:
        into, self.channels = self.channels, 8

        def split(a: nn.Module, b: nn.Module, c: nn.Module, x: Tensor) -> Tensor:
            first, second = torch.split(a(x), [8, 4], 1)
            return c(torch.cat([second.narrow(1, 0, 4), b(first)], 1))

        return Step(split, self.unit(into, 12), self.unit(8, 4), self.unit(8, 8))

    def tie_gate(self) -> nn.Module:
        def gated(a: nn.Module, x: Tensor) -> Tensor:
            left, right = a(x).chunk(2, 1)
            return left * right.sigmoid()

        return Step(gated, self.unit(self.channels, 2 * self.channels))

    def tie_shuffle(self) -> nn.Module:
        return Step(lambda x: shuffled(x, 2))

    def tie_shuffle_modules(self) -> nn.Module:
        order = torch.randperm(self.channels)
        steps = (nn.ChannelShuffle(4), gnn.ChannelPermutation(order), nn.ChannelShuffle(2))
        return nn.Sequential(*steps)

    def tie_shuffled_residual(self) -> nn.Module:
        return Step(lambda a, x: a(x) + shuffled(x, 2), self.unit(self.channels, self.channels))

    def tie_depthwise(self) -> nn.Module:
        into, self.channels = self.channels, self.channels * (1 + pick(2))
        return nn.Conv2d(into, self.channels, 3, padding=1, groups=into)

    def tie_grouped(self) -> nn.Module:
        return nn.Conv2d(self.channels, self.channels, 3, padding=1, groups=2)

    def tie_pools(self) -> nn.Module:
        return Step(lambda x: F.interpolate(F.max_pool2d(F.avg_pool2d(x, 2, 1), 2), size=8))

    def tie_pixel_shuffle(self) -> nn.Module:
        a, self.channels = self.unit(self.channels, 16), 4
        return Step(lambda a, x: F.avg_pool2d(F.relu(F.pixel_shuffle(a(x), 2)), 2), a)

    def tie_pixel_unshuffle(self) -> nn.Module:
        self.channels *= 4
        a = self.tie_unit()
        return Step(lambda a, x: F.interpolate(a(F.pixel_unshuffle(x, 2)), scale_factor=2), a)

    def tie_transposed(self) -> nn.Module:
        into, self.channels, groups = self.channels, 4 * (1 + pick(3)), 1 + pick(2)
        a = nn.ConvTranspose2d(into, self.channels, 4, stride=2, padding=1, groups=groups)
        return nn.Sequential(a, nn.MaxPool2d(2))

    def tie_transposed_depthwise(self) -> nn.Module:
        into, self.channels = self.channels, self.channels * (1 + pick(2))
        return nn.ConvTranspose2d(into, self.channels, 3, padding=1, groups=into)

    def tie_called_twice(self) -> nn.Module:
        return Step(lambda a, x: a(F.relu(a(x))), self.unit(self.channels, self.channels))

    def tie_one_weight(self) -> nn.Module:
        a, b = (nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in range(2))
        b.weight = a.weight
        return Step(lambda a, b, x: b(a(x).relu()) + x, a, b)

    def tie_zero_padding(self) -> nn.Module:
        self.channels += 4
        a = self.unit(self.channels, self.channels)
        return Step(lambda a, x: a(F.pad(x, (0, 0, 0, 0, 1, 3))), a)

    def tie_spatial_attention(self) -> nn.Module:
        def attend(a: nn.Module, x: Tensor) -> Tensor:
            return x * a(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()

        return Step(attend, nn.Conv2d(2, 1, 3, padding=1))

    def tie_last_axis(self) -> nn.Module:
        a = nn.Linear(self.channels, self.channels)
        return Step(lambda a, x: a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), a)

    def tie_reshaped(self) -> nn.Module:
        into, self.channels = self.channels, 4
        a, b = nn.Linear(into, 128), nn.ConvTranspose2d(8, 4, 2, stride=2)
        return Step(lambda a, b, x: b(a(x.mean((2, 3))).view(-1, 8, 4, 4)), a, b)

    def tie_halves_summed(self) -> nn.Module:
        def summed(a: nn.Module, x: Tensor) -> Tensor:
            return a(x).view(len(x), 2, -1, *x.shape[2:]).sum(1)

        return Step(summed, self.unit(self.channels, 2 * self.channels))

    def tie_convolved_over_channels(self) -> nn.Module:
        def attend(a: nn.Module, x: Tensor) -> Tensor:
            return x * a(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]

        return Step(attend, nn.Conv1d(1, 1, 3, padding=1))

    def end(self) -> nn.Module:
        kind = pick(3)
        if kind == 0:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.channels, 5))
        last = nn.Identity() if kind == 1 else Step(lambda x: x.permute(0, 2, 3, 1))
        return nn.Sequential(last, nn.Flatten(), nn.Linear(self.channels * 64, 5))


def pick(count: int) -> int:
    return int(torch.randint(count, ()))
