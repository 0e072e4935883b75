"""What a layer's loss costs the network, measured at its output.

A structure stands in place of a layer, its weights fitted, everything else left as it was, and the
network's output is compared with what it was. Two of a kind, a gentle and a harsh one, give the
error of the output as a power of the layer's loss; the others of that kind are read off the curve.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groupconv.optimize.menu import SWEEPS, Candidate
from groupconv.optimize.pair import fit_pair
from groupconv.optimize.partition import Partition
from groupconv.optimize.schur import Regression
from groupconv.optimize.structure import DENSE, Layer, Pair, dense_weight
from groupconv.optimize.visit import BATCH, outputs

# Losses outside these change the output by too little to be measured, or leave nothing of it.
_LEAST, _MOST = 1e-4, 0.5
# How the error usually grows with the loss, where only one cut was measured.
_POWER = 1.25


@dataclass(frozen=True)
class Sensitivity:
    """The error of the network's output as ``scale * loss**power``.

    Errors are squared differences over the variance of the output between images; of several
    outputs the mean.
    """

    scale: float
    power: float

    def error(self, loss: float) -> float:
        return self.scale * loss**self.power if loss > 0 else 0.0

    def slope(self, loss: float) -> float:
        """How fast the error grows with the loss."""
        return self.scale * self.power * max(loss, _LEAST) ** (self.power - 1)


class Trials:
    """Structures in place of single layers, tried in the network.

    Args:
        model: in evaluation mode.
        images: ``(N, C, H, W)``, N at least 2.
        importance: layer name to what its output channels count in its regression; where it has
            none all count alike.
        ends: names of the modules whose outputs count; the model itself is named "".
        at_once: images per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        importance: Mapping[str, Tensor] | None = None,
        ends: Sequence[str] = ("",),
        at_once: int = BATCH,
    ) -> None:
        self.model, self.importance = model, importance or {}
        self.outputs = partial(outputs, model, images, ends, at_once)

    @cached_property
    def exact(self) -> list[Tensor]:
        """What the network gives as it is, once it is asked for."""
        return self.outputs()

    @cached_property
    def spreads(self) -> list[float]:
        """Variance of each output between images, times their number."""
        return [
            float((exact - exact.mean(0)).square().sum().clamp_min(1e-30)) for exact in self.exact
        ]

    def sensitivity(
        self, name: str, problem: Regression, candidates: Sequence[Candidate]
    ) -> Sensitivity:
        """Measured with the gentlest and the harshest of some candidates.

        Args:
            name: of the layer.
            problem: its regression.
            candidates: of one kind, from its menu; what loses nothing is passed over.
        """
        found = [
            (candidate.loss, self._error(name, problem, candidate))
            for candidate in _ends(candidates)
        ]
        if not found:
            return Sensitivity(1.0, _POWER)
        if len(found) == 1:
            ((loss, error),) = found
            return Sensitivity(error / max(loss, _LEAST) ** _POWER, _POWER)
        (least, small), (most, large) = found
        # More loss is never better, however few the images.
        power = max(math.log(large / small) / math.log(most / least), 0.0)
        return Sensitivity(small / least**power, power)

    def _error(self, name: str, problem: Regression, candidate: Candidate) -> float:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, Layer)
        dense = dense_weight(layer)
        if candidate.partition is not None:
            weight = refitted(problem, dense, of_groups(candidate.partition))
        elif candidate.kept is not None:
            weight = refitted(problem, dense, [(candidate.kept.inputs, range(len(dense)))])
        else:
            assert isinstance(candidate.structure, Pair)
            weight = fit_pair(problem, candidate.structure, sweeps=SWEEPS).dense()
            if name in self.importance:
                weight = weight / self.importance[name].sqrt()[:, None]
            weight = weight.reshape(dense.shape)
        with _replaced(layer, weight.to(layer.weight)):
            moved = self.outputs()
        errors = [
            float((a - b).square().sum()) / spread
            for a, b, spread in zip(moved, self.exact, self.spreads, strict=True)
        ]
        return max(sum(errors) / len(errors), 1e-12)


def _loss(candidate: Candidate) -> float:
    return candidate.loss


def _ends(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What to try: the gentlest and the harshest, if they differ, or one."""
    cuts = [c for c in candidates if c.loss > 0]
    within = [c for c in cuts if _LEAST <= c.loss <= _MOST]
    if not within:
        # The nearest: of those above the gentlest, or else of those below the harshest.
        above = [c for c in cuts if c.loss > _MOST]
        nearest = min(above, key=_loss) if above else max(cuts, key=_loss, default=None)
        return [] if nearest is None else [nearest]
    least, most = min(within, key=_loss), max(within, key=_loss)
    return [least, most] if most.loss > 1.2 * least.loss else [least]


def of_groups(partition: Partition) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Inputs and outputs of each group."""
    inputs, outputs = (
        np.reshape(order, (partition.groups, -1)).tolist()
        for order in (partition.in_order, partition.out_order)
    )
    return list(zip(inputs, outputs, strict=True))


def refitted(
    problem: Regression, weight: Tensor, blocks: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """The trained weights cut to some blocks; what is cut is predicted by what is kept.

    Args:
        problem: of the layer in the original network, where the outputs are the weights times the
            inputs: the best weights of a block are ``W H_:S H_SS^-1``.
        weight: ``(C_out, C_in, *k)``.
        blocks: inputs, and the outputs that keep them.

    Returns:
        as ``weight``, in the same order, zero outside the blocks.
    """
    dense = weight.detach().double().cpu().flatten(1)
    # The separable problem has one input per channel: each tap is fitted alike.
    by_input = dense.reshape(len(dense), len(problem.h), -1).transpose(1, 2)
    result = torch.zeros_like(by_input)
    taps = torch.arange(result.shape[1])
    for inputs, written in blocks:
        kept, rows = problem.rows(inputs), torch.tensor(written)
        factor = torch.linalg.cholesky(problem.h[kept[:, None], kept])
        predicts = torch.cholesky_solve(problem.h[kept], factor)
        result[rows[:, None, None], taps[:, None], kept] = by_input[rows] @ predicts.T
    return result.transpose(1, 2).reshape(weight.shape)


@contextmanager
def _replaced(layer: Layer, weight: Tensor) -> Iterator[None]:
    """Another dense weight for a while; the mean of every output stays as it was."""
    other = copy.deepcopy(layer)
    DENSE.build(other, bias=False)
    other.weight = nn.Parameter(weight, requires_grad=False)

    def swap(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Without the hooks that the copy has too.
        moved = other.forward(*args)
        off = (output - moved).mean([0, *range(2, output.ndim)], keepdim=True)
        return moved + off

    handle = layer.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()
