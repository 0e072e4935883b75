"""Operators as networks write them: on native code, and equal to eager PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler.eager import Function, agree, cuts, numbers
from torch import Tensor, nn
from torchvision.ops import Permute
from torchvision.ops.misc import FrozenBatchNorm2d

import groupconv
from groupconv import GroupConvError

IMAGE = numbers(2, 6, 9, 7)
LAST = IMAGE.to(memory_format=torch.channels_last)


def native(module: nn.Module, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.6, 0.6)
    assert cuts(agree(module.eval(), *inputs, tolerance=tolerance)) == {}


def normed(norm: nn.Module) -> nn.Module:
    """With statistics that are no ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


CONVOLUTIONS: dict[str, tuple[nn.Module, Tensor]] = {
    "pointwise": (nn.Conv2d(6, 10, 1), IMAGE),
    "dense": (nn.Conv2d(6, 10, 3, padding=1, bias=False), IMAGE),
    "strided": (nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(0, 2)), IMAGE),
    "dilated": (nn.Conv2d(6, 10, 3, dilation=2, padding=2), IMAGE),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), IMAGE),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding="same"), IMAGE),
    "depthwise wide": (nn.Conv2d(6, 12, 5, groups=6, stride=2, padding=2), IMAGE),
    "padded by 'valid'": (nn.Conv2d(6, 4, 3, padding="valid"), IMAGE),
    "whole image": (nn.Conv2d(6, 4, (9, 7)), IMAGE),
    "one pixel": (nn.Conv2d(6, 4, 1), numbers(3, 6, 1, 1)),
    "one row": (nn.Conv2d(6, 4, (1, 3)), numbers(3, 6, 1, 11)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), IMAGE),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), IMAGE),
    "1-d": (nn.Conv1d(6, 4, 3, padding=1), numbers(2, 6, 11)),
    "1-d grouped": (nn.Conv1d(6, 6, 3, stride=2, groups=6, dilation=2), numbers(2, 6, 11)),
    "1-d transposed": (nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), numbers(2, 6, 11)),
    "linear": (nn.Linear(6, 9), numbers(3, 6)),
    "linear on tokens": (nn.Linear(7, 5, bias=False), numbers(2, 3, 7)),
    "linear on pixels": (nn.Linear(7, 5), numbers(2, 3, 4, 7)),
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, last: bool) -> None:
    module, x = CONVOLUTIONS[kind]
    if last and x.ndim != 4:
        pytest.skip("no image")
    native(module, x.to(memory_format=torch.channels_last) if last else x)


def test_chains_of_1d_convolutions() -> None:
    norm = normed(nn.BatchNorm1d(8))
    native(
        nn.Sequential(
            nn.Conv1d(6, 8, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Conv1d(8, 4, 1),
            nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        numbers(2, 6, 11),
    )  # fmt: skip


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.3), nn.Sigmoid(),
    nn.Hardsigmoid(), nn.GELU(), nn.GELU("tanh"), nn.PReLU(), nn.PReLU(6), nn.ELU(0.7), nn.CELU(2),
    nn.SELU(), nn.Tanh(), nn.Softplus(), nn.Mish(), nn.Hardtanh(-2, 0.5), nn.LogSigmoid(),
    nn.Softsign(), nn.Threshold(0.1, 20), nn.Softmax2d(),
]  # fmt: skip
_FOREIGN = (nn.LogSigmoid, nn.Threshold)


@pytest.mark.parametrize("x", [IMAGE, LAST, numbers(3, 6)], ids=["first", "last", "matrix"])
def test_activations_alone_and_after_a_convolution(x: Tensor) -> None:
    """All at once: each is an output."""
    usable = [a for a in ACTIVATIONS if not isinstance(a, _FOREIGN)]
    if x.ndim == 2:
        usable.pop()
    layer = nn.Conv2d(6, 6, 1) if x.ndim == 4 else nn.Linear(6, 6)

    def forward(layer: nn.Module, *rest: Any) -> list[Tensor]:
        *parts, x = rest
        return [part(x) for part in parts] + [part(2 * layer(x)) for part in parts]

    native(Function(forward, layer, *usable), x)


def test_activations_that_are_not_native() -> None:
    for part in ACTIVATIONS:
        if isinstance(part, _FOREIGN):
            assert len(cuts(agree(Function(lambda p, x: p(x), part), IMAGE))) == 1


