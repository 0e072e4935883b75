"""Channel permutations and shuffles folded into the weights around them."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from groupconv.nn import ChannelPermutation
from groupconv.optimize.spaces import Space
from groupconv.optimize.trace import TracedPermutation, trace


def fold_permutations(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Remove every shuffle or permutation that neighbouring weights can take over.

    Where all that reads its output (or all that writes its input) can be reordered, dense and
    pointwise layers above all, the reordering is done once, on the weights.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Returns:
        A copy that computes the same, and the names of the modules that are now identities; the
        model itself if there is nothing to fold.
    """
    net, folded = model, list[str]()
    while (moved := _foldable(net, inputs)) is not None:
        permutation, space, order = moved
        net = copy.deepcopy(model) if net is model else net
        reorder(net, space, order)
        remove(net, [permutation.name])
        folded.append(permutation.name)
    return net, tuple(folded)


def remove(model: nn.Module, names: Iterable[str]) -> None:
    """Put identities in the places of folded modules."""
    for name in names:
        model.set_submodule(name, nn.Identity())


@torch.no_grad()
def reorder(model: nn.Module, space: Space, order: Sequence[int]) -> None:
    """Put every parameter on a space into a new order of channels, in place."""
    for member in space.members:
        tensor: Tensor = getattr(model.get_submodule(member.module), member.parameter)
        tensor.copy_(tensor.index_select(member.axis, torch.tensor(order, device=tensor.device)))


def _foldable(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[TracedPermutation, Space, tuple[int, ...]] | None:
    """The first permutation that can go, and the space to reorder in its place.

    Folding joins two spaces, so the next one is looked for in a new trace.
    """
    if not any(isinstance(m, nn.ChannelShuffle | ChannelPermutation) for m in model.modules()):
        return None
    mapped = trace(model, inputs)
    for moved in mapped.permutations:
        if moved.free_out:
            inverse = tuple(torch.tensor(moved.order).argsort().tolist())
            return moved, mapped.spaces[moved.output_space], inverse
        if moved.free_in:
            return moved, mapped.spaces[moved.input_space], moved.order
    return None
