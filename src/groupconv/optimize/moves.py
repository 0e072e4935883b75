"""Operators that only move elements, run on cells in place of elements."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from groupconv.optimize.ties import mix
from groupconv.optimize.values import (
    NOTHING,
    NOWHERE,
    Channels,
    Layer,
    Value,
    settle,
    spread,
    tied,
)
from groupconv.optimize.walk import Walk, arguments, flat, operator, shape

# fmt: off
_RESHAPES = frozenset((
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten",
))
# Those that take slices of one axis, which their argument ``dim`` names.
_SLICES = frozenset((
    "cat", "concat", "chunk", "split", "split_with_sizes", "tensor_split", "slice", "narrow",
    "index_select",
))
MOVES = _RESHAPES | _SLICES | frozenset((
    "permute", "transpose", "swapaxes", "movedim", "moveaxis", "t", "numpy_T", "unsqueeze",
    "squeeze", "expand", "repeat", "repeat_interleave", "tile", "stack", "unbind", "select",
    "index", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
))
# fmt: on

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def moved(walk: Walk, node: fx.Node) -> None:
    """Each element of the output is one of the first argument's."""
    nodes = [n for n in flat(node.args[:1]) if isinstance(n, fx.Node)]
    values = [walk.value(n) for n in nodes]
    others = [n for n in node.all_input_nodes if n not in nodes]
    # A weight with several axes of channels has no one axis to follow.
    weights = [v is None and walk.tensor(n) is not None for n, v in zip(nodes, values, strict=True)]
    shaped = operator(node) in _RESHAPES
    unknown = not shaped and any(walk.tensor(n) is None for n in others)
    if all(value is None for value in values) or any(weights) or unknown:
        walk.forget(node)
        return

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        if shaped:
            return [tensors[0].reshape(shape(node))]
        first = tensors[0] if isinstance(node.args[0], fx.Node) else list(tensors)
        args, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), walk.tensor)
        out = node.target(first, *args, **kwargs)  # type: ignore[operator]
        return [out] if isinstance(out, Tensor) else list(out)

    found = _selected(walk, node, nodes[0], values, run)
    found = _rearranged(walk, nodes, values, run) if found is None else found
    walk.put(node, found[0] if isinstance(node.meta.get("val"), Tensor) else found)


def _selected(
    walk: Walk, node: fx.Node, first: fx.Node, values: Sequence[Value], run: Run
) -> list[Value] | None:
    """The short way where whole channels are taken along their axis: cells stay what they are."""
    known = [value for value in values if isinstance(value, Channels)]
    axes, ndim = {value.axis for value in known}, len(shape(first))
    if operator(node) not in _SLICES or len(known) < len(values):
        return None
    dim = arguments(node).get("dim")
    if not isinstance(dim, int) or axes != {dim % ndim}:
        return None
    ones = [-1 if axis in axes else 1 for axis in range(ndim)]
    found: list[Value] = []
    for out in run([torch.from_numpy(value.cells).view(ones) for value in known]):
        cells = out.flatten().numpy()
        if len(set(cells.tolist())) < len(cells):
            index = torch.arange(len(cells)).numpy()
            cells = tied(walk.ties, len(cells), cells, mix(index * 0), index)
        found.append(Channels(dim % ndim, cells))
    return found


def _rearranged(
    walk: Walk, nodes: Sequence[fx.Node], values: Sequence[Value], run: Run
) -> list[Value]:
    """The long way: the cell and the place of every element are moved."""
    every = []
    for n, value in zip(nodes, values, strict=True):
        blank = torch.full(shape(n), NOWHERE)
        every.append((Layer(blank, blank),) if value is None else spread(value, shape(n)))
    results: list[list[Layer]] = []
    for number in range(max(map(len, every))):
        layers = [
            own[number] if number < len(own) else own[0].map(lambda t: torch.full_like(t, NOTHING))
            for own in every
        ]
        cells, places = run([x.cells for x in layers]), run([x.places for x in layers])
        results.append([Layer(*pair) for pair in zip(cells, places, strict=True)])
    return [settle(walk.ties, layers) for layers in zip(*results, strict=True)]
