"""Second moments of layers, streamed: never more in memory than the sums and one batch."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.covariance import (
    LayerSums,
    Moments,
    SeparableMoments,
    SeparableSums,
)
from groupconv.optimize.trace import TracedConv

# Inputs per position, D, up to which their covariance is kept whole: 170 MB in float64.
EXACT = 4_608


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its job
    """The last layer of interest has run."""


@torch.no_grad()
def capture(
    model: nn.Module, names: Sequence[str], batch: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of the named modules in one forward pass, which stops at the last."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, output: Tensor, args: tuple[Tensor, ...]) -> None:
        # Clone: an activation in place would overwrite the output.
        seen[name] = (args[0].clone(), output.clone())
        if len(seen) == len(names):
            raise Reached

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: keep(name, output, args)
        )
        for name in names
    ]
    try:
        model(batch)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def sample(
    spec: ConvSpec, x: Tensor, y: Tensor, positions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """im2col vectors and outputs at random positions of a batch, or at all if there are fewer.

    Args:
        spec: of the convolution; its batch and input size are taken from ``x`` instead.
        x: ``(N, C_in, *size)``, input of the convolution, not padded.
        y: ``(N, C_out, *out_size)``.
        positions: at most this many.
        generator: picks them.

    Returns:
        u of shape ``(P, C_in * prod(k))``, y of shape ``(P, C_out)`` and the image in the batch
        that each position is from, of shape ``(P,)``.

    Raises:
        ArgumentError: the convolution is a transposed one.
    """
    if spec.transposed:
        raise ArgumentError(
            f"moments: transposed=True ({spec.in_channels} -> {spec.out_channels} channels): "
            "only convolutions that are not transposed can be fitted"
        )
    x = F.pad(x, [n for pair in reversed(spec.padding) for n in pair])
    out_size = tuple(y.shape[2:])
    dims = len(out_size)
    spatial = x.stride()[2:]
    windows = x.as_strided(
        (*x.shape[:2], *out_size, *spec.kernel_size),
        (
            *x.stride()[:2],
            *(a * s for a, s in zip(spatial, spec.stride, strict=True)),
            *(a * d for a, d in zip(spatial, spec.dilation, strict=True)),
        ),
    )
    total = len(x) * math.prod(out_size)
    if positions < total:
        flat = torch.randperm(total, generator=generator)[:positions]
    else:
        flat = torch.arange(total)
    image, *place = torch.unravel_index(flat, (len(x), *out_size))
    # Channels last, so that one index picks all channels of a position.
    picked = windows.movedim(1, dims + 1)[(image, *place)]
    return picked.flatten(1), y.movedim(1, -1)[(image, *place)], image


def layer_moments(
    original: nn.Module,
    current: nn.Module,
    layers: Sequence[tuple[TracedConv, str]],
    batches: Iterable[Tensor],
    *,
    max_positions: int,
    images: int,
    seed: int,
) -> list[Moments | SeparableMoments]:
    """Moments of several layers: inputs as ``current`` has them, outputs as ``original`` does.

    Where ``torch.distributed`` is initialised the sums are over all processes, each of which
    brings its own images.

    Args:
        original, current: networks in evaluation mode; they may be the same object.
        layers: each layer of ``original`` with the name of its convolution in ``current``.
        batches: ``(N, C, H, W)``, in the same order on every call.
        max_positions: positions to sample per layer, spread evenly over ``images``.
        images: number of images in ``batches``.
        seed: of the sampling.

    Returns:
        Moments of each layer; of one with more than ``EXACT`` inputs per position only those of
        its own inputs, as a Kronecker product.

    Raises:
        ArgumentError: a layer is a transposed convolution.
    """
    sums: list[LayerSums | SeparableSums] = []
    for conv, _ in layers:
        channels, taps = conv.spec.in_channels, math.prod(conv.spec.kernel_size)
        sums.append(
            SeparableSums(channels, taps)
            if channels * taps > EXACT
            else LayerSums(channels * taps, conv.spec.out_channels)
        )
    for i, u, y, image in _sampled(original, current, layers, batches, max_positions, images, seed):
        total = sums[i]
        total.add(u) if isinstance(total, SeparableSums) else total.add(u, y, image)
    return [total.finish() for total in sums]


def group_moments(
    original: nn.Module,
    current: nn.Module,
    layer: tuple[TracedConv, str],
    batches: Iterable[Tensor],
    *,
    groups: int,
    outputs: Sequence[int],
    max_positions: int,
    images: int,
    seed: int,
) -> list[Moments]:
    """Moments of each group of one layer: its own inputs and outputs only, exact at any width.

    Args:
        original, current, layer, batches, max_positions, images, seed: see :func:`layer_moments`.
        groups: of the layer in ``current``, whose inputs it cuts into equal runs.
        outputs: the channel of the original's output for each output of the layer.

    Raises:
        ArgumentError: the layer is a transposed convolution.
    """
    spec = layer[0].spec
    inputs, width = spec.in_channels * math.prod(spec.kernel_size), spec.out_channels // groups
    sums = [LayerSums(inputs // groups, width) for _ in range(groups)]
    of_group = torch.tensor(outputs).reshape(groups, width)
    for _, u, y, image in _sampled(
        original, current, [layer], batches, max_positions, images, seed
    ):
        for total, part, rows in zip(sums, u.chunk(groups, 1), of_group, strict=True):
            total.add(part, y[:, rows.to(y.device)], image)
    return [total.finish() for total in sums]


def _sampled(
    original: nn.Module,
    current: nn.Module,
    layers: Sequence[tuple[TracedConv, str]],
    batches: Iterable[Tensor],
    max_positions: int,
    images: int,
    seed: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Index of the layer, inputs, outputs and numbers of the images, for each layer and batch."""
    generator = torch.Generator().manual_seed(seed)
    before = 0
    for batch in batches:
        positions = math.ceil(max_positions * len(batch) / images)
        targets = capture(original, [conv.name for conv, _ in layers], batch)
        inputs = targets
        if current is not original:
            inputs = capture(current, [name for _, name in layers], batch)
        for i, (conv, name) in enumerate(layers):
            x = inputs[conv.name if current is original else name][0]
            u, y, image = sample(conv.spec, x, targets[conv.name][1], positions, generator)
            yield i, u, y, image + before
        before += len(batch)
