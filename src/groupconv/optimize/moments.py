"""Second moments of layers, streamed: never more in memory than the sums and one batch."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv import ranks
from groupconv.errors import ArgumentError
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.covariance import (
    LayerSums,
    Moments,
    SeparableMoments,
    SeparableSums,
)
from groupconv.optimize.trace import TracedConv
from groupconv.optimize.visit import visit

# Outputs of the original kept in memory at once.
_TARGETS_BYTES = 1 << 29

# Inputs per position, D, up to which their covariance is kept whole: 170 MB in float64.
EXACT = 4_608


@dataclass(frozen=True)
class Sampling:
    """Where positions are taken from.

    Args:
        batches: makes the batches of images ``(N, C, H, W)``, in the same order on every call.
        images: how many images there are in them.
        max_positions: to sample of each layer, spread evenly over the images.
        seed: of the choice.
    """

    batches: Callable[[], Iterable[Tensor]]
    images: int
    max_positions: int
    seed: int

    def share(self) -> Iterator[tuple[int, int, Tensor]]:
        """The batches of this process: number, images before it, and the batch itself."""
        before = 0
        for number, batch in enumerate(self.batches()):
            if number % ranks.count() == ranks.rank():
                yield number, before, batch
            before += len(batch)

    def places(self, number: int, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Positions of a batch, the same whenever they are asked for.

        Args:
            number: of the batch.
            shape: of the tensor, ``(N, C, *size)``.

        Returns:
            The image, and the position on each axis, of shape ``(P,)`` each.
        """
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        count = math.ceil(self.max_positions * shape[0] / self.images)
        return _places(shape, count, generator)


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
    place = _places(y.shape, positions, generator)
    return _inputs_at(spec, x, tuple(y.shape[2:]), place), _outputs_at(y, place), place[0]


def _places(shape: Sequence[int], positions: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Image and position on each axis, of some or all positions of a tensor ``(N, C, *size)``."""
    count, _, *size = shape
    total = count * math.prod(size)
    if positions < total:
        flat = torch.randperm(total, generator=generator)[:positions]
    else:
        flat = torch.arange(total)
    return torch.unravel_index(flat, (count, *size))


def _inputs_at(
    spec: ConvSpec, x: Tensor, out_size: tuple[int, ...], place: tuple[Tensor, ...]
) -> Tensor:
    """``(P, C_in * prod(k))``: what a convolution sees at some positions of its output."""
    if spec.transposed:
        raise ArgumentError(
            f"moments: transposed=True ({spec.in_channels} -> {spec.out_channels} channels): "
            "only convolutions that are not transposed can be fitted"
        )
    x = F.pad(x, [n for pair in reversed(spec.padding) for n in pair])
    spatial = x.stride()[2:]
    windows = x.as_strided(
        (*x.shape[:2], *out_size, *spec.kernel_size),
        (
            *x.stride()[:2],
            *(a * s for a, s in zip(spatial, spec.stride, strict=True)),
            *(a * d for a, d in zip(spatial, spec.dilation, strict=True)),
        ),
    )
    # Channels last, so that one index picks all channels of a position.
    return windows.movedim(1, len(out_size) + 1)[place].flatten(1)


def _outputs_at(y: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    """``(P, C_out)``."""
    return y.movedim(1, -1)[place]


class Targets:
    """The original network's outputs at the sampled positions, read for several layers at once.

    Args:
        original: in evaluation mode.
        convs: its layers, in the order in which they will be asked for.
        sampling: of the calibration images.
    """

    def __init__(
        self, original: nn.Module, convs: Sequence[TracedConv], sampling: Sampling
    ) -> None:
        self.original, self.convs, self.sampling = original, list(convs), sampling
        self._known: dict[str, dict[int, Tensor]] = {}

    def of(self, name: str) -> dict[int, Tensor]:
        """``(P, C_out)`` of each batch of this process, by its number.

        Those of layers asked for before are forgotten.
        """
        if name not in self._known:
            self._known.clear()
            self._read([conv.name for conv in self.convs].index(name))
        return self._known[name]

    @torch.no_grad()
    def _read(self, first: int) -> None:
        names: list[str] = []
        size = 0
        for conv in self.convs[first:]:
            size += 4 * self.sampling.max_positions * conv.spec.out_channels
            if names and size > _TARGETS_BYTES:
                break
            names.append(conv.name)
        self._known = {name: {} for name in names}
        for number, _, batch in self.sampling.share():

            def keep(name: str, _: Tensor, y: Tensor, number: int = number) -> None:
                place = self.sampling.places(number, y.shape)
                self._known[name][number] = _outputs_at(y, place)

            visit(self.original, names, batch, keep)


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
        channels, taps = conv.spec.in_channels, math.prod(conv.spec.kernel_size)
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
) -> list[Moments]:
    """Moments of each group of one layer: its own inputs and outputs only, exact at any width.

    Args:
        model, layer, sampling, targets: see :func:`layer_moments`.
        groups: of the layer in ``model``, whose inputs it cuts into equal runs.
        outputs: the channel of the original's output for each output of the layer.

    Raises:
        ArgumentError: the layer is a transposed convolution.
    """
    spec = layer[0].spec
    inputs, width = spec.in_channels * math.prod(spec.kernel_size), spec.out_channels // groups
    sums = [LayerSums(inputs // groups, width) for _ in range(groups)]
    of_group = torch.tensor(outputs).reshape(groups, width)

    def add(_: int, u: Tensor, y: Tensor, image: Tensor) -> None:
        for total, part, rows in zip(sums, u.chunk(groups, 1), of_group, strict=True):
            total.add(part, y[:, rows.to(y.device)], image)

    _sample(model, [layer], sampling, targets, add)
    return [total.finish() for total in sums]


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
    wanted = [None if targets is None else targets.of(conv.name) for conv, _ in layers]
    index = {name: i for i, (_, name) in enumerate(layers)}
    for number, before, batch in sampling.share():

        def take(
            name: str, x: Tensor, y: Tensor, number: int = number, before: int = before
        ) -> None:
            i = index[name]
            place = sampling.places(number, y.shape)
            target = wanted[i]
            u = _inputs_at(layers[i][0].spec, x, tuple(y.shape[2:]), place)
            outputs = _outputs_at(y, place) if target is None else target[number]
            add(i, u, outputs, place[0] + before)

        visit(model, list(index), batch, take)
