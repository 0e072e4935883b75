"""Channel permutations and shuffles folded into the weights around them."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from groupconv.nn import ChannelPermutation
from groupconv.optimize.capture import Region, capture
from groupconv.optimize.orders import exact_orders
from groupconv.optimize.rules import apply, same
from groupconv.optimize.spaces import Member
from groupconv.optimize.trace import follow, members_of
from groupconv.optimize.values import Channels
from groupconv.optimize.walk import Walk, shape

_MOVERS = (ChannelPermutation, nn.ChannelShuffle)


def fold_permutations(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Remove every shuffle or permutation module that neighbouring weights can take over.

    Where all that reads its output (or all that writes its input) can be reordered, dense and
    pointwise layers above all, the reordering is done once, on the weights.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Returns:
        A copy that computes the same, and the names of the modules that are now identities; the
        model itself if there is nothing to fold.
    """
    movers = [n for n, m in model.named_modules() if isinstance(m, _MOVERS)]
    if not movers:
        return model, ()
    regions = capture(model, inputs).regions
    net, folded = model, list[str]()
    for name in movers:
        found = _absorbing(model, regions, name, folded)
        if found is None:
            continue
        net = copy.deepcopy(model) if net is model else net
        reorder(net, *found)
        remove(net, [name])
        folded.append(name)
    return net, tuple(folded)


def remove(model: nn.Module, names: Iterable[str]) -> None:
    """Put identities in the places of folded modules."""
    for name in names:
        model.set_submodule(name, nn.Identity())


@torch.no_grad()
def reorder(
    model: nn.Module, members: Iterable[Member], orders: Mapping[int, Sequence[int]]
) -> None:
    """Put every parameter into the new orders of the spaces that run along it, in place."""
    for member in members:
        tensor: Tensor = getattr(model.get_submodule(member.module), member.parameter)
        channels = torch.tensor(member.runs.channels(orders), device=tensor.device)
        width = tensor.shape[member.axis]
        blocks = tensor.chunk(member.groups)
        moved = [
            block.index_select(member.axis, index % width)
            for block, index in zip(blocks, channels.split(width), strict=True)
        ]
        tensor.copy_(torch.cat(moved))


def _order(module: nn.Module, channels: int) -> list[int]:
    """Which channel a module of :data:`_MOVERS` puts in each place."""
    if isinstance(module, ChannelPermutation):
        return module.order.tolist()
    assert isinstance(module, nn.ChannelShuffle)
    return torch.arange(channels).view(module.groups, -1).T.flatten().tolist()


def _absorbing(
    model: nn.Module, regions: Sequence[Region], name: str, folded: Sequence[str]
) -> tuple[tuple[Member, ...], dict[int, tuple[int, ...]]] | None:
    """The orders of the weights that do what a module does, on either side of it."""
    walk = Walk(model)
    ends: list[fx.Node] = []

    def rule(walk: Walk, node: fx.Node) -> None:
        caller = walk.caller(node)
        if caller == name:
            # The two sides are not tied: each may be reordered without the other.
            source = node.args[0]
            assert isinstance(source, fx.Node)
            ends.extend((source, node))
            walk.read(source, 1)
            walk.put(node, Channels(1, walk.ties.open(shape(node)[1])))
        elif caller in folded:
            same(walk, node)
        else:
            apply(walk, node)

    for region in regions:
        follow(walk, region, rule)
    if len(ends) != 2 or any(name.startswith(r.name) and r.calls > 1 for r in regions):
        return None
    order = _order(model.get_submodule(name), shape(ends[1])[1])
    sides = [walk.read(end, 1) for end in ends]
    spaces, (before, after), members = members_of(walk, sides)
    identity = tuple(range(len(order)))
    inverse = torch.tensor(order).argsort().tolist()
    for moved, wanted, other in ((after, inverse, before), (before, order, after)):
        orders = exact_orders(spaces, moved, wanted)
        if orders is not None and other.channels(orders) == identity:
            return members, orders
    return None
