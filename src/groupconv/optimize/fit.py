"""Closed-form weights of a grouped layer, and exactly what they lose."""

import math
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
    cut = dense[outputs[..., None], inputs[:, None]]
    cut = cut.reshape(out_channels, in_channels // partition.groups, *kernel)
    return fit_groups(moments.part(inputs, outputs), cut)


def fit_groups(groups: Moments, weight: Tensor) -> Fit:
    """As :func:`fit`, from the moments of each group alone.

    Args:
        groups: moments of every group.
        weight: ``(C_out, C_in / groups, *k)``, the trained weights that the groups keep.

    Raises:
        DataError: the moments are not finite.
    """
    if not (torch.isfinite(groups.uu).all() and torch.isfinite(groups.yu).all()):
        raise DataError("activations hold NaN or Inf: check the model's weights and the images")
    start = weight.detach().double().cpu().flatten(1).unflatten(0, (len(groups.uu), -1))
    ridge, held_out = RIDGE, None
    if groups.held_out is not None:
        losses = _held_out_losses(groups, groups.held_out, start)
        ridge = min(losses, key=lambda r: losses[r])
        held_out = losses[ridge]
    weights = _solve(groups, start, ridge)
    bias = groups.mean_y - _times(weights, groups.mean_u)
    return Fit(
        weights.reshape(weight.shape).to(weight.dtype),
        bias.flatten().to(weight.dtype),
        _loss(groups, weights),
        ridge,
        held_out,
    )


def _held_out_losses(groups: Moments, held_out: Moments, start: Tensor) -> dict[float, float]:
    """For each ridge the loss on the held-out images of weights fitted without them."""
    kept, losses = groups.kept(), {}
    for ridge in RIDGES:
        weights = _solve(kept, start, ridge)
        off = held_out.mean_y - kept.mean_y - _times(weights, held_out.mean_u - kept.mean_u)
        losses[ridge] = _loss(held_out, weights, off)
    return losses


def _solve(groups: Moments, start: Tensor, ridge: float) -> Tensor:
    """``(groups, C_out / groups, D / groups)``: weights of every group."""
    pull = ridge * float(scale(groups).mean())
    h = groups.uu + pull * torch.eye(groups.uu.shape[-1], dtype=torch.float64)
    t = groups.yu + pull * start
    return torch.cholesky_solve(t.mT, torch.linalg.cholesky(h)).mT


def _loss(groups: Moments, weights: Tensor, off: Tensor | None = None) -> float:
    """Share of the variance of the outputs that is left, and the square of what the mean is off."""
    total = float(groups.yy.sum())
    residual = total - 2 * float((weights * groups.yu).sum())
    residual += float(((weights @ groups.uu) * weights).sum())
    if off is not None:
        residual += float(off.square().sum())
    return max(residual, 0.0) / max(total, 1e-30)


def _times(weights: Tensor, inputs: Tensor) -> Tensor:
    """Outputs of every group for one vector of inputs each."""
    return (weights @ inputs[..., None])[..., 0]
