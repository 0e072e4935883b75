"""Two convolutions in place of a dense one: the layer's own kernel, then a pointwise one.

The first has the layer's kernel, stride and padding and M output channels in G1 groups; the second
mixes them into the layer's outputs, in G2 groups, after a channel shuffle if there is one. The
family holds a low rank (G1 = G2 = 1), a grouped layer with a pointwise one (G2 = 1), the
depthwise-separable form (G1 = C_in = M, G2 = 1) and the grouped pair with a shuffle of ShuffleNet
(Zhang et al., 2018; G1 = G2).

With W1 the block-diagonal weights of the first and P those of the second, what is lost is
``tr((P W1 - W*) H (P W1 - W*)^T)``, W* the best dense weights. For G1 = 1 its least has a closed
form, reduced-rank regression (Izenman, 1975). Otherwise P and each group of W1 are solved for in
turn, exactly, with the rest held, and each sweep is tried a little further than it went (line
search for alternating least squares: Rajih, Comon and Harshman, 2008).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.optimize.schur import Regression
from groupconv.optimize.structure import Pair

# Ranks on offer, as shares of the full one.
_RANKS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
# Middle channels on offer before a dense pointwise layer, as multiples of the input channels.
_MULTIPLES = (1, 2, 3)
# They are multiples of this many channels, so that they fill vectors.
_MULTIPLE = 8
# A sweep that gains less than this share of the total is the last.
_TOLERANCE = 1e-6
# Added to variances, in units of each, before they are inverted: middle channels may depend on each
# other or do nothing. What is solved for is the change of the weights, so it costs no accuracy.
_JITTER = 1e-8
# How much further than a sweep went the next ones are tried, after success and after failure.
_LONGER, _SHORTER = 1.5, 0.5


@dataclass(frozen=True)
class PairFit:
    """Fitted weights of a pair.

    Args:
        shape: of the pair.
        first: ``(M, C_in / G1 * taps)``, float64.
        second: ``(C_out, M / G2)``, float64.
        loss: share of the total that is lost, as of :meth:`Regression.loss`.
    """

    shape: Pair
    first: Tensor
    second: Tensor
    loss: float

    def dense(self) -> Tensor:
        """``(C_out, C_in * taps)``: the weights of one dense layer that does what both do."""
        first = self.first.unflatten(0, (self.shape.groups, -1))
        second = self.second.unflatten(0, (self.shape.pointwise_groups, -1))
        return (_by_group(self.shape, second) @ first).movedim(0, 1).flatten(1)


def pair_shapes(spec: ConvSpec) -> list[Pair]:
    """The pairs to consider for a dense layer, each of fewer MACs; of other layers none.

    For a linear layer those of low rank.
    """
    if spec.transposed or spec.groups > 1:
        return []
    full = min(spec.fan_in, spec.out_channels)
    ranks = {max(round(share * full / _MULTIPLE), 1) * _MULTIPLE for share in _RANKS}
    shapes = [Pair(rank, 1, 1, False) for rank in sorted(ranks)]
    if spec.taps > 1:
        dividing = legal_groups(spec.in_channels, spec.in_channels)[1:]
        shapes += [
            Pair(multiple * spec.in_channels, groups, 1, False)
            for multiple in _MULTIPLES
            for groups in dividing
            if multiple == 1 or multiple * spec.in_channels <= spec.out_channels
        ]
    elif not spec.linear:
        middle = min(spec.in_channels, spec.out_channels)
        # With one middle channel per group the pair is but one grouped layer.
        legal = legal_groups(spec.in_channels, spec.out_channels)[1:]
        shapes += [Pair(middle, groups, groups, True) for groups in legal if groups < middle]
    return [shape for shape in shapes if sum(c.macs for c in shape.specs(spec)) < spec.macs]


def fit_pair(
    problem: Regression,
    shape: Pair,
    *,
    sweeps: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> PairFit:
    """The weights of a pair that lose least, or near it; no sweep loses more than the one before.

    Args:
        problem: of the layer itself, not a reduced one.
        shape: of the pair.
        sweeps: over both convolutions, at most. Where the first has one group there are none: the
            weights are the best there are.
        start: first and second weights to go on from, such as those of a shorter fit; by default
            the leading components of each block of the best dense weights.
    """
    assert len(problem.t) == problem.out_channels, "a reduced problem is not the layer's own"
    assert problem.in_channels % shape.groups == shape.middle % shape.groups == 0
    assert problem.out_channels % shape.pointwise_groups == 0
    assert shape.middle % shape.pointwise_groups == 0
    steps = _Steps(problem, shape)
    if start is None or shape.groups == 1:
        first, second = steps.start(problem.best)
    else:
        first = start[0].unflatten(0, (shape.groups, -1))
        second = start[1].unflatten(0, (shape.pointwise_groups, -1))
    second, explained = steps.second(first, second)
    reach = 1.0
    for _ in range(sweeps if shape.groups > 1 else 0):
        before, (old, second) = explained, _balanced(shape, first, second)
        first = steps.first(old, second)
        second, explained = steps.second(first, second)
        further = first + reach * (first - old)
        further_second, further_explained = steps.second(further, second)
        if further_explained > explained:
            first, second, explained = further, further_second, further_explained
            reach *= _LONGER
        else:
            reach *= _SHORTER
        if explained - before <= _TOLERANCE * problem.total:
            break
    first, second = (weight.flatten(0, 1) for weight in _balanced(shape, first, second))
    return PairFit(shape, first, second, problem.share_lost(explained))


class _Steps:
    """The steps towards one pair, and what they share.

    First weights are ``(G1, M / G1, n)`` here, n the inputs of a group, and second ones
    ``(G2, C_out / G2, M / G2)``.
    """

    def __init__(self, problem: Regression, shape: Pair) -> None:
        self.shape, self.order = shape, shape.order()
        # (G1, n, D) and (G1, C_out, n), by the group of the inputs.
        self.h = problem.h.unflatten(0, (shape.groups, -1))
        self.t = problem.t.unflatten(1, (shape.groups, -1)).movedim(1, 0)

    @cached_property
    def own(self) -> Tensor:
        """``(G1, n, n)``: covariance of the inputs of each group."""
        return _diagonal_blocks(self.h.flatten(0, 1), self.shape.groups)

    @cached_property
    def inverse(self) -> Tensor:
        """``(G1, n, n)``: its inverse."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.own))

    def start(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """First weights from the dense ones, block by block, and second ones that are yet zeros.

        A block takes the inputs of one group of the first to the outputs of one of the second. It
        keeps as many of its leading components as there are channels between the two, as in the
        projection to Monarch matrices (Dao et al., 2022).
        """
        groups, pointwise_groups = self.shape.groups, self.shape.pointwise_groups
        blocks = best.unflatten(1, (groups, -1)).unflatten(0, (pointwise_groups, -1))
        leads_to = torch.empty(self.shape.middle, dtype=torch.int64)
        leads_to[self.order] = torch.arange(pointwise_groups).repeat_interleave(
            self.shape.middle // pointwise_groups
        )
        first = []
        for g, channels in enumerate(leads_to.reshape(groups, -1)):
            reached, ranks = torch.unique_consecutive(channels, return_counts=True)
            patterns = _leading(blocks[reached, :, g], self.own[g], int(ranks.max()))
            first += [rows[:rank] for rows, rank in zip(patterns, ranks.tolist(), strict=True)]
        second = best.new_zeros(len(blocks), blocks.shape[1], self.shape.middle // len(blocks))
        return torch.cat(first).unflatten(0, (groups, -1)), second

    def first(self, first: Tensor, second: Tensor) -> Tensor:
        """The first with the second held: each group in turn, with the others as they are then."""
        groups, width, _ = first.shape
        by_group = _by_group(self.shape, second)
        columns = by_group.movedim(0, 1).flatten(1)
        # Outputs are many: all that is needed of them is what middle channels share there.
        shared = columns.T @ columns
        within = _inverse(_diagonal_blocks(shared, groups))
        shared = shared.reshape(groups, width, groups, width).transpose(1, 2)
        wanted = by_group.mT @ self.t
        first = first.clone()
        for g in range(groups):
            mixed = shared[g] @ first
            slope = wanted[g] - mixed.movedim(0, 1).flatten(1) @ self.h[g].T
            first[g] += within[g] @ slope @ self.inverse[g]
        return first

    def second(self, first: Tensor, second: Tensor) -> tuple[Tensor, float]:
        """The second with the first held, and what both explain then."""
        # (G1, M, n): covariance of the middle channels with the inputs, by the inputs' group.
        with_inputs = (first @ self.h).flatten(0, 1).unflatten(1, (len(first), -1)).movedim(1, 0)
        middle = (with_inputs @ first.mT).movedim(0, 1).flatten(1)
        outputs = (self.t @ first.mT).movedim(0, 1).flatten(1)
        # Of the middle channels that each group of the second sees, and of its outputs with them.
        z = _diagonal_blocks(middle[self.order[:, None], self.order], len(second))
        c = _diagonal_blocks(outputs[:, self.order], len(second))
        second = second + (c - second @ z) @ _inverse(z)
        return second, float((second * (2 * c - second @ z)).sum())


def _by_group(shape: Pair, second: Tensor) -> Tensor:
    """``(G1, C_out, M / G1)``: what the outputs take from each group of the first."""
    columns = torch.block_diag(*second)[:, shape.order().argsort()]
    return columns.unflatten(1, (shape.groups, -1)).movedim(1, 0)


def _balanced(shape: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same pair, weights into and out of each middle channel of equal norm.

    That keeps scales from drifting apart, and is what weight decay tends to in training.
    """
    order = shape.order()
    into = first.flatten(0, 1).norm(dim=1)
    out = torch.empty_like(into)
    out[order] = second.norm(dim=1).flatten()
    scale = torch.where((into > 0) & (out > 0), (out / into).sqrt(), 1.0)
    into_second = scale[order].reshape(shape.pointwise_groups, 1, -1)
    return first * scale.reshape(shape.groups, -1, 1), second / into_second


def _leading(weight: Tensor, h: Tensor, count: int) -> Tensor:
    """The combinations of inputs through which most of the outputs comes.

    Args:
        weight: ``(B, R, n)``, maps of the same inputs.
        h: ``(n, n)``, their covariance.
        count: how many; those above the full rank are zeros.

    Returns:
        ``(B, count, n)``, of each map by descending share.
    """
    batch, outputs, inputs = weight.shape
    if outputs <= inputs:
        vectors = torch.linalg.eigh(weight @ h @ weight.mT).eigenvectors
        found = vectors.flip(-1)[..., :count].mT @ weight
    else:
        factor = torch.linalg.cholesky(h)
        half = weight @ factor
        vectors = torch.linalg.eigh(half.mT @ half).eigenvectors
        found = torch.linalg.solve_triangular(
            factor, vectors.flip(-1)[..., :count].mT, upper=False, left=False
        )
    rows = weight.new_zeros(batch, count, inputs)
    rows[:, : found.shape[1]] = found
    return rows


def _inverse(gram: Tensor) -> Tensor:
    """Inverses of a stack of symmetric matrices, a little too small where they are singular."""
    deviation = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)[..., None]
    units = deviation * deviation.mT
    scaled = gram / units
    scaled.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    return torch.cholesky_inverse(torch.linalg.cholesky(scaled)) / units


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """``(count, rows / count, columns / count)``, those on the diagonal."""
    blocks = matrix.unflatten(1, (count, -1)).unflatten(0, (count, -1))
    return blocks[range(count), :, range(count)]
