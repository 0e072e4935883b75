"""Second moments of what a layer sees and of what it should give: records and running sums.

For a convolution, u is the im2col vector at one output position, of C_in * k_h * k_w numbers in
the order of its weights, and y the C_out outputs there. Sums are kept in float64.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from groupconv import ranks

# Rows of a symmetric matrix summed at once: only the blocks on and above its diagonal are.
_BLOCK = 512
# Of so many images in a row, the last is held out.
_HELD_OUT = 4
# Channels on which the error of a Kronecker product is measured.
_CHECKED = 64


@dataclass(frozen=True)
class Moments:
    """Centred second moments, in float64; those of several groups at once have an axis for them
    before all others.

    Args:
        count: positions seen.
        mean_u, mean_y: ``(D,)`` and ``(C_out,)``, with D = C_in * prod(kernel_size).
        uu: ``(D, D)``, covariance of the inputs.
        yu: ``(C_out, D)``, covariance of outputs with inputs.
        yy: ``(C_out,)``, variance of the outputs.
        error: relative standard error of the summed variance of the outputs, from its spread
            between images: how far a sample of so many positions and images can be trusted. None
            if there is one image only.
        held_out: of every fourth image, which the others count too; None if there is none.
    """

    count: int
    mean_u: Tensor
    mean_y: Tensor
    uu: Tensor
    yu: Tensor
    yy: Tensor
    error: float | None = None
    held_out: "Moments | None" = None

    def part(self, inputs: Tensor, outputs: Tensor) -> "Moments":
        """Moments of some inputs and outputs of a layer.

        Args:
            inputs, outputs: their indices; for the moments of groups with an axis for these before.
        """
        columns = inputs[..., None, :]
        return Moments(
            self.count,
            self.mean_u[inputs],
            self.mean_y[outputs],
            self.uu[inputs[..., None], columns],
            self.yu[outputs[..., None], columns],
            self.yy[outputs],
            self.error,
            None if self.held_out is None else self.held_out.part(inputs, outputs),
        )

    def kept(self) -> "Moments":
        """Moments of the images that are not held out."""
        assert self.held_out is not None
        other, share = self.held_out, self.held_out.count / self.count
        # Of two parts p and 1-p: covariance = p A + (1-p) B + p (1-p) d d^T, d between the means.
        u, y = ((a - share * b) / (1 - share) for a, b in (
            (self.mean_u, other.mean_u), (self.mean_y, other.mean_y)
        ))  # fmt: skip
        du, dy = u - other.mean_u, y - other.mean_y
        between = share * (1 - share)

        def rest(whole: Tensor, part: Tensor, outer: Tensor) -> Tensor:
            return (whole - share * part - between * outer) / (1 - share)

        return Moments(
            self.count - other.count,
            u,
            y,
            rest(self.uu, other.uu, _outer(du, du)),
            rest(self.yu, other.yu, _outer(dy, du)),
            rest(self.yy, other.yy, dy.square()),
        )


@dataclass(frozen=True)
class SeparableMoments:
    """The covariance of a wide layer's inputs as a Kronecker product, for planning.

    Args:
        count: positions seen.
        channels: ``(C_in, C_in)``, covariance between channels, the mean over the taps.
        taps: ``(k, k)``, covariance between taps in units of the variance of a channel.
        error: norm of what the product leaves, relative to the covariance's, measured on some of
            the channels.
    """

    count: int
    channels: Tensor
    taps: Tensor
    error: float


class MomentSums:
    """Running sums from which :class:`Moments` are made.

    Args:
        inputs, outputs: how many of each, D and C_out.
        groups: None, or how many groups have as many of their own.
    """

    def __init__(self, inputs: int, outputs: int, groups: int | None = None) -> None:
        first = () if groups is None else (groups,)
        self.count = torch.zeros((), dtype=torch.int64)
        self.u, self.y = (torch.zeros(*first, n, dtype=torch.float64) for n in (inputs, outputs))
        self.uu = torch.zeros(*first, inputs, inputs, dtype=torch.float64)
        self.yu = torch.zeros(*first, outputs, inputs, dtype=torch.float64)
        self.yy = torch.zeros(*first, outputs, dtype=torch.float64)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Add positions: ``u`` of shape ``(P, D)`` and ``y`` of shape ``(P, C_out)``, or of
        ``(groups, P, D)`` and ``(groups, P, C_out)``."""
        u, y = u.double().cpu(), y.double().cpu()
        self.count += u.shape[-2]
        self.u += u.sum(-2)
        self.y += y.sum(-2)
        for i in range(0, u.shape[-1], _BLOCK):
            self.uu[..., i : i + _BLOCK, i:] += u[..., i : i + _BLOCK].mT @ u[..., i:]
        self.yu += y.mT @ u
        self.yy += y.square().sum(-2)

    def include(self, other: "MomentSums") -> None:
        """Add the positions that other sums have seen."""
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs

    def over_ranks(self) -> None:
        """Sum over the processes of ``torch.distributed``, where it is initialised."""
        for total in self._sums():
            sum_over_ranks(total)

    def finish(self, error: float | None = None, held_out: Moments | None = None) -> Moments:
        count = int(self.count)
        mean_u, mean_y = self.u / count, self.y / count
        uu = self.uu.triu() + self.uu.triu(1).mT
        return Moments(
            count,
            mean_u,
            mean_y,
            uu.div_(count).addcmul_(mean_u[..., None], mean_u[..., None, :], value=-1),
            self.yu / count - _outer(mean_y, mean_u),
            self.yy / count - mean_y.square(),
            error,
            held_out,
        )

    def _sums(self) -> tuple[Tensor, ...]:
        return self.count, self.u, self.y, self.uu, self.yu, self.yy