def test_arithmetic() -> None:
    def forward(scale: Tensor, x: Tensor, y: Tensor, gate: Tensor, mask: Tensor) -> list[Tensor]:
        row = scale.weight[0]
        return [
            x + y, x - y, x * y, x / (y + 10), 3 - x, 2 / (x + 10), x + 1, x - 0.5, x * 2, x / 3,
            -x, x * gate, gate * x, x + mask, mask - x, x * gate + y * mask,
            x * row[:, None, None], row.view(1, -1, 1, 1) - x, x / row.view(6, 1, 1).abs(),
            torch.add(x, y, alpha=0.3), torch.sub(x, y, alpha=2), torch.rsub(x, y), x.abs(),
            (x.abs() + 1).log(), x.exp(), (x.abs() + 1).sqrt(), (x.abs() + 1).rsqrt(), x**2,
            x.square(), x**3, (x.abs() + 1) ** 0.5, (x + 10).reciprocal(), x.erf(),
            torch.maximum(x, y), torch.minimum(x, y), x.clamp(min=0.1), x.clamp(-1, 0.5),
            x.clamp(max=0.2), x.clamp_min(0), x.clamp_max(0),
        ]  # fmt: skip

    gate, mask = numbers(2, 6, 1, 1, seed=2), numbers(2, 1, 9, 7, seed=3)
    y = numbers(2, 6, 9, 7, seed=1)
    native(Function(forward, nn.Linear(6, 1)), IMAGE, y, gate, mask)
    native(Function(forward, nn.Linear(6, 1)), LAST, y, gate, mask)


def test_squeeze_and_excite() -> None:
    down, up, conv = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(conv: nn.Module, down: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
        y = F.silu(conv(x))
        return y * up(F.relu(down(F.adaptive_avg_pool2d(y, 1)))).sigmoid() + x

    native(Function(forward, conv, down, up), IMAGE)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": nn.MaxPool2d(2),
    "max 3": nn.MaxPool2d(3, 2, 1),
    "max ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max ceil padded": nn.MaxPool2d((2, 3), (3, 2), (1, 1), ceil_mode=True),
    "max dilated": nn.MaxPool2d(3, 1, 1, dilation=2),
    "max of one": nn.MaxPool2d(1, 2),
    "average": nn.AvgPool2d(2),
    "average 3": nn.AvgPool2d(3, 2, 1),
    "average uncounted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average ceil": nn.AvgPool2d((2, 3), (2, 2), (1, 1), ceil_mode=True),
    "average ceil uncounted": nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False),
    "average divided": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "average ceil divided": nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
    "adaptive average": nn.AdaptiveAvgPool2d((4, 3)),
    "adaptive average to more": nn.AdaptiveAvgPool2d((11, 8)),
    "adaptive average of rows": nn.AdaptiveAvgPool2d((None, 1)),
    "adaptive max": nn.AdaptiveMaxPool2d((4, 3)),
    "global average": nn.AdaptiveAvgPool2d(1),
    "global max": nn.AdaptiveMaxPool2d(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean kept": lambda x: x.mean([-1, -2], keepdim=True),
    "amax": lambda x: x.amax((2, 3)),
    "mean of rows flattened": lambda x: x.flatten(2).mean(-1),
    "mean of tokens": lambda x: x.flatten(2).transpose(1, 2).mean(1),
    "mean of NHWC": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "sum": lambda x: x.sum((2, 3)),
    "sum kept": lambda x: x.sum((-1, -2), keepdim=True),
    "norm": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, (13, 5)),
    "nearest by 1.7": lambda x: F.interpolate(x, scale_factor=1.7),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear aligned": nn.Upsample((13, 5), mode="bilinear", align_corners=True),
    "bilinear recomputed": lambda x: F.interpolate(
        x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True
    ),
    "pad": nn.ZeroPad2d((1, 2, 0, 3)),
    "pad with a number": nn.ConstantPad2d((1, 2, 0, 3), 1.5),
    "crop": lambda x: F.pad(x, (-1, 0, 2, -3)),
}


@pytest.mark.parametrize("x", [IMAGE, LAST], ids=["first", "last"])
def test_rows_and_columns(x: Tensor) -> None:
    native(Function(lambda x: {name: pool(x) for name, pool in POOLS.items()}), x)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 1, 13), (1, 1, 2, 1)], ids=str)
