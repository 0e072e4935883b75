"""More images than there are: cropped and flipped at random."""

import torch
from torch import Tensor
from torchvision.transforms import v2

# What a crop may leave out at each side, as a share of the size.
_SHIFT = 8


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch, each image moved by up to an eighth of its size and perhaps flipped.

    The borders are mirrored. That is what CIFAR networks are trained with (He et al. 2016,
    https://arxiv.org/abs/1512.03385).

    Args:
        images: ``(N, C, H, W)``, floating point, in any range.
        generator: of all that is random.
    """
    height, width = images.shape[2:]
    change = v2.Compose(
        [
            v2.RandomCrop(
                (height, width), padding=[width // _SHIFT, height // _SHIFT], padding_mode="reflect"
            ),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        return torch.stack([change(image) for image in images])
