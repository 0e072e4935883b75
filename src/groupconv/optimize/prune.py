"""Dense channel pruning: strands of channels taken out of a network, and its layers refitted.

A strand (see :mod:`~groupconv.optimize.spaces`) leaves with every index of a parameter that runs
along it, so that the network that is left is an ordinary smaller one. Layers that read fewer
channels are fitted again to the original network's outputs, as in He, Zhang and Sun 2017
(https://arxiv.org/abs/1707.06168).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from groupconv.errors import ArgumentError
from groupconv.optimize.cost import tensors_in
from groupconv.optimize.fit import fit_groups
from groupconv.optimize.moments import EXACT, group_moments
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.spaces import Axis, Member
from groupconv.optimize.structure import Layer, channels, layout
from groupconv.optimize.trace import Trace, TracedConv
from groupconv.optimize.wanted import Targets

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase
# Modules whose sizes follow from the shapes of their tensors.
_RESIZABLE = (_Conv, _Norm, nn.Linear, nn.PReLU)

# Runtimes work on vectors of channels: wide spaces keep a multiple of 8 of them.
_MULTIPLE = 8
_WIDE = 16

# Its multiples, modulo 1, spread evenly however many there are.
_GOLDEN = 0.618034

# How far outputs may be off, relative to the greatest, by rounding alone.
_ROUNDING = 1e-3


def prunable(
    model: nn.Module, trace: Trace, inputs: tuple[Tensor, ...]
) -> tuple[tuple[int, ...], dict[int, str]]:
    """The spaces that can lose strands, each tried by taking out half of it.

    What is left must compute what the whole network does when all readers ignore those strands.

    Args:
        model: in evaluation mode; left as it was.
        trace: of the model.
        inputs: one example of the forward's arguments.

    Returns:
        indices of spaces, and for each of the others the reason.
    """
    reasons = _obstacles(model, trace)
    for space in range(len(trace.spaces)):
        if space not in reasons and (why := _failure(model, trace, space, inputs)):
            reasons[space] = why
    return tuple(space for space in range(len(trace.spaces)) if space not in reasons), reasons


@torch.no_grad()
def prune(model: nn.Module, trace: Trace, kept: Mapping[int, Sequence[int]]) -> nn.Module:
    """A copy without some strands; its weights are those of the original, cut, not refitted.

    A convolution that reads fewer channels, and has neither a bias nor a batch norm of its own, is
    given a bias of 0 for :func:`refit_pruned` to set.

    Args:
        model: left as it was.
        trace: of the model.
        kept: space to the strands that stay, in any order; other spaces stay whole.

    Raises:
        ArgumentError: a space can't be pruned, or its strands are none, repeated or out of range.
    """
    _check(model, trace, kept)
    net = copy.deepcopy(model)
    for member in trace.members:
        if kept.keys().isdisjoint(member.runs.spaces):
            continue
        tensor: Tensor = getattr(net.get_submodule(member.module), member.parameter)
        index = torch.from_numpy(_stays(member.runs, kept)).to(tensor.device)
        # Its data, so that modules that share the tensor go on sharing it.
        fewer = tensor.data.index_select(member.axis, index)
        tensor.data = fewer.contiguous(memory_format=layout(tensor))
    for module in net.modules():
        _resize(module)
    for conv in _refittable(trace, kept):
        module = net.get_submodule(conv.name)
        if module.bias is None and conv.batch_norm is None:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            module.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
    return net


@torch.no_grad()
def importance(model: nn.Module, trace: Trace, batches: Iterable[Tensor]) -> dict[int, Tensor]:
    """How much the layers that read a strand vary by it: weighted input feature variance.

    A channel c of a reader has ``|w_c|^2 Var(u_c)``, with ``w_c`` all weights on it and ``u_c`` its
    values over images and positions (An et al. 2023, https://arxiv.org/abs/2312.11983), here as a
    share of the sum over the reader's channels. A strand has the sum over all that read it. The
    variance is taken as 1 where a weight is used without a call of its module.

    Args:
        model: in evaluation mode.
        trace: of the model.
        batches: ``(N, C, H, W)``, calibration images.

    Returns:
        For each space that is read, the importance of its strands, in float64.
    """
    readers = list(_readers(model, trace))
    variances = [_Variance(len(reader.runs.spaces)) for reader in readers]
    handles = [
        model.get_submodule(reader.module).register_forward_pre_hook(variance.see)
        for reader, variance in zip(readers, variances, strict=True)
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    result: dict[int, Tensor] = {}
    for reader, variance in zip(readers, variances, strict=True):
        weight = model.get_submodule(reader.module).weight
        assert isinstance(weight, Tensor)
        squares = weight.detach().cpu().double().movedim(reader.axis, 0).flatten(1).square().sum(1)
        energy = squares * variance.value
        share = energy / energy.sum().clamp_min(1e-300)
        for space, positions in reader.runs.parts.items():
            of_strands = share[torch.from_numpy(positions)].sum(1)
            result[space] = result.get(space, torch.zeros_like(of_strands)) + of_strands
    return result


def strongest(importance: Mapping[int, Tensor], fraction: float) -> dict[int, tuple[int, ...]]:
    """The most important strands of every space, the same fraction of each.

    Spaces of 16 strands or more keep a multiple of 8, or all; others at least one. Some spaces are
    rounded up and some down, so that not all of them step at once when the fraction grows.

    Args:
        importance: of the strands of each space.
        fraction: of the strands to keep, from 0 to 1; met to less than one step by every space.

    Returns:
        The strands that stay, in their order, of every space that loses some.
    """
    kept = {}
    for number, (space, values) in enumerate(importance.items(), 1):
        count = len(values)
        step = _MULTIPLE if count >= _WIDE else 1
        room = fraction * count + step * (number * _GOLDEN % 1)
        stay = max(n for n in (*range(step, count, step), count) if n <= max(room, step))
        if stay < count:
            best = values.argsort(descending=True, stable=True)[:stay]
            kept[space] = tuple(sorted(best.tolist()))
    return kept


@torch.no_grad()
def refit_pruned(
    original: nn.Module,
    pruned: nn.Module,
    trace: Trace,
    kept: Mapping[int, Sequence[int]],
    sampling: Sampling,
) -> dict[str, float]:
    """Fit every dense layer that reads fewer channels in closed form, in place.

    In forward order, on the pruned network's inputs against the original's outputs.

    Args:
        original, pruned: networks in evaluation mode, the latter from :func:`prune`.
        trace: of the original.
        kept: as it was given to :func:`prune`.
        sampling: of the calibration images.

    Returns:
        layer name to the share of the output's variance that is lost there.

    Raises:
        DataError: activations are not finite.
    """
    losses = {}
    writes_now = {conv.name: _stays(conv.outputs, kept).tolist() for conv in trace.convs}
    targets = Targets(original, trace.convs, sampling, writes_now)
    for conv in _refittable(trace, kept):
        module = pruned.get_submodule(conv.name)
        assert isinstance(module, Layer)
        reads, writes = channels(module)
        spec = replace(conv.spec, in_channels=reads, out_channels=writes)
        groups = group_moments(
            pruned,
            (replace(conv, spec=spec), conv.name),
            sampling,
            targets,
            groups=1,
            outputs=writes_now[conv.name],
        )
        result = fit_groups(groups, module.weight)
        module.weight.copy_(result.weight)
        if module.bias is not None:
            module.bias.copy_(result.bias)
        else:
            assert conv.batch_norm is not None
            mean = pruned.get_submodule(conv.batch_norm).running_mean
            assert isinstance(mean, Tensor)
            mean.sub_(result.bias.to(mean.device))
        losses[conv.name] = result.loss
    return losses


class _Variance:
    """Running variance of each input channel of a module: the last axis if linear, else axis 1."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums, self.squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook."""
        x = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        self.count += x.shape[1]
        self.sums += x.sum(1, dtype=torch.float64).cpu()
        self.squares += torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square().cpu()

    @property
    def value(self) -> Tensor:
        if self.count == 0:
            return torch.ones_like(self.sums)
        mean, square = self.sums / self.count, self.squares / self.count
        return (square - mean.square()).clamp_min(0)


def _readers(model: nn.Module, trace: Trace) -> Iterator[Member]:
    """The weights that mix the channels of their input, by that axis."""
    for member in trace.members:
        module = model.get_submodule(member.module)
        if member.parameter != "weight":
            continue
        if isinstance(module, nn.Linear):
            axis: int | None = 1
        elif isinstance(module, _Conv) and module.groups == 1:
            axis = 0 if module.transposed else 1
        else:
            axis = None
        if member.axis == axis:
            yield member


def _refittable(trace: Trace, kept: Mapping[int, Sequence[int]]) -> Iterator[TracedConv]:
    """The dense layers that read fewer channels, in the order in which they run.

    But for linear layers whose sums would not fit into memory.
    """
    for conv in trace.convs:
        wide = conv.spec.linear and conv.spec.in_channels > EXACT
        if conv.spec.groups == 1 and not wide and not kept.keys().isdisjoint(conv.inputs.spaces):
            yield conv


def _stays(axis: Axis, kept: Mapping[int, Sequence[int]]) -> NDArray[np.int64]:
    """The positions on an axis that stay."""
    stays = np.ones(len(axis.spaces), dtype=bool)
    for space, positions in axis.parts.items():
        if space in kept:
            stays[positions] = False
            stays[positions[list(kept[space])]] = True
    return np.flatnonzero(stays)


def _obstacles(model: nn.Module, trace: Trace) -> dict[int, str]:
    """Spaces that can't be pruned, as far as can be said without running the network."""
    rigid: dict[int, str] = {}
    for member in trace.members:
        module = model.get_submodule(member.module)
        kind = f"{member.module or 'the network'} ({type(module).__name__})"
        if isinstance(module, _Conv) and module.groups not in (1, module.in_channels):
            rigid |= dict.fromkeys(member.runs.spaces, f"{kind} has groups={module.groups}")
        elif not isinstance(module, _RESIZABLE):
            why = f"{kind} is not a module that can be made smaller"
            rigid |= dict.fromkeys(member.runs.spaces, why)
    written = {space for conv in trace.convs for space in conv.outputs.spaces}
    read = {space for reader in _readers(model, trace) for space in reader.runs.spaces}
    reasons = {}
    for index, space in enumerate(trace.spaces):
        if space.fixed is not None:
            reasons[index] = space.fixed
        elif index in rigid:
            reasons[index] = rigid[index]
        elif space.channels == 1:
            reasons[index] = "it is a single channel"
        elif index not in written:
            reasons[index] = "no traced layer writes it"
        elif index not in read:
            reasons[index] = "no dense layer reads it"
    return reasons


@torch.no_grad()
def _failure(model: nn.Module, trace: Trace, space: int, inputs: tuple[Tensor, ...]) -> str | None:
    """Why the network without half of a space does not do what it should."""
    kept = {space: range(trace.spaces[space].channels // 2)}
    ignoring = {}
    for reader in _readers(model, trace):
        weight = model.get_submodule(reader.module).weight
        assert isinstance(weight, Tensor)
        gone = np.setdiff1d(np.arange(len(reader.runs.spaces)), _stays(reader.runs, kept))
        index = torch.from_numpy(gone).to(weight.device)
        ignoring[f"{reader.module}.weight".lstrip(".")] = weight.index_fill(reader.axis, index, 0)
    expected = tensors_in(functional_call(model, ignoring, inputs))
    try:
        found = tensors_in(prune(model, trace, kept)(*inputs))
    except Exception as error:  # whatever the user's forward may raise
        return f"the network does not run with half of it: {str(error).partition(chr(10))[0]}"
    for new, old in zip(found, expected, strict=True):
        if new.shape != old.shape or not (new - old).abs().max() <= _ROUNDING * old.abs().max():
            return "the forward pass computes something else with half of it"
    return None


def _check(model: nn.Module, trace: Trace, kept: Mapping[int, Sequence[int]]) -> None:
    reasons, count = _obstacles(model, trace), len(trace.spaces)
    for space, strands in kept.items():
        if space not in range(count):
            raise ArgumentError(f"kept: space {space!r} is not one of the {count} of the trace")
        if space in reasons:
            raise ArgumentError(f"kept: space {space} can't be pruned: {reasons[space]}")
        channels, distinct = trace.spaces[space].channels, set(strands)
        if not distinct or len(distinct) < len(strands) or not distinct <= set(range(channels)):
            raise ArgumentError(
                f"kept: space {space} keeps {list(strands)}; it must keep one or more of its "
                f"strands 0 to {channels - 1}, each once"
            )


def _resize(module: nn.Module) -> None:
    """Set a module's sizes by the shapes of its tensors."""
    if isinstance(module, _Conv):
        rows, width = module.weight.shape[:2]
        if module.groups > 1:
            # Its groups are as many as before for each row, whether whole or depthwise.
            before = module.in_channels if module.transposed else module.out_channels
            module.groups = rows * module.groups // before
        sizes = (rows, width * module.groups)
        module.in_channels, module.out_channels = sizes if module.transposed else sizes[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, _Norm):
        vectors = [v for v in (module.weight, module.running_mean) if v is not None]
        module.num_features = len(vectors[0]) if vectors else module.num_features
