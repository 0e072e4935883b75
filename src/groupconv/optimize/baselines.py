"""What people would otherwise do, to be reported beside the result on the same images.

The same numbers of groups cut as the channels come, the same with random groups and our refit, and
dense channel pruning at equal measured time.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from groupconv.errors import ArgumentError, BudgetError, DataError
from groupconv.optimize.convert import convert
from groupconv.optimize.kept import kept_by_layers
from groupconv.optimize.partition import Partition
from groupconv.optimize.prune import importance, prunable, prune, strongest
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.trace import Trace
from groupconv.store import Store

log = logging.getLogger(__name__)

# Fractions of channels that are tried: k/64. Halving takes it that times rise with them, but there
# are widths at which a runtime is slow: so many more are tried as hide a width of 64 channels.
_STEPS, _ABOVE = 64, 10


def plain_cut(model: nn.Module, trace: Trace, groups: Mapping[str, int]) -> nn.Module:
    """The network cut into groups of its channels as they come, with its trained weights.

    Args:
        model: left as it was.
        trace: of the model.
        groups: layer name to number of groups.

    Raises:
        DataError: a name is not a traced dense convolution, or a number of groups does not divide
            its layer's channels.
    """
    return convert(model, trace, _partitions(trace, groups, {})).model


def random_groups(
    model: nn.Module,
    trace: Trace,
    groups: Mapping[str, int],
    sampling: Sampling,
) -> nn.Module:
    """The network cut into random groups, refitted in closed form as ours is.

    Every space of channels takes one random order, which all layers on it cut into runs: groups are
    as random as they can be where no channel is permuted when the network runs. Channels whose
    order can't change are cut as they come.

    Args:
        model: in evaluation mode; left as it was.
        trace: of the model.
        groups: layer name to number of groups.
        sampling: of the calibration images; its seed is that of the groups, too.

    Raises:
        DataError: a name is not a traced dense convolution, a number of groups does not divide its
            layer's channels, or activations are not finite.
    """
    rng = np.random.default_rng(sampling.seed)
    orders = {
        index: tuple(rng.permutation(space.channels).tolist())
        for index, space in enumerate(trace.spaces)
        if space.fixed is None
    }
    converted = convert(model, trace, _partitions(trace, groups, orders))
    refit(model, converted, sampling, Store(None, ""), {})
    return converted.model


def pruned(
    model: nn.Module,
    trace: Trace,
    latency: Callable[[nn.Module], float],
    bound: float,
    sampling: Sampling,
) -> nn.Module:
    """The network with the fewest channels pruned that meets a latency, refitted in closed form.

    Layers are fitted to the original network's outputs, as in He, Zhang and Sun 2017
    (https://arxiv.org/abs/1707.06168).

    Every space that can be pruned keeps the same fraction of its strands, those that the layers
    that read them vary by most. The fraction is found to 1/64, by bisection.

    Args:
        model: in evaluation mode; left as it was.
        trace: of the model.
        latency: seconds of a network.
        bound: seconds that the result may take.
        sampling: of the calibration images.

    Raises:
        ArgumentError: the bound is not positive.
        BudgetError: no pruning meets the bound.
        DataError: activations are not finite.
    """
    if not bound > 0:
        raise ArgumentError(f"bound={bound!r} must be a positive number of seconds")
    spaces, reasons = prunable(model, trace, (next(iter(sampling.batches()))[:2],))
    for space, reason in reasons.items():
        log.info("%d channels not pruned: %s", trace.spaces[space].channels, reason)
    values = importance(model, trace, sampling.batches())
    values = {space: values[space] for space in spaces}

    @functools.cache
    def seconds(step: int) -> float:
        return latency(prune(model, trace, strongest(values, step / _STEPS)))

    low, high = 0, _STEPS
    if seconds(high) <= bound:
        low = high
    elif (least := seconds(low)) > bound:
        raise BudgetError(
            f"bound={bound!r} s can't be met by pruning: with the fewest channels in each of "
            f"{len(spaces)} spaces the network still takes {least!r} s"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle) <= bound:
            low = middle
        else:
            high = middle
    above = range(low, min(low + _ABOVE, _STEPS) + 1)
    step = max(k for k in above if seconds(k) <= bound)
    log.info("pruned to %.1f%% of the channels", 100 * step / _STEPS)
    kept = strongest(values, step / _STEPS)
    converted = convert(model, trace, kept_by_layers(trace, kept))
    refit(model, converted, sampling, Store(None, ""), {})
    return converted.model


def _partitions(
    trace: Trace, groups: Mapping[str, int], orders: Mapping[int, Sequence[int]]
) -> dict[str, Partition]:
    """Every layer cut into runs of its channels, in the orders of their spaces."""
    convs = {conv.name: conv for conv in trace.convs}
    for name in groups:
        if name not in convs:
            reason = trace.skipped.get(name, "no such layer")
            raise DataError(f"groups: layer {name!r} can't be cut: {reason}")
    return {
        name: Partition(
            count, convs[name].inputs.channels(orders), convs[name].outputs.channels(orders)
        )
        for name, count in groups.items()
    }
