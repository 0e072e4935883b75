"""How much the network's output follows each output channel of its layers.

Errors of a layer's channels are not worth the same: one that a later layer hardly reads, or that a
batch norm scales down, may be off by far. To first order an error ``e`` in the outputs ``y`` of a
layer moves the network's output by ``J e``; the mean square of ``J^T v`` over images and positions,
with v random signs, weighs the channels (Hutchinson 1990,
https://doi.org/10.1080/03610919008812866). No parameter is changed.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from groupconv.optimize.structure import Layer, channels
from groupconv.optimize.visit import rows

log = logging.getLogger(__name__)

# Weights below this share of a layer's mean are raised to it: a channel must not be lost for good.
_LEAST = 1e-2


def output_importance(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    seed: int,
    ends: Sequence[str] = ("",),
) -> dict[str, Tensor]:
    """Weights of the output channels of some layers, mean 1 in each.

    Args:
        model: in evaluation mode.
        names: of its convolutions.
        batches: ``(N, C, H, W)``.
        seed: of the signs.
        ends: names of the modules whose outputs count; the model itself is named "".

    Returns:
        layer name to ``(C_out,)``, in float64. All are equal where the network's output does not
        depend on a layer in a way that can be differentiated.
    """
    squares: dict[str, Tensor] = {}
    spreads: list[Tensor] = []

    def watch(name: str, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            dims = [0, *range(2, gradient.ndim)]
            found = gradient.double().square().sum(dims).cpu()
            squares[name] = squares.get(name, 0.0) + found

        if output.requires_grad:
            output.register_hook(add)

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: watch(name, output)
        )
        for name in names
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad():
            for batch in batches:
                x = batch.detach().requires_grad_()
                found = [y for y in rows(model, x, ends) if y.requires_grad]
                # Each of several outputs counts as much as the others.
                spreads = spreads or [y.detach().std(correction=0).clamp_min(1e-30) for y in found]
                if found:
                    total = torch.stack(
                        [
                            (y * _signs(y, generator)).sum() / spread
                            for y, spread in zip(found, spreads, strict=True)
                        ]
                    )
                    # By the input: no parameter's gradient is touched.
                    torch.autograd.grad(total.sum(), x)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name in names:
        weights = squares.get(name)
        if weights is None or not torch.isfinite(weights).all() or not weights.any():
            log.info("%s: its outputs all count alike: the output has no gradient there", name)
            layer = model.get_submodule(name)
            assert isinstance(layer, Layer)
            weights = torch.ones(channels(layer)[1], dtype=torch.float64)
        weights = weights / weights.mean()
        result[name] = weights.clamp_min(_LEAST)
    return result


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0).to(output)
