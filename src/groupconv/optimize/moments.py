"""Second moments of layers, streamed: never more in memory than the sums and one batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from groupconv.optimize.covariance import (
    LayerSums,
    Moments,
    SeparableMoments,
    SeparableSums,
)
from groupconv.optimize.sampling import Sampling, inputs_at, outputs_at
from groupconv.optimize.trace import TracedConv
from groupconv.optimize.visit import visit
from groupconv.optimize.wanted import Added, Targets

# Inputs per position, D, up to which their covariance is kept whole: 170 MB in float64.
EXACT = 4_608


def layer_moments(
    model: nn.Module,
    layers: Sequence[tuple[TracedConv, str]],
    sampling: Sampling,
    targets: Targets | None = None,
) -> list[Moments | SeparableMoments]:
    """Moments of several layers: inputs as a network has them, outputs as the original does.

    Where ``torch.distributed`` is initialised each process takes a share of the batches, and the
    sums are over all of them.

    Args:
        model: in evaluation mode.
        layers: as traced in the original, and the name of the convolution in ``model``.
        sampling: of the calibration images.
        targets: of the original; None if that is ``model``.

    Returns:
        Moments of each layer; of one with more than ``EXACT`` inputs per position only those of
        its own inputs, as a Kronecker product.

    Raises:
        ArgumentError: a layer is a transposed convolution.
    """
    sums: list[LayerSums | SeparableSums] = []
    for conv, _ in layers:
        channels, taps = conv.spec.in_channels, conv.spec.taps
        sums.append(
            SeparableSums(channels, taps)
            if channels * taps > EXACT
            else LayerSums(channels * taps, conv.spec.out_channels)
        )

    def add(i: int, u: Tensor, y: Tensor, image: Tensor) -> None:
        total = sums[i]
        total.add(u) if isinstance(total, SeparableSums) else total.add(u, y, image)

    _sample(model, layers, sampling, targets, add)
    return [total.finish() for total in sums]


def group_moments(
    model: nn.Module,
    layer: tuple[TracedConv, str],
    sampling: Sampling,
    targets: Targets,
    *,
    groups: int,
    outputs: Sequence[int],
) -> Moments:
    """Moments of the groups of one layer: of the inputs and outputs of each only, exact at any
    width.

    Args:
        model, layer, sampling, targets: see :func:`layer_moments`.
        groups: of the layer in ``model``, whose inputs it cuts into equal runs.
        outputs: the channel of the original's output for each output of the layer.

    Raises:
        ArgumentError: the layer is a transposed convolution.
    """
    spec = layer[0].spec
    inputs, width = spec.in_channels * spec.taps, spec.out_channels // groups
    sums = LayerSums(inputs // groups, width, groups)

    def add(_: int, u: Tensor, y: Tensor, image: Tensor) -> None:
        y = y[:, torch.tensor(outputs, device=y.device)]
        u, y = (tensor.unflatten(1, (groups, -1)).movedim(1, 0) for tensor in (u, y))
        sums.add(u, y, image)

    _sample(model, [layer], sampling, targets, add)
    return sums.finish()


@torch.no_grad()
def _sample(
    model: nn.Module,
    layers: Sequence[tuple[TracedConv, str]],
    sampling: Sampling,
    targets: Targets | None,
    add: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    """Hand over what is sampled of each layer and batch, as soon as the layer has run.

    Args:
        add: takes the index of the layer, inputs, outputs, and the numbers of their images.
    """
    totals = [{} if targets is None else targets.of(conv) for conv, _ in layers]
    index = {name: i for i, (_, name) in enumerate(layers)}
    for number, before, batch in sampling.share():
        added = Added([] if targets is None else [conv for conv, _ in layers], sampling, number)

        def take(
            name: str,
            x: Tensor,
            y: Tensor,
            number: int = number,
            before: int = before,
            added: Added = added,
        ) -> None:
            added.see(name, x, y)
            if name not in index:
                return
            i = index[name]
            conv, place = layers[i][0], sampling.places(number, y.shape)
            u = inputs_at(conv.spec, x, tuple(y.shape[2:]), place)
            if targets is None:
                outputs = outputs_at(y, place)
            else:
                outputs = targets.less(conv, totals[i][number], added)
            add(i, u, outputs, place[0] + before)

        visit(model, [*index, *added.modules], batch, take)
