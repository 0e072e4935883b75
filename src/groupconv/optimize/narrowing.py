"""Spaces of channels that may lose some: which of them go, and what that costs.

The channels between two layers go one by one, always those that the layers reading them can best do
without. With P the inverse covariance of a reader's inputs and W its best weights, taking out the
inputs B and fitting the rest again costs ``tr(W_B (P_BB)^-1 W_B^T)``, as in optimal brain surgeon
(Hassibi and Stork 1993, https://papers.nips.cc/paper/647).
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groupconv import ranks
from groupconv.optimize.kept import kept_by_layers
from groupconv.optimize.menu import Candidate
from groupconv.optimize.moments import EXACT
from groupconv.optimize.prune import WIDE, prunable
from groupconv.optimize.schur import Regression
from groupconv.optimize.sensitivity import Sensitivity, Trials
from groupconv.optimize.structure import Layer
from groupconv.optimize.survey import Searches
from groupconv.optimize.trace import Trace
from groupconv.store import Store

log = logging.getLogger(__name__)

# Shares of a space on offer, rounded to multiples of so many channels, so that they fill vectors.
_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2)
_MULTIPLE = 8
# Channels that go at once, of a layer with so many inputs: one by one the update of its inverse
# would take too long.
_INPUTS = 512


@dataclass(frozen=True)
class Narrowing:
    """One space with fewer channels.

    Args:
        candidates: for each width, layer name to its candidate: all of one width stand together.
        sensitivities: of the layers that read it.
    """

    candidates: Sequence[Mapping[str, Candidate]]
    sensitivities: Mapping[str, Sensitivity]


def narrowings(
    mapped: Trace,
    changeable: Collection[str],
    searches: Searches,
    store: Store,
    trials: Trials,
    *,
    example: Tensor,
    round_to: int,
) -> list[Narrowing]:
    """What every space between layers may lose, kept space by space.

    Args:
        mapped: trace of the network.
        changeable: names of the layers that may lose channels.
        searches: of the layers.
        store: of the run.
        trials: in the network.
        example: ``(N, C, H, W)``, an input of it.
        round_to: the channels that stay are a multiple of it.
    """
    spaces = ranks.on_first(lambda: narrowable(searches.model, mapped, changeable, example))

    def find(space: int, readers: list[str]) -> dict[str, Any]:
        # Several spaces may have the same readers, as in a concatenation.
        name = f"narrowing of space {space}"

        def make() -> dict[str, Any]:
            made = _to_dict(_narrowing(mapped, space, problems, trials, round_to))
            store.write(name, made)
            return made

        known = ranks.on_first(lambda: store.read(name))
        if known is None:
            # All processes take part in their moments.
            problems = {n: search.problem for n, search in searches(readers).items()}
            known = ranks.on_first(make)
        return known

    found = [_from_dict(find(space, readers)) for space, readers in spaces.items()]
    log.info("%d of %d spaces of channels can lose some", len(found), len(mapped.spaces))
    return found


def narrowable(
    model: nn.Module, mapped: Trace, changeable: Collection[str], example: Tensor
) -> dict[int, list[str]]:
    """The spaces between layers that can lose strands, and the dense layers that read each.

    Not the stream of a residual network, which many layers write: none of them could take back what
    the others lose.
    """
    layers = {m.module for m in mapped.members if isinstance(model.get_submodule(m.module), Layer)}
    on = {
        space: {m.module for m in mapped.members if space in m.runs.spaces} & layers
        for space in range(len(mapped.spaces))
    }
    found = {}
    for space in prunable(model, mapped, (example,))[0]:
        readers, writers = [], []
        for conv in mapped.convs:
            if conv.spec.groups == 1:
                readers += [conv] * (space in conv.inputs.spaces)
                writers += [conv] * (space in conv.outputs.spaces)
        # A gate writes one value for a whole map.
        sizes = [np.prod(conv.spec.output_size) for conv in writers]
        if (
            mapped.spaces[space].channels >= WIDE
            and on[space] <= set(changeable)
            and sizes.count(max(sizes)) == 1
            and all(conv.spec.fan_in <= EXACT for conv in readers)
        ):
            found[space] = [conv.name for conv in readers]
    return found


def removal(
    problems: Sequence[tuple[Regression, Tensor]], widths: Sequence[int]
) -> list[tuple[tuple[int, ...], list[float]]]:
    """Which strands stay at each width, and the share of its variance that each reader loses.

    Args:
        problems: for each layer that reads them its regression, and ``(strands, slots)``, the
            input channels that each strand is there.
        widths: numbers of strands that stay, falling.
    """
    readers = [_Reader(problem, positions) for problem, positions in problems]
    left = list(range(len(problems[0][1])))
    result = []
    for width in widths:
        while len(left) > width:
            costs = sum(reader.costs() for reader in readers)
            assert isinstance(costs, Tensor)
            count = min(len(left) - width, max(reader.at_once for reader in readers))
            gone = costs.argsort(stable=True)[:count].sort().values
            for reader in readers:
                reader.remove(gone)
            for place in reversed(gone.tolist()):
                del left[place]
        result.append((tuple(left), [reader.lost for reader in readers]))
    return result


class _Reader:
    """A layer that reads the strands, its inputs ordered by strand and the others after them.

    Args:
        problem: its regression.
        positions: ``(strands, slots)``, input channels.
    """

    def __init__(self, problem: Regression, positions: Tensor) -> None:
        columns = problem.rows(positions.flatten())
        others = torch.ones(len(problem.h), dtype=torch.bool)
        others[columns] = False
        order = torch.cat([columns, others.nonzero().flatten()])
        factor = torch.linalg.cholesky(problem.h[order[:, None], order])
        self._inverse = torch.cholesky_inverse(factor)
        self._weight = problem.best[:, order]
        self._each = positions.shape[1] * problem.taps
        self._strands = len(positions)
        self._total = max(problem.total, 1e-300)
        self.at_once = max(1, len(order) // _INPUTS)
        self.lost = 0.0

    def costs(self) -> Tensor:
        """``(strands,)``: the share of the variance that goes with each strand that is left."""
        size = (self._strands, self._each)
        count = self._strands * self._each
        blocks = self._inverse[:count, :count].unflatten(0, size).unflatten(2, size)
        blocks = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        weight = self._weight[:, :count].unflatten(1, size).movedim(1, 0)
        explained = torch.linalg.solve(blocks, weight.mT)
        return (explained * weight.mT).sum((1, 2)) / self._total

    def remove(self, strands: Tensor) -> None:
        """Take some strands out and fit the rest again."""
        gone = (strands[:, None] * self._each + torch.arange(self._each)).flatten()
        stays = torch.ones(len(self._inverse), dtype=torch.bool)
        stays[gone] = False
        rest = stays.nonzero().flatten()
        block, weight = self._inverse[gone[:, None], gone], self._weight[:, gone]
        beside = self._inverse[gone[:, None], rest]
        solved = torch.linalg.solve(block, torch.cat([beside, weight.T], 1))
        self.lost += float((solved[:, len(rest) :] * weight.T).sum()) / self._total
        self._weight = self._weight[:, rest] - weight @ solved[:, : len(rest)]
        self._inverse = self._inverse[rest[:, None], rest] - beside.T @ solved[:, : len(rest)]
        self._strands -= len(strands)


def _narrowing(
    mapped: Trace,
    space: int,
    problems: Mapping[str, Regression],
    trials: Trials,
    round_to: int,
) -> Narrowing:
    convs = {conv.name: conv for conv in mapped.convs}
    count, step = mapped.spaces[space].channels, np.lcm(_MULTIPLE, round_to)
    rounded = {int(share * count / step + 0.5) * int(step) for share in _SHARES}
    widths = sorted((width for width in rounded if 0 < width < count), reverse=True)
    reads = [
        (problem, torch.from_numpy(convs[name].inputs.parts[space]))
        for name, problem in problems.items()
    ]
    candidates: list[dict[str, Candidate]] = []
    for strands, losses in removal(reads, widths):
        lost = dict(zip(problems, losses, strict=True))
        candidates.append(
            {
                name: Candidate(kept.structure, lost.get(name, 0.0), kept=kept)
                for name, kept in kept_by_layers(mapped, {space: strands}).items()
            }
        )
    return Narrowing(
        candidates,
        {
            name: trials.sensitivity(name, problem, [layers[name] for layers in candidates])
            for name, problem in problems.items()
        },
    )


def _to_dict(narrowing: Narrowing) -> dict[str, Any]:
    return {
        "candidates": [
            {name: candidate.to_dict() for name, candidate in layers.items()}
            for layers in narrowing.candidates
        ],
        "sensitivities": {name: asdict(s) for name, s in narrowing.sensitivities.items()},
    }


def _from_dict(values: Mapping[str, Any]) -> Narrowing:
    return Narrowing(
        [
            {name: Candidate.from_dict(candidate) for name, candidate in layers.items()}
            for layers in values["candidates"]
        ],
        {name: Sensitivity(**s) for name, s in values["sensitivities"].items()},
    )
