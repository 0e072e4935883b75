"""Write ``benchmarks/shapes/*.csv``: ``python -m benchmarks.make_shapes``.

Every distinct convolution is noted as it is met in one forward pass on the meta device, which
computes sizes and nothing else.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.shapes import FOLDER, Shape, write
from groupconv.kernels.spec import ConvSpec, same_padding


def convolutions(model: nn.Module, size: int) -> Counter[ConvSpec]:
    """Every distinct Conv2d of a model in the order it runs, and how often, on one image."""
    found: Counter[ConvSpec] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(module, nn.Conv2d)
        found[_spec(module, inputs[0].shape)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return found


def _spec(module: nn.Conv2d, shape: Sequence[int]) -> ConvSpec:
    if isinstance(module.padding, str):
        pads = same_padding(module.kernel_size, module.dilation)
        padding = tuple(pads) if module.padding == "same" else ((0, 0),) * 2
    else:
        padding = tuple((p, p) for p in module.padding)
    return ConvSpec(
        batch=shape[0],
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        input_size=tuple(shape[2:]),
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """File name to the model and the size of its images."""
    import timm
    from torchvision import models

    from groupconv.models.shufflenet_v1 import shufflenet_v1

    return {
        "resnext50_32x4d": (models.resnext50_32x4d, 224),
        "resnext101_32x8d": (models.resnext101_32x8d, 224),
        "regnet_x_400mf": (models.regnet_x_400mf, 224),
        "regnet_y_1_6gf": (models.regnet_y_1_6gf, 224),
        "shufflenet_v1_g3": (lambda: shufflenet_v1(3), 224),
        "shufflenet_v1_g8": (lambda: shufflenet_v1(8), 224),
        "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 224),
        "mobilenet_v1": (lambda: timm.create_model("mobilenetv1_100"), 224),
        "mobilenet_v2": (models.mobilenet_v2, 224),
        "mobilenet_v3_large": (models.mobilenet_v3_large, 224),
        "efficientnet_b0": (models.efficientnet_b0, 224),
        "efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), 224),
        "xception": (lambda: timm.create_model("legacy_xception"), 299),
        "convnext_tiny": (models.convnext_tiny, 224),
        "mixnet_s": (lambda: timm.create_model("mixnet_s"), 224),
        "resnet50_dense": (models.resnet50, 224),
    }


def _wanted(network: str, spec: ConvSpec) -> bool:
    if network == "resnet50_dense":
        return spec.groups == 1 and spec.kernel_size in ((1, 1), (3, 3))
    return spec.groups > 1


_BATCH_8 = ("resnext50_32x4d", "mobilenet_v2")


def main() -> None:
    for network, (make, size) in _networks().items():
        # Made eagerly: torchvision's RegNet computes its widths with tensors.
        model = make().to("meta")
        shapes = [
            Shape(network, spec, count)
            for spec, count in convolutions(model, size).items()
            if _wanted(network, spec)
        ]
        if network in _BATCH_8:
            shapes += [
                dataclasses.replace(s, spec=dataclasses.replace(s.spec, batch=8)) for s in shapes
            ]
        write(FOLDER / f"{network}.csv", shapes)
    for name, specs in _single_layers().items():
        write(FOLDER / f"{name}.csv", [Shape(name, spec, 1) for spec in specs])


def _single_layers() -> dict[str, list[ConvSpec]]:
    """Layers on their own, which stand for no whole network."""
    large = ConvSpec(
        1, 384, 384, (32, 32), (31, 31), (1, 1), ((15, 15), (15, 15)), (1, 1), groups=384
    )
    causal = ConvSpec(1, 768, 768, (1024,), (4,), (1,), ((3, 0),), (1,), groups=768)
    long = dataclasses.replace(causal, kernel_size=(31,), padding=((15, 15),))
    dense = ConvSpec(1, 128, 128, (56, 56), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=1)
    return {
        "depthwise_31x31": [large],
        "conv1d": [long, causal],
        "width_sweep": [dataclasses.replace(dense, groups=2**i) for i in range(8)],
    }


if __name__ == "__main__":
    main()
