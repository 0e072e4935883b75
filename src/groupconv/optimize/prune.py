"""Dense channel pruning: which channels a network could lose, and which of them it needs least."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from groupconv.errors import ArgumentError
from groupconv.optimize.cost import tensors_in
from groupconv.optimize.kept import RESIZABLE, cut, stays
from groupconv.optimize.spaces import Member
from groupconv.optimize.trace import Trace

_Conv = nn.modules.conv._ConvNd

# Runtimes work on vectors of channels: wide spaces keep a multiple of 8 of them.
_MULTIPLE = 8
WIDE = 16

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
    reasons = obstacles(model, trace)
    for space in range(len(trace.spaces)):
        if space not in reasons and (why := _failure(model, trace, space, inputs)):
            reasons[space] = why
    return tuple(space for space in range(len(trace.spaces)) if space not in reasons), reasons


@torch.no_grad()
def prune(model: nn.Module, trace: Trace, kept: Mapping[int, Sequence[int]]) -> nn.Module:
    """A copy without some strands; its weights are those of the original, cut, not refitted.

    Args:
        model: left as it was.
        trace: of the model.
        kept: space to the strands that stay, in any order; other spaces stay whole.

    Raises:
        ArgumentError: a space can't be pruned, or its strands are none, repeated or out of range.
    """
    _check(model, trace, kept)
    net = copy.deepcopy(model)
    cut(net, trace, kept)
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
        step = _MULTIPLE if count >= WIDE else 1
        room = fraction * count + step * (number * _GOLDEN % 1)
        stay = max(n for n in (*range(step, count, step), count) if n <= max(room, step))
        if stay < count:
            best = values.argsort(descending=True, stable=True)[:stay]
            kept[space] = tuple(sorted(best.tolist()))
    return kept


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


def obstacles(model: nn.Module, trace: Trace) -> dict[int, str]:
    """Spaces that can't be pruned, as far as can be said without running the network."""
    rigid: dict[int, str] = {}
    for member in trace.members:
        module = model.get_submodule(member.module)
        kind = f"{member.module or 'the network'} ({type(module).__name__})"
        if isinstance(module, _Conv) and module.groups not in (1, module.in_channels):
            rigid |= dict.fromkeys(member.runs.spaces, f"{kind} has groups={module.groups}")
        elif not isinstance(module, RESIZABLE):
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
        gone = np.setdiff1d(np.arange(len(reader.runs.spaces)), stays(reader.runs, kept))
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
    reasons, count = obstacles(model, trace), len(trace.spaces)
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
