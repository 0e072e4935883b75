"""The search against every partition there is, and on layers that are grouped in secret."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.optimize.covariance import LayerSums, Moments
from groupconv.optimize.fit import fit
from groupconv.optimize.partition import Partition
from groupconv.optimize.sampling import sample
from groupconv.optimize.schur import Regression
from groupconv.optimize.search import SCREEN, THOROUGH, Search
from groupconv.optimize.trace import trace


def hidden_groups(channels: int, groups: int, kernel: int, seed: int) -> tuple[nn.Conv2d, Tensor]:
    """A dense layer whose weight is blocks behind random orders, and images for it."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, channels, kernel)
    mask = torch.block_diag(*[torch.ones(channels // groups, channels // groups)] * groups)
    mask = mask[torch.randperm(channels)][:, torch.randperm(channels)]
    with torch.no_grad():
        layer.weight *= mask[:, :, None, None]
    mixed = nn.Conv2d(channels, channels, 3)(torch.randn(16, channels, 12, 12))
    return layer, mixed.detach()


def moments_of(layer: nn.Conv2d, x: Tensor) -> Moments:
    spec = trace(layer, (x,)).convs[0].spec
    u, y, image = sample(spec, x, layer(x).detach(), 10**6, torch.Generator())
    sums = LayerSums(u.shape[1], y.shape[1])
    sums.add(u, y, image)
    return sums.finish()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [2, 4, 16])
@pytest.mark.parametrize("seed", range(2))
def test_hidden_groups_are_found(kernel: int, groups: int, seed: int) -> None:
    layer, x = hidden_groups(16, groups, kernel, seed)
    moments = moments_of(layer, x)
    found = Search(Regression.of(moments, layer.weight), seed).find(groups)
    assert found.loss < 1e-9
    assert found.losses["identity"] > 0.05
    fitted = fit(moments, layer.weight, found.partition)
    grouped = nn.Conv2d(16, 16, kernel, groups=groups)
    with torch.no_grad():
        grouped.weight.copy_(fitted.weight)
        grouped.bias.copy_(fitted.bias)
        expected = layer(x)[:, list(found.partition.out_order)]
        actual = grouped(x[:, list(found.partition.in_order)])
    assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_of_all_partitions(taps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = 6 * taps
    u = rng.normal(size=(100, d)) @ rng.normal(size=(d, d))
    h, w = (torch.from_numpy(a) for a in (u.T @ u / 100, rng.normal(size=(4, d))))
    t = w @ h
    problem = Regression(torch.cat([h, t.T], 1), float((t * w).sum()), taps, 4)
    every = [
        problem.loss(Partition(2, tuple(ins), tuple(outs)))
        for ins in ((0, *a, *(set(range(1, 6)) - set(a)))
                    for a in itertools.combinations(range(1, 6), 2))
        for outs in ((*b, *(set(range(4)) - set(b))) for b in itertools.combinations(range(4), 2))
    ]  # fmt: skip
    # With several taps the reduced problem alone is not the layer's own.
    effort = THOROUGH if taps == 1 else replace(THOROUGH, exact=30, finalists=3)
    found = Search(problem, seed).find(2, effort=effort)
    assert found.loss == problem.loss(found.partition)
    # Swaps end in a local optimum: among the best, not always the best.
    assert found.loss <= 1.03 * min(every)
    assert sum(loss < found.loss - 1e-9 for loss in every) <= 0.03 * len(every)


def hidden_problem() -> Regression:
    layer, x = hidden_groups(12, 3, 2, 5)
    return Regression.of(moments_of(layer, x), layer.weight)


def test_given_orders_are_kept() -> None:
    problem = hidden_problem()
    search = Search(problem, 0)
    free = search.find(3)
    order = tuple(np.random.default_rng(0).permutation(12).tolist())
    by_in, by_out = search.find(3, given_in=order), search.find(3, given_out=order)
    both = search.find(3, given_in=order, given_out=order[::-1])
    assert by_in.partition.in_order == by_out.partition.out_order == order
    assert both.partition == Partition(3, order, order[::-1])
    assert both.losses == {"identity": both.loss}
    assert free.loss <= min(by_in.loss, by_out.loss)
    assert max(by_in.loss, by_out.loss) <= both.loss + 1e-12
    # With one side as it was found, the other follows.
    assert search.find(3, given_in=free.partition.in_order).loss < 1e-9
    assert search.find(3, given_out=free.partition.out_order).loss < 1e-9


def test_the_same_question_has_the_same_answer() -> None:
    problem = hidden_problem()
    search = Search(problem, 0)
    found = search.find(2)
    assert search.find(2) is found
    assert Search(problem, 0).find(2) == found
    quick = search.find(2, effort=SCREEN)
    assert found.loss <= quick.loss
    assert found.loss <= min(found.losses.values())
    assert set(quick.losses) == {"identity", "energy"}
    assert found.start in found.losses
    assert len(found.losses) == 1 + THOROUGH.starts
    assert set(quick.losses) < set(found.losses)


def test_wide_layers_are_searched_in_the_reduced_problem() -> None:
    layer, x = hidden_groups(16, 4, 3, 1)
    whole = Regression.of(moments_of(layer, x), layer.weight)
    found = Search(whole.separable(), 0).find(4)
    assert whole.loss(found.partition) < 1e-9
