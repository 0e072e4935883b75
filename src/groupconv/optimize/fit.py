"""Closed-form weights of a grouped layer, and exactly what they lose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.errors import DataError
from groupconv.optimize.covariance import Moments
from groupconv.optimize.partition import Partition
from groupconv.optimize.schur import RIDGE, scale

# Ridges to choose from by the loss on held-out images, relative to the mean variance of an input.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Fit:
    """Best weights for a partition.

    Args:
        weight: ``(C_out, C_in / groups, *k)``, rows and columns in the partition's order.
        bias: ``(C_out,)``, in the partition's order.
        loss: residual variance over output variance, 0 (exact) to 1 (no better than the mean).
        ridge: pull towards the trained weights, relative to the mean variance of an input.
        held_out: loss on the held-out images of weights fitted without them, at the same ridge;
            None if there are none. What it exceeds ``loss`` by is what the sample leaves unsure.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    ridge: float
    held_out: float | None


def fit(moments: Moments, weight: Tensor, partition: Partition) -> Fit:
    """Regress the outputs of every group on its inputs.

    With H the covariance of the inputs S of a group, T that of its outputs with them and W0 the
    trained weights, the weights are ``(T + r W0) (H + r I)^-1``, r being the ridge that loses
    least on the held-out images.

    Args:
        moments: of the inputs as the new layer sees them and the outputs as they should be.
        weight: ``(C_out, C_in, *k)``, the trained dense weights.
        partition: which channels share a group.

    Raises:
        DataError: the moments are not finite.
    """
    out_channels, in_channels, *kernel = weight.shape
    taps = math.prod(kernel)
    columns = torch.tensor(partition.in_order)[:, None] * taps + torch.arange(taps)
    inputs = columns.reshape(partition.groups, -1)
    outputs = torch.tensor(partition.out_order).reshape(partition.groups, -1)
    dense = weight.detach().cpu().flatten(1)
    parts = [moments.part(s, o) for s, o in zip(inputs, outputs, strict=True)]
    blocks = [dense[o[:, None], s] for s, o in zip(inputs, outputs, strict=True)]
    cut = torch.cat(blocks).reshape(out_channels, in_channels // partition.groups, *kernel)
    return fit_groups(parts, cut)


def fit_groups(parts: Sequence[Moments], weight: Tensor) -> Fit:
    """As :func:`fit`, from the moments of each group alone.

    Args:
        parts: moments of every group.
        weight: ``(C_out, C_in / groups, *k)``, the trained weights that the groups keep.

    Raises:
        DataError: the moments are not finite.
    """
    if not all(torch.isfinite(part.uu).all() and torch.isfinite(part.yu).all() for part in parts):
        raise DataError("activations hold NaN or Inf: check the model's weights and the images")
    starts = weight.detach().double().cpu().flatten(1).chunk(len(parts))
    ridge, held_out = RIDGE, None
    if all(part.held_out is not None for part in parts):
        losses = _held_out_losses(parts, starts)
        ridge = min(losses, key=lambda r: losses[r])
        held_out = losses[ridge]
    weights = _solve(parts, starts, ridge)
    bias = [part.mean_y - w @ part.mean_u for part, w in zip(parts, weights, strict=True)]
    return Fit(
        torch.cat(weights).reshape(weight.shape).to(weight.dtype),
        torch.cat(bias).to(weight.dtype),
        _loss(parts, weights),
        ridge,
        held_out,
    )


def _held_out_losses(parts: Sequence[Moments], starts: Sequence[Tensor]) -> dict[float, float]:
    """For each ridge the loss on the held-out images of weights fitted without them."""
    kept = [part.kept() for part in parts]
    held_out = [part.held_out for part in parts if part.held_out is not None]
    losses = {}
    for ridge in RIDGES:
        weights = _solve(kept, starts, ridge)
        off = [
            (seen.mean_y - fitted.mean_y) - w @ (seen.mean_u - fitted.mean_u)
            for seen, fitted, w in zip(held_out, kept, weights, strict=True)
        ]
        losses[ridge] = _loss(held_out, weights, torch.cat(off))
    return losses


def _solve(parts: Sequence[Moments], starts: Sequence[Tensor], ridge: float) -> list[Tensor]:
    """Weights of every group, each ``(C_out / groups, D / groups)``."""
    pull = ridge * sum(scale(part) for part in parts) / len(parts)
    weights = []
    for part, start in zip(parts, starts, strict=True):
        h = part.uu + pull * torch.eye(len(part.uu), dtype=torch.float64)
        t = part.yu + pull * start
        weights.append(torch.cholesky_solve(t.T, torch.linalg.cholesky(h)).T)
    return weights


def _loss(parts: Sequence[Moments], weights: Sequence[Tensor], off: Tensor | None = None) -> float:
    """Share of the variance of the outputs that is left, and the square of what the mean is off."""
    total = max(sum(float(part.yy.sum()) for part in parts), 1e-30)
    residual = sum(
        float(part.yy.sum() - 2 * (w * part.yu).sum() + ((w @ part.uu) * w).sum())
        for part, w in zip(parts, weights, strict=True)
    )
    if off is not None:
        residual += float(off.square().sum())
    return max(residual, 0.0) / total
