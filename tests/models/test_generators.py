"""BigGAN and StyleGAN2: their published sizes, and what makes their images."""

import pytest
import torch
from compare import assert_close
from torch import Tensor

from groupconv.errors import ArgumentError
from groupconv.models.biggan import BigGAN
from groupconv.models.stylegan2 import StyleGAN2


def stylegan2() -> tuple[StyleGAN2, Tensor]:
    """A small one, and latents for it."""
    torch.manual_seed(0)
    return StyleGAN2(size=32, width=1 / 16).eval(), torch.randn(3, StyleGAN2.latent_dim)


def test_sizes() -> None:
    """As BigGAN's authors print for 128 pixels, and those of StyleGAN2 for 1,024."""
    with torch.device("meta"):
        generators = BigGAN(), StyleGAN2()
    assert [sum(p.numel() for p in g.parameters()) for g in generators] == [70_433_988, 30_370_060]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BigGAN(num_classes=0), "num_classes=0"),
        (lambda: BigGAN(channels=12), "channels=12"),
        (lambda: StyleGAN2(size=48), "size=48"),
        (lambda: StyleGAN2(size=1024, width=0.01), "width=0.01"),
    ],
)
def test_illegal_arguments(build: type, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


def test_class_and_every_part_of_the_latent_count() -> None:
    torch.manual_seed(0)
    net = BigGAN(num_classes=5, channels=8).eval()
    with torch.no_grad():
        net.attention.gamma.fill_(0.5)
    x = torch.cat([torch.randn(1, net.latent_dim), torch.eye(5)[:1]], 1)
    image = net(x)
    assert image.shape == (1, 3, 128, 128)
    assert image.abs().max() <= 1
    for place in (0, 20, 119, 122):
        moved = x.clone()
        moved[0, place] += 1
        assert not torch.allclose(net(moved), image)


def test_the_style_scales_the_weights_of_each_image() -> None:
    """The paper's form: weights for each image, the images as groups of one convolution."""
    net, latents = stylegan2()
    layer = net.blocks[0].same.modulated
    x, style = torch.randn(3, 32, 8, 8), latents[:3]
    scales = layer.affine(style)
    weights = layer.conv.weight[None] * scales[:, None, :, None, None]
    weights = weights * torch.rsqrt(weights.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    expected = torch.conv2d(
        x.reshape(1, 96, 8, 8), weights.reshape(96, 32, 3, 3), padding=1, groups=3
    )
    assert_close(layer(x, style), expected.reshape(3, 32, 8, 8), rtol=1e-4, atol=1e-5)


def test_scales_follow_the_weights_in_training() -> None:
    net, latents = stylegan2()
    before = net(latents[:2])
    with torch.no_grad():
        net.first.modulated.conv.weight.mul_(3)
    assert not torch.allclose(net(latents[:2]), before)
    net.train()(latents[:2])
    assert_close(net.eval()(latents[:2]), before, rtol=1e-4, atol=1e-5)
