"""Closed-form weights of a grouped layer, and exactly what they lose."""

from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.errors import DataError
from groupconv.optimize.moments import Moments
from groupconv.optimize.partition import Partition

# Pull towards the trained weights, relative to the mean variance of an input: it decides only what
# the images leave open, as when there are fewer positions than weights per output.
RIDGE = 1e-3


@dataclass(frozen=True)
class Fit:
    """Best weights for a partition.

    Args:
        weight: ``(C_out, C_in / groups, *k)``, rows and columns in the partition's order.
        bias: ``(C_out,)``, in the partition's order.
        loss: residual variance over output variance, 0 (exact) to 1 (no better than the mean).
    """

    weight: Tensor
    bias: Tensor
    loss: float


def fit(moments: Moments, weight: Tensor, partition: Partition) -> Fit:
    """Regress the outputs of every group on its inputs.

    With H the covariance of the inputs S of a group, T that of its outputs with them and W0 the
    trained weights, the weights are ``(T + r W0) (H + r I)^-1``, r being the ridge.

    Args:
        moments: of the inputs as the new layer sees them and the outputs as they should be.
        weight: ``(C_out, C_in, *k)``, the trained dense weights.
        partition: which channels share a group.

    Raises:
        DataError: the moments are not finite.
    """
    if not (torch.isfinite(moments.uu).all() and torch.isfinite(moments.yu).all()):
        raise DataError("activations hold NaN or Inf: check the model's weights and the images")
    out_channels, in_channels, *kernel = weight.shape
    taps = torch.Size(kernel).numel()
    dense = weight.detach().double().cpu().reshape(out_channels, -1)
    # Rounding errors of the mean's square are no variance.
    least = max(1e-9 * float(moments.mean_u.square().mean()), 1e-12)
    ridge = RIDGE * max(float(moments.uu.diagonal().mean()), least)
    width_in = in_channels // partition.groups
    width_out = out_channels // partition.groups
    rows, residual, bias = [], 0.0, []
    for q in range(partition.groups):
        channels = torch.tensor(partition.in_order[q * width_in : (q + 1) * width_in])
        outputs = torch.tensor(partition.out_order[q * width_out : (q + 1) * width_out])
        inputs = (channels[:, None] * taps + torch.arange(taps)).flatten()
        h = moments.uu[inputs[:, None], inputs]
        t = moments.yu[outputs[:, None], inputs]
        start = dense[outputs[:, None], inputs]
        factor = torch.linalg.cholesky(h + ridge * torch.eye(len(h), dtype=h.dtype))
        w = torch.cholesky_solve((t + ridge * start).T, factor).T
        rows.append(w)
        bias.append(moments.mean_y[outputs] - w @ moments.mean_u[inputs])
        residual += float(moments.yy[outputs].sum() - 2 * (w * t).sum() + ((w @ h) * w).sum())
    total = max(float(moments.yy.sum()), 1e-30)
    return Fit(
        torch.cat(rows).reshape(out_channels, width_in, *kernel).to(weight.dtype),
        torch.cat(bias).to(weight.dtype),
        max(residual, 0.0) / total,
    )
