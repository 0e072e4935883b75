"""More images than there are: cropped and flipped at random."""

import torch
from torch import Tensor
from torchvision.transforms import v2

# What small images are moved by at most, as a share of the size.
_SHIFT = 8
# Rows and columns from which images are large, and the least share of one that a crop takes.
_LARGE, _SCALE = 96, 0.35


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch, each image cropped and perhaps flipped.

    Small ones are moved by up to an eighth of their size, their borders mirrored: what CIFAR
    networks are trained with (He et al. 2016, https://arxiv.org/abs/1512.03385). Of large ones a
    part of another size and shape is taken, as for ImageNet (Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842), but more of it: students learn most from what their teacher
    knows.

    Args:
        images: ``(N, C, H, W)``, floating point, in any range.
        generator: of all that is random.
    """
    height, width = images.shape[2:]
    if min(height, width) < _LARGE:
        crop: v2.Transform = v2.RandomCrop(
            (height, width), padding=[width // _SHIFT, height // _SHIFT], padding_mode="reflect"
        )
    else:
        crop = v2.RandomResizedCrop((height, width), scale=(_SCALE, 1.0))
    change = v2.Compose([crop, v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        return torch.stack([change(image) for image in images])