class SeparableSums:
    """Running sums from which :class:`SeparableMoments` are made.

    Args:
        channels, taps: C_in and the product of the kernel's size.
    """

    def __init__(self, channels: int, taps: int) -> None:
        self.taps = taps
        self.checked = torch.arange(0, channels, math.ceil(channels / _CHECKED))
        self.exact = MomentSums(len(self.checked) * taps, 0)
        self.u = torch.zeros(channels, taps, dtype=torch.float64)
        self.between = torch.zeros(channels, channels, dtype=torch.float64)
        self.within = torch.zeros(taps, taps, dtype=torch.float64)

    def add(self, u: Tensor) -> None:
        """Add positions: ``u`` of shape ``(P, D)``."""
        blocks = u.double().cpu().reshape(len(u), -1, self.taps)
        self.u += blocks.sum(0)
        by_channel = blocks.transpose(1, 2).reshape(-1, blocks.shape[1])
        self.between.addmm_(by_channel.T, by_channel)
        by_tap = blocks.reshape(-1, self.taps)
        self.within.addmm_(by_tap.T, by_tap)
        self.exact.add(blocks[:, self.checked].flatten(1), u.new_empty(len(u), 0))

    def finish(self) -> SeparableMoments:
        """The moments; where ``torch.distributed`` is initialised, over all its processes."""
        self.exact.over_ranks()
        for total in (self.u, self.between, self.within):
            sum_over_ranks(total)
        count = int(self.exact.count)
        mean = self.u / count
        channels = (self.between / count - mean @ mean.T) / self.taps
        taps = self.within / count - mean.T @ mean
        taps /= max(float(channels.trace()), 1e-300)
        exact = self.exact.finish().uu
        product = torch.kron(channels[self.checked[:, None], self.checked], taps)
        error = float((exact - product).norm() / exact.norm().clamp_min(1e-300))
        return SeparableMoments(count, channels, taps, error)


class LayerSums:
    """Running sums of one layer or its groups: all images, those held out, and their spread.

    Args:
        inputs, outputs, groups: see :class:`MomentSums`.
    """

    def __init__(self, inputs: int, outputs: int, groups: int | None = None) -> None:
        self.kept, self.held_out = (MomentSums(inputs, outputs, groups) for _ in range(2))
        # A process may have none of the images.
        self.of_images = [torch.zeros(0, 2 + outputs * (groups or 1), dtype=torch.float64)]

    def add(self, u: Tensor, y: Tensor, image: Tensor) -> None:
        """Add positions, see :meth:`MomentSums.add`.

        Args:
            image: ``(P,)``, the number of the image that each position is from; all positions of
                an image are added at once.
        """
        held = image % _HELD_OUT == _HELD_OUT - 1
        self.kept.add(u[..., ~held, :], y[..., ~held, :])
        self.held_out.add(u[..., held, :], y[..., held, :])
        y, image = y.double().cpu(), image.cpu()
        if y.ndim > 2:
            y = y.movedim(0, 1).flatten(1)
        _, which, count = torch.unique(image, return_inverse=True, return_counts=True)
        columns = torch.cat([torch.ones(len(y), 1), y.square().sum(1, keepdim=True), y], 1)
        per_image = torch.zeros(len(count), columns.shape[1], dtype=torch.float64)
        self.of_images.append(per_image.index_add(0, which, columns))

    def finish(self) -> Moments:
        """The moments; where ``torch.distributed`` is initialised, over all its processes."""
        self.kept.over_ranks()
        self.held_out.over_ranks()
        held_out = self.held_out.finish() if self.held_out.count else None
        self.kept.include(self.held_out)
        return self.kept.finish(self._error(), held_out)

    def _error(self) -> float | None:
        """Relative standard error of the variance of the outputs.

        The variance is a ratio, of squares to positions, and the images are what was sampled
        independently: Cochran, Sampling Techniques, 3rd edition, sections 6.4 and 9A.1.
        """
        mean = self.kept.y.flatten() / self.kept.count
        sums = torch.cat(self.of_images)
        n, squares, total = sums[:, 0], sums[:, 1], sums[:, 2:]
        s = squares - 2 * total @ mean + n * mean.square().sum()
        terms = torch.stack([torch.ones_like(n), s, n, s * s, s * n, n * n], 1).sum(0)
        sum_over_ranks(terms)
        images, variance, positions, ss, sn, nn = terms.tolist()
        if images < 2 or variance <= 0:
            return None
        ratio = variance / positions
        scatter = max(ss - 2 * ratio * sn + ratio * ratio * nn, 0.0)
        return math.sqrt(images / (images - 1) * scatter) / variance


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The outer product of vectors on the last axis."""
    return a[..., None] * b[..., None, :]


def sum_over_ranks(tensor: Tensor) -> None:
    """Add a tensor in place over all processes, where ``torch.distributed`` is initialised."""
    if ranks.count() == 1:
        return
    # NCCL moves only what is on a GPU.
    there = tensor.cuda() if dist.get_backend() == "nccl" else tensor
    dist.all_reduce(there)
    if there is not tensor:
        tensor.copy_(there)
