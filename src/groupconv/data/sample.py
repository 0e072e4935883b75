"""The bundled sample of Fashion-MNIST, and the network trained on it."""

from importlib.resources import files

import numpy as np
import torch
from safetensors.torch import load

from groupconv.data.images import Images
from groupconv.models import FashionResNet, fashion_resnet


def fashion_mnist() -> tuple[Images, Images]:
    """8,000 images for calibration and 2,000 test images, ``(N, 1, 28, 28)`` in [0, 1].

    Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747 (MIT licence).
    """
    with files("groupconv.data").joinpath("fashion_mnist.npz").open("rb") as file:
        arrays = dict(np.load(file, allow_pickle=False))
    calibration, test = (
        Images(
            torch.from_numpy(arrays[f"{split}_images"])[:, None].float() / 255,
            torch.from_numpy(arrays[f"{split}_labels"]).long(),
            "Fashion-MNIST",
        )
        for split in ("calibration", "test")
    )
    return calibration, test


def trained_fashion_resnet() -> FashionResNet:
    """The dense residual network, trained on all 60,000 images, in evaluation mode."""
    model = fashion_resnet()
    content = files("groupconv.data").joinpath("fashion_resnet.safetensors").read_bytes()
    model.load_state_dict(load(content))
    return model.eval()
