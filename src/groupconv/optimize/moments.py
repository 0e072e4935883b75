"""Second moments of what a layer sees and of what it should give, streamed over images.

For a convolution, u is the im2col vector at one output position, of C_in * k_h * k_w numbers, and
y the C_out outputs there. Sums are kept in float64.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.trace import TracedConv


@dataclass(frozen=True)
class Moments:
    """Centred second moments, in float64.

    Args:
        count: positions seen.
        mean_u, mean_y: ``(D,)`` and ``(C_out,)``, with D = C_in * prod(kernel_size).
        uu: ``(D, D)``, covariance of the inputs.
        yu: ``(C_out, D)``, covariance of outputs with inputs.
        yy: ``(C_out,)``, variance of the outputs.
    """

    count: int
    mean_u: Tensor
    mean_y: Tensor
    uu: Tensor
    yu: Tensor
    yy: Tensor


class MomentSums:
    """Running sums from which :class:`Moments` are made."""

    def __init__(self, spec: ConvSpec) -> None:
        d = spec.in_channels * math.prod(spec.kernel_size)
        self.count = 0
        self.u, self.y = (torch.zeros(n, dtype=torch.float64) for n in (d, spec.out_channels))
        self.uu = torch.zeros(d, d, dtype=torch.float64)
        self.yu = torch.zeros(spec.out_channels, d, dtype=torch.float64)
        self.yy = torch.zeros(spec.out_channels, dtype=torch.float64)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Add positions: ``u`` of shape ``(P, D)`` and ``y`` of shape ``(P, C_out)``."""
        u, y = u.double().cpu(), y.double().cpu()
        self.count += len(u)
        self.u += u.sum(0)
        self.y += y.sum(0)
        self.uu.addmm_(u.T, u)
        self.yu.addmm_(y.T, u)
        self.yy += y.square().sum(0)

    def finish(self) -> Moments:
        mean_u, mean_y = self.u / self.count, self.y / self.count
        return Moments(
            self.count,
            mean_u,
            mean_y,
            self.uu / self.count - torch.outer(mean_u, mean_u),
            self.yu / self.count - torch.outer(mean_y, mean_u),
            self.yy / self.count - mean_y.square(),
        )


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
) -> tuple[Tensor, Tensor]:
    """im2col vectors and outputs at random positions of a batch, or at all if there are fewer.

    Args:
        spec: of the convolution; its batch and input size are taken from ``x`` instead.
        x: ``(N, C_in, *size)``, input of the convolution, not padded.
        y: ``(N, C_out, *out_size)``.
        positions: at most this many.
        generator: picks them.

    Returns:
        u of shape ``(P, C_in * prod(k))`` and y of shape ``(P, C_out)``.
    """
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
    return picked.flatten(1), y.movedim(1, -1)[(image, *place)]


def layer_moments(
    original: nn.Module,
    current: nn.Module,
    layers: Sequence[tuple[TracedConv, str]],
    batches: Iterable[Tensor],
    *,
    max_positions: int,
    images: int,
    seed: int,
) -> list[Moments]:
    """Moments of several layers: inputs as ``current`` has them, outputs as ``original`` does.

    Args:
        original, current: networks in evaluation mode; they may be the same object.
        layers: each layer of ``original`` with the name of its convolution in ``current``.
        batches: ``(N, C, H, W)``, in the same order on every call.
        max_positions: positions to sample per layer, spread evenly over ``images``.
        images: number of images in ``batches``.
        seed: of the sampling.
    """
    sums = [MomentSums(conv.spec) for conv, _ in layers]
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        positions = math.ceil(max_positions * len(batch) / images)
        targets = capture(original, [conv.name for conv, _ in layers], batch)
        inputs = targets
        if current is not original:
            inputs = capture(current, [name for _, name in layers], batch)
        for total, (conv, name) in zip(sums, layers, strict=True):
            key = conv.name if current is original else name
            total.add(
                *sample(conv.spec, inputs[key][0], targets[conv.name][1], positions, generator)
            )
    return [total.finish() for total in sums]
