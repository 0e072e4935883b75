"""What a group of inputs explains of a group of outputs, exactly.

With H the covariance of the inputs and T that of the outputs with them, the best linear map of the
inputs S to the outputs O explains ``tr(T_OS H_SS^-1 T_OS^T)`` of their variance. What it leaves is
the Schur complement of H_SS in the outputs' covariance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from groupconv.optimize.covariance import Moments, SeparableMoments
from groupconv.optimize.partition import Partition

# Pull towards the trained weights, relative to the mean variance of an input: it decides only what
# the images leave open, as when there are fewer positions than weights per output.
RIDGE = 1e-3


@dataclass(frozen=True)
class Regression:
    """Outputs of a layer regressed on its inputs, the ridge included.

    A ridge r that pulls towards the trained weights W0, those of cut inputs towards 0, is the same
    as ``H + r I`` in place of H and ``T + r W0`` in place of T.

    Args:
        system: ``(D, D + R)`` in float64: H, and beside it T transposed. The inputs are ordered by
            channel, ``taps`` of them each; the R rows of T by output channel, equally many each.
        total: variance of the outputs, and r times the squared norm of W0.
        taps: inputs per input channel.
        out_channels: outputs of the layer, C_out.
    """

    system: Tensor
    total: float
    taps: int
    out_channels: int

    @classmethod
    def of(
        cls,
        moments: Moments | SeparableMoments,
        weight: Tensor,
        importance: Tensor | None = None,
    ) -> "Regression":
        """The regression of a layer.

        Args:
            moments: of the layer.
            weight: ``(C_out, C_in, *k)``, the trained dense weights.
            importance: ``(C_out,)``, what a square of each output's error counts; None for 1. The
                outputs of the regression are those of the layer times its root.
        """
        out_channels, in_channels = weight.shape[:2]
        dense = weight.detach().double().cpu().flatten(1)
        if importance is not None:
            root = importance.sqrt()[:, None]
            dense = root * dense
            if isinstance(moments, Moments):
                moments = replace(moments, yu=root * moments.yu, yy=importance * moments.yy)
        if isinstance(moments, SeparableMoments):
            return _separable(
                moments.channels, moments.taps, dense.reshape(out_channels, in_channels, -1)
            )
        ridge = RIDGE * float(scale(moments))
        h = moments.uu + ridge * torch.eye(len(moments.uu), dtype=torch.float64)
        t = moments.yu + ridge * dense
        total = float(moments.yy.sum() + ridge * dense.square().sum())
        return cls(torch.cat([h, t.T], 1), total, dense.shape[1] // in_channels, out_channels)

    @property
    def in_channels(self) -> int:
        return len(self.system) // self.taps

    @property
    def exact(self) -> bool:
        """Whether this is the layer's own problem, with one row of T for each output."""
        return self.system.shape[1] == len(self.system) + self.out_channels

    @property
    def h(self) -> Tensor:
        """``(D, D)``, covariance of the inputs."""
        return self.system[:, : len(self.system)]

    @property
    def t(self) -> Tensor:
        """``(R, D)``, covariance of the outputs with the inputs."""
        return self.system[:, len(self.system) :].T

    @cached_property
    def best(self) -> Tensor:
        """``(R, D)``: the best map where nothing is cut, T H^-1."""
        return torch.cholesky_solve(self.t.T, torch.linalg.cholesky(self.h)).T

    def rows(self, channels: Sequence[int] | Tensor) -> Tensor:
        """Indices of the inputs of some input channels."""
        return (torch.as_tensor(channels)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def loss(self, partition: Partition) -> float:
        """Share of the total that the groups of a partition do not explain, 0 to 1."""
        width_in = self.in_channels // partition.groups
        width_out = self.out_channels // partition.groups
        explained = 0.0
        for q in range(partition.groups):
            each = self.explained(partition.in_order[q * width_in : (q + 1) * width_in])
            outputs = list(partition.out_order[q * width_out : (q + 1) * width_out])
            explained += float(each[outputs].sum())
        return self.share_lost(explained)

    def explained(self, channels: Sequence[int]) -> Tensor:
        """``(C_out,)``: what some input channels explain of every output."""
        inside = self.rows(channels)
        factor = torch.linalg.cholesky(self.h[inside[:, None], inside])
        half = torch.linalg.solve_triangular(factor, self.t[:, inside].T, upper=False)
        return half.square().sum(0).reshape(self.out_channels, -1).sum(1)

    def share_lost(self, explained: float) -> float:
        """Explained variance as the share of the total that is left."""
        return min(max(1 - explained / max(self.total, 1e-300), 0.0), 1.0)

    def separable(self) -> "Regression":
        """The same layer with the covariance of the inputs taken as a Kronecker product.

        With H = B (x) A, B between channels and A between taps, what channels explain depends on B
        alone: a problem of C_in inputs in place of C_in * taps, whose outputs are those of each
        tap. It is cheap enough for many starts; what it finds is judged by the exact problem.
        """
        in_channels, taps = self.in_channels, self.taps
        blocks = self.h.reshape(in_channels, taps, in_channels, taps)
        channels = torch.einsum("atbt->ab", blocks) / taps
        within = torch.einsum("asat->st", blocks) / channels.trace()
        best = self.best.reshape(self.out_channels, in_channels, taps)
        return _separable(channels, within, best)


def scale(moments: Moments) -> Tensor:
    """Mean variance of an input, of each group if there are several, but never so little that
    rounding errors count as variance."""
    least = (1e-9 * moments.mean_u.square().mean(-1)).clamp_min(1e-12)
    return torch.maximum(moments.uu.diagonal(dim1=-2, dim2=-1).mean(-1), least)


def _separable(channels: Tensor, taps: Tensor, best: Tensor) -> Regression:
    """The reduced problem of :meth:`Regression.separable`.

    Args:
        channels, taps: ``(C_in, C_in)`` and ``(k, k)``, whose Kronecker product stands for H.
        best: ``(C_out, C_in, k)``, the best dense weights.
    """
    out_channels, in_channels, size = best.shape
    least = RIDGE * max(float(channels.diagonal().mean()), 1e-12)
    channels = channels + least * torch.eye(in_channels, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(taps)
    root = vectors * values.clamp_min(0).sqrt()
    # Row (o, s): the part of output o that comes through the s-th principal pattern of the taps.
    mixed = (best @ root).transpose(1, 2).reshape(out_channels * size, in_channels)
    t = mixed @ channels
    return Regression(
        torch.cat([channels, t.T], 1), math.fsum((t * mixed).sum(1).tolist()), 1, out_channels
    )
