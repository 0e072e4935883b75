"""The explained variance against least squares, and the reduced problem where it is exact."""

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor

from groupconv.optimize.covariance import Moments, MomentSums, SeparableMoments
from groupconv.optimize.fit import fit
from groupconv.optimize.partition import Partition
from groupconv.optimize.schur import RIDGE, Regression, scale

IN, OUT, TAPS = 4, 6, 2
PARTITION = Partition(2, (3, 0, 1, 2), (5, 0, 2, 4, 1, 3))


def layer(noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs, the outputs of a dense layer and its weight."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(500, IN * TAPS)) @ rng.normal(size=(IN * TAPS, IN * TAPS)) + 2
    weight = rng.normal(size=(OUT, IN * TAPS))
    y = u @ weight.T - 1 + noise * rng.normal(size=(500, OUT))
    return torch.from_numpy(u), torch.from_numpy(y), torch.from_numpy(weight)


def moments_of(u: Tensor, y: Tensor) -> Moments:
    sums = MomentSums(u.shape[1], y.shape[1])
    sums.add(u, y)
    return sums.finish()


def test_loss_is_that_of_the_penalised_fit() -> None:
    """Residual and ridge of the fitted weights, cut ones pulled to 0 and lost altogether."""
    u, y, weight = layer(noise=2)
    moments = moments_of(u, y)
    dense = weight.reshape(OUT, IN, TAPS)
    result = fit(moments, dense, PARTITION)
    full = torch.zeros(OUT, IN, TAPS, dtype=torch.float64)
    for q, (rows, columns) in enumerate(
        zip(np.split(np.array(PARTITION.out_order), 2), np.split(np.array(PARTITION.in_order), 2),
            strict=True)
    ):  # fmt: skip
        full[np.ix_(rows, columns)] = result.weight[q * 3 : q * 3 + 3]
    residual = result.loss * float(moments.yy.sum())
    ridge = RIDGE * float(scale(moments))
    penalty = ridge * float((full - dense).square().sum())
    regression = Regression.of(moments, dense)
    total = float(moments.yy.sum() + ridge * dense.square().sum())
    assert regression.total == pytest.approx(total)
    assert regression.loss(PARTITION) == pytest.approx((residual + penalty) / total, rel=1e-9)


def test_own_outputs_in_one_group_lose_nothing() -> None:
    u, y, weight = layer()
    regression = Regression.of(moments_of(u, y), weight.reshape(OUT, IN, TAPS))
    assert regression.loss(Partition.identity(1, IN, OUT)) == pytest.approx(0, abs=1e-9)
    assert regression.loss(PARTITION) > 0.01


def test_inputs_and_outputs_have_their_places() -> None:
    u, y, weight = layer()
    regression = Regression.of(moments_of(u, y), weight.reshape(OUT, IN, TAPS))
    assert (regression.in_channels, regression.taps, regression.out_channels) == (IN, TAPS, OUT)
    assert regression.rows([2, 0]).tolist() == [4, 5, 0, 1]
    assert regression.h.shape == (IN * TAPS, IN * TAPS)
    assert regression.t.shape == (OUT, IN * TAPS)
    each = regression.explained([2, 0])
    inside = regression.rows([2, 0])
    h, t = regression.h[inside][:, inside], regression.t[:, inside]
    assert_close(each, (t @ torch.linalg.inv(h) @ t.T).diagonal(), rtol=1e-9, atol=0)


def kronecker(out_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Covariances between channels and between taps, and a dense weight."""
    rng = np.random.default_rng(1)
    between, within = (np.cov(rng.normal(size=(n, 3 * n))) for n in (6, 3))
    weight = rng.normal(size=(out_channels, 6, 3))
    return tuple(torch.from_numpy(a) for a in (between, within, weight))


def test_reduced_problem_is_exact_for_separable_inputs() -> None:
    between, within, weight = kronecker(4)
    h, flat = torch.kron(between, within), weight.flatten(1)
    t = flat @ h
    whole = Regression(torch.cat([h, t.T], 1), float((t * flat).sum()), 3, 4)
    reduced = whole.separable()
    assert (reduced.in_channels, reduced.taps, reduced.out_channels) == (6, 1, 4)
    assert reduced.total == pytest.approx(whole.total, rel=2 * RIDGE)
    for channels in ([0, 1, 2], [5, 3], [4]):
        # But for the ridge of its own.
        assert_close(
            reduced.explained(channels), whole.explained(channels), rtol=5 * RIDGE, atol=1e-9
        )


def test_separable_moments_make_the_reduced_problem() -> None:
    between, within, weight = kronecker(4)
    moments = SeparableMoments(100, between, within, 0.1)
    reduced = Regression.of(moments, weight)
    h, flat = torch.kron(between, within), weight.flatten(1)
    whole = Regression(torch.cat([h, (flat @ h).T], 1), 1.0, 3, 4)
    assert_close(reduced.explained([1, 4]), whole.explained([1, 4]), rtol=5 * RIDGE, atol=1e-9)
    assert reduced.loss(Partition.identity(1, 6, 4)) == pytest.approx(0, abs=1e-9)