def test_tiny_images(shape: tuple[int, ...]) -> None:
    def forward(conv: nn.Module, x: Tensor) -> list[Tensor]:
        y = conv(x)
        return [
            y, x.mean((2, 3)), F.interpolate(x, scale_factor=3, mode="bilinear"),
            F.interpolate(y, (1, 1), mode="bilinear", align_corners=True), F.pad(x, (1, 1, 2, 0)),
            F.adaptive_avg_pool2d(x, (2, 2)), F.max_pool2d(y, 3, 1, 1), F.avg_pool2d(y, 3, 2, 1),
        ]  # fmt: skip

    native(Function(forward, nn.Conv2d(shape[1], 4, 3, padding=1)), numbers(*shape))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_pytorch_runs(mode: str) -> None:
    module = nn.Sequential(
        nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    compiled = agree(module, IMAGE)
    assert len(cuts(compiled)) == 1
    report = compiled.report()
    assert len(report.cuts) == len(cuts(compiled))
    assert all(cut.operator in str(report) for cut in report.cuts)


def test_circular_padding_is_refused() -> None:
    """PyTorch writes it into a tensor behind the recording's back."""
    module = nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular").eval()
    with pytest.raises(GroupConvError, match="changes a tensor that it made"):
        groupconv.compile(module, IMAGE)


class NormOfImages(nn.LayerNorm):
    """As torchvision and timm write the layer norm of ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def test_layer_norms() -> None:
    for x in (IMAGE, LAST):
        native(nn.Sequential(nn.Conv2d(6, 6, 1), NormOfImages(6, eps=1e-6), nn.Conv2d(6, 3, 1)), x)
    native(nn.LayerNorm(6), numbers(2, 5, 6))
    native(nn.LayerNorm(6, elementwise_affine=False), numbers(4, 6))
    native(nn.LayerNorm(6, bias=False), numbers(2, 3, 4, 6))


def test_a_block_of_convnext() -> None:
    """In NHWC between the permutations, nothing is moved."""
    conv = nn.Conv2d(6, 6, 7, padding=3, groups=6)
    block = nn.Sequential(
        conv, Permute([0, 2, 3, 1]), nn.LayerNorm(6, eps=1e-6), nn.Linear(6, 24), nn.GELU(),
        nn.Linear(24, 6), Permute([0, 3, 1, 2]),
    )  # fmt: skip
    module = Function(lambda b, x: x + b(x), block).eval()
    compiled = agree(module, LAST)
    assert cuts(compiled) == {}
    kinds = [type(node.operator).__name__ for node in compiled.program(LAST).graph.nodes]
    assert "Relayout" not in kinds


def test_batch_norms() -> None:
    conv, norm = nn.Conv2d(6, 8, 3), normed(nn.BatchNorm2d(8, affine=False))
    native(nn.Sequential(conv, norm, normed(nn.BatchNorm2d(8)), nn.ReLU()), IMAGE)
    native(normed(nn.BatchNorm2d(6)), IMAGE)
    native(nn.Sequential(nn.Linear(6, 8), normed(nn.BatchNorm1d(8))), numbers(3, 6))
    native(nn.Sequential(nn.Conv2d(6, 8, 1), normed(FrozenBatchNorm2d(8))), IMAGE)


def test_batch_norms_that_use_the_batch() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    assert "statistics of the batch" in cuts(agree(norm, IMAGE))["aten.native_batch_norm.default"]


@pytest.mark.parametrize("x", [IMAGE, LAST], ids=["first", "last"])
def test_joins(x: Tensor) -> None:
    def forward(conv: nn.Module, x: Tensor) -> list[Tensor]:
        y, filled, written = conv(x), torch.zeros(2, 6, 9, 7), x + 0
        filled[:, 1:4] = y[:, :3]
        written[:, 2] = y[:, 0]
        return [
            torch.cat([x, y, x[:, :2]], 1), torch.cat([torch.ones(2, 2, 9, 7), y], 1),
            torch.stack([x, y], 2).flatten(1, 2), filled, written,
            torch.cat([x.mean((2, 3)), y.amax((2, 3))], -1), torch.cat([y, x[:, :0]], 1),
        ]  # fmt: skip

    native(Function(forward, nn.Conv2d(6, 6, 1)), x)


def test_heads() -> None:
    """Flattened images, several linear layers, softmax."""
    flat = nn.Sequential(
        nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 5, 16), nn.ReLU6(),
        nn.Dropout(), nn.Linear(16, 5), nn.Softmax(1),
    )  # fmt: skip
    native(flat, IMAGE)
    native(flat, LAST)
    native(Function(lambda x: x.flatten(2).softmax(-1)), IMAGE)
    native(Function(lambda x: x.softmax(1)), IMAGE)
    native(
        Function(lambda layer, x: x @ layer.weight + layer.bias[:4], nn.Linear(4, 6)), numbers(3, 6)
    )


def test_attention_is_left_to_pytorch() -> None:
    def forward(qkv: nn.Module, out: nn.Module, x: Tensor) -> Tensor:
        q, k, v = qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return out((q @ k.mT).softmax(-1) @ v.contiguous())

    module = Function(forward, nn.Linear(8, 24), nn.Linear(4, 4))
    found = cuts(agree(module, numbers(2, 5, 8)))
    assert "aten.bmm.default" in found
    assert "aten._softmax.default" not in found


def test_private_operators_get_dense_tensors() -> None:
    """Attention of one kernel expects them, and reads something else otherwise."""

    def forward(conv: nn.Module, x: Tensor) -> Tensor:
        q, k, v = conv(x).view(2, 3, 2, 8, -1).mT.unbind(1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return y.mT.reshape(2, 16, *x.shape[2:])

    found = cuts(agree(Function(forward, nn.Conv2d(6, 48, 1)), IMAGE))
    assert any("flash_attention" in operator for operator in found)
