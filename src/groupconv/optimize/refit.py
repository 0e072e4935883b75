"""Sequential refit: each grouped layer in turn, on the inputs that the layers before it now give.

The target is always the *original* network's output at that layer, so a later layer also repairs
what earlier ones lost.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from groupconv.optimize.convert import Converted
from groupconv.optimize.fit import fit_groups
from groupconv.optimize.moments import group_moments


@torch.no_grad()
def refit(
    original: nn.Module,
    converted: Converted,
    batches: Callable[[], Iterable[Tensor]],
    *,
    max_positions: int,
    images: int,
    seed: int,
) -> dict[str, float]:
    """Fit every converted layer in closed form, in place.

    Args:
        original, converted: networks in evaluation mode.
        batches: makes the calibration batches, in the same order on every call.
        max_positions, images, seed: see :func:`layer_moments`.

    Returns:
        layer name to the share of the output's variance that is lost there.
    """
    net, losses = converted.model, {}
    for placed in converted.placed:
        name, module = placed.conv.name, net.get_submodule(placed.module)
        assert isinstance(module, nn.modules.conv._ConvNd)
        # The inputs arrive in the new layer's order already; the outputs are the original's. Its
        # weights are still those of the original, cut.
        parts = group_moments(
            original,
            net,
            (placed.conv, placed.module),
            batches(),
            groups=module.groups,
            outputs=placed.channels_out,
            max_positions=max_positions,
            images=images,
            seed=seed,
        )
        result = fit_groups(parts, module.weight)
        module.weight.copy_(result.weight)
        if module.bias is not None:
            module.bias.copy_(result.bias)
        else:
            assert placed.conv.batch_norm is not None
            norm = net.get_submodule(placed.conv.batch_norm)
            order = converted.edits[name].order_out
            shift = result.bias if order is None else result.bias[list(order)]
            assert isinstance(norm.running_mean, Tensor)
            norm.running_mean.sub_(shift.to(norm.running_mean.device))
        losses[name] = result.loss
    return losses
