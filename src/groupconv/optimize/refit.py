"""Sequential refit: each layer in turn, on the inputs that the layers before it now give.

The target is what the *original* network computes there (see :mod:`groupconv.optimize.wanted`), so
a later layer also repairs what earlier ones lost; layers that were not changed do, too.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from groupconv import events, ranks
from groupconv.optimize.convert import Converted, Edit, Placed
from groupconv.optimize.covariance import Moments
from groupconv.optimize.fit import fit_groups
from groupconv.optimize.moments import EXACT, group_moments, layer_moments
from groupconv.optimize.pair import fit_pair
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.schur import Regression
from groupconv.optimize.structure import Layer, Narrowed, Pair, dense_weight
from groupconv.optimize.wanted import Targets
from groupconv.store import Store

log = logging.getLogger(__name__)

# Over both convolutions of a pair, at most.
_SWEEPS = 50


@torch.no_grad()
def refit(
    original: nn.Module,
    converted: Converted,
    sampling: Sampling,
    store: Store,
    importance: Mapping[str, Tensor],
) -> dict[str, float]:
    """Fit every converted layer in closed form, in place.

    Args:
        original, converted: networks in evaluation mode.
        sampling: of the calibration images.
        store: keeps the weights layer by layer.
        importance: layer name to what its output channels count; where it has none all count alike.

    Returns:
        layer name to the share of the output's variance that is lost there.
    """
    net, history = converted.model, ""
    losses: dict[str, float] = {}
    targets = Targets(
        original,
        [placed.conv for placed in converted.convs],
        sampling,
        {placed.conv.name: placed.channels_after for placed in converted.convs},
    )
    convs = events.followed("refit", converted.convs, len(converted.convs))
    for placed in convs:
        name, edit = placed.conv.name, converted.edits.get(placed.conv.name)
        if edit is None and not losses:
            continue
        as_it_was = edit is None or isinstance(edit.structure, Narrowed)
        if as_it_was and not _refittable(net, placed):
            continue
        # A layer's weights depend on all that was done before it.
        step = f"{history} {name} {edit} {placed.channels_in} {placed.channels_out}"
        history = hashlib.sha256(step.encode()).hexdigest()
        known = ranks.on_first(partial(store.read_tensors, f"refit {history}"))
        if known is None:
            if edit is not None and isinstance(edit.structure, Pair):
                known = _fit_pair(original, net, placed, edit.structure, targets, importance)
            else:
                known = _fit_groups(net, placed, targets)
            known = ranks.on_first(partial(_kept, store, f"refit {history}", known))
        _put(net, placed, edit, known)
        if edit is not None:
            losses[name] = float(known["loss"])
        log.info("%s: %.4f of its variance lost", name, float(known["loss"]))
    return losses


def _kept(store: Store, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    store.write_tensors(name, found)
    return found


def _refittable(net: nn.Module, placed: Placed) -> bool:
    """Whether a layer that was not replaced can be fitted: small moments, a mean free to move."""
    spec, conv = placed.conv.spec, net.get_submodule(placed.module)
    mean_moves = conv.bias is not None or placed.conv.batch_norm is not None
    return not spec.transposed and spec.fan_in <= EXACT and mean_moves


def _fit_groups(net: nn.Module, placed: Placed, targets: Targets) -> dict[str, Tensor]:
    """Weight, bias and loss of a grouped convolution, from the moments of each group alone."""
    conv = net.get_submodule(placed.module)
    assert isinstance(conv, Layer)
    # The inputs arrive in the new layer's order already; the outputs are the original's. Its
    # weights are still those of the original, cut.
    count = getattr(conv, "groups", 1)
    spec = replace(
        placed.conv.spec,
        in_channels=len(placed.channels_in),
        out_channels=len(placed.channels_out),
        groups=count,
    )
    groups = group_moments(
        net,
        (replace(placed.conv, spec=spec), placed.module),
        targets.sampling,
        targets,
        groups=count,
        outputs=placed.channels_out,
    )
    found = fit_groups(groups, conv.weight)
    return {"weight": found.weight, "bias": found.bias, "loss": torch.tensor(found.loss)}


def _fit_pair(
    original: nn.Module,
    net: nn.Module,
    placed: Placed,
    pair: Pair,
    targets: Targets,
    importance: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Weights, bias and loss of a pair, from the moments of the whole layer."""
    at = [(placed.conv, placed.module)]
    (moments,) = layer_moments(net, at, targets.sampling, targets)
    assert isinstance(moments, Moments), "a pair is not offered for a layer so wide"
    rows, columns = torch.tensor(placed.channels_out), torch.tensor(placed.channels_in)
    # Its inputs arrive in their new order, those of the original stand in the old one.
    moments = replace(
        moments, mean_y=moments.mean_y[rows], yu=moments.yu[rows], yy=moments.yy[rows]
    )
    layer = original.get_submodule(placed.conv.name)
    assert isinstance(layer, Layer)
    dense = dense_weight(layer)
    trained = dense.cpu()[rows][:, columns]
    counts = importance.get(placed.conv.name, torch.ones(len(rows), dtype=torch.float64))[rows]
    fitted = fit_pair(Regression.of(moments, trained, counts), pair, sweeps=_SWEEPS)
    root = counts.sqrt()[:, None]
    bias = moments.mean_y - (fitted.dense() / root) @ moments.mean_u
    second, ones = fitted.second / root, (1,) * (dense.ndim - 2)
    return {
        "weight": fitted.first.reshape(pair.middle, -1, *dense.shape[2:]).to(dense.dtype),
        "pointwise": second.reshape(*second.shape, *ones).to(dense.dtype),
        "bias": bias.to(dense.dtype),
        "loss": torch.tensor(fitted.loss),
    }


def _put(net: nn.Module, placed: Placed, edit: Edit | None, found: Mapping[str, Tensor]) -> None:
    """Set the weights of a structure, and its bias or the mean of the batch norm that follows."""
    last = net.get_submodule(placed.module)
    assert isinstance(last, Layer)
    last.weight.copy_(found["weight"])
    if "pointwise" in found:
        last = net.get_submodule(f"{placed.conv.name}.pointwise")
        assert isinstance(last, Layer)
        last.weight.copy_(found["pointwise"])
    if last.bias is not None:
        last.bias.copy_(found["bias"])
        return
    assert placed.conv.batch_norm is not None
    norm = net.get_submodule(placed.conv.batch_norm)
    order = None if edit is None else edit.order_out
    shift = found["bias"] if order is None else found["bias"][list(order)]
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean.sub_(shift.to(norm.running_mean.device))
