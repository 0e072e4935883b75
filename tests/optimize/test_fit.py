"""Closed-form weights against least squares, and their loss against two other ways to it."""

import dataclasses

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor

from groupconv.errors import DataError
from groupconv.optimize import fit as fit_module
from groupconv.optimize.covariance import LayerSums, Moments, MomentSums
from groupconv.optimize.fit import RIDGES, Fit, fit, fit_groups
from groupconv.optimize.partition import Partition

IN, OUT, KERNEL, GROUPS = 4, 6, (2, 1), 2
TAPS = 2
D = IN * TAPS
PARTITION = Partition(GROUPS, (3, 0, 1, 2), (5, 0, 2, 4, 1, 3))
DENSE = Partition.identity(1, IN, OUT)


def moments_of(u: Tensor, y: Tensor) -> Moments:
    sums = MomentSums(u.shape[1], y.shape[1])
    sums.add(u, y)
    return sums.finish()


def data(positions: int = 500, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs, outputs of a dense layer with noise, and that layer's weight."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(positions, D)) @ rng.normal(size=(D, D)) + 2
    weight = rng.normal(size=(OUT, D))
    y = u @ weight.T - 1 + noise * rng.normal(size=(positions, OUT))
    return torch.from_numpy(u), torch.from_numpy(y), torch.from_numpy(weight)


def columns(partition: Partition, group: int) -> list[int]:
    width = IN // partition.groups
    channels = partition.in_order[group * width : (group + 1) * width]
    return [channel * TAPS + tap for channel in channels for tap in range(TAPS)]


def rows(partition: Partition, group: int) -> list[int]:
    width = OUT // partition.groups
    return list(partition.out_order[group * width : (group + 1) * width])


def predicted(result: Fit, u: Tensor, partition: Partition) -> Tensor:
    """What the grouped layer gives, outputs in the original order."""
    y = torch.empty(len(u), OUT, dtype=torch.float64)
    for q in range(partition.groups):
        picked = slice(q * OUT // partition.groups, (q + 1) * OUT // partition.groups)
        w, b = result.weight[picked].flatten(1), result.bias[picked]
        y[:, rows(partition, q)] = u[:, columns(partition, q)] @ w.T + b
    return y


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "RIDGE", 1e-13)  # there is no held-out part


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("partition", [PARTITION, DENSE])
def test_least_squares(partition: Partition) -> None:
    u, y, weight = data()
    result = fit(moments_of(u, y), weight.reshape(OUT, IN, *KERNEL), partition)
    assert result.weight.shape == (OUT, IN // partition.groups, *KERNEL)
    ones = np.ones((len(u), 1))
    expected = []
    for q in range(partition.groups):
        inputs = np.hstack([u[:, columns(partition, q)].numpy(), ones])
        solution, *_ = np.linalg.lstsq(inputs, y[:, rows(partition, q)].numpy())
        expected.append(solution.T)
    both = torch.from_numpy(np.vstack(expected))
    assert_close(result.weight.flatten(1), both[:, :-1], rtol=1e-7, atol=1e-7)
    assert_close(result.bias, both[:, -1], rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("no_ridge")
def test_loss_is_the_schur_complement() -> None:
    """Of a layer that gives the outputs exactly: what the kept inputs can't predict of the cut."""
    u, y, weight = data(noise=0)
    moments = moments_of(u, y)
    loss = fit(moments, weight.reshape(OUT, IN, *KERNEL), PARTITION).loss
    lost = 0.0
    for q in range(GROUPS):
        inside, best = columns(PARTITION, q), weight[rows(PARTITION, q)]
        h_s = moments.uu[:, inside]
        rest = moments.uu - h_s @ torch.linalg.inv(h_s[inside]) @ h_s.T
        lost += float((best @ rest @ best.T).trace())
    assert loss == pytest.approx(lost / float(y.var(0, correction=0).sum()), rel=1e-8)
    assert 0.01 < loss < 1


@pytest.mark.parametrize("partition", [PARTITION, DENSE])
def test_loss_is_the_residual(partition: Partition) -> None:
    """With the ridge as it is, and on inputs whose outputs the layer can't give."""
    u, y, weight = data(noise=3)
    result = fit(moments_of(u, y), weight.reshape(OUT, IN, *KERNEL), partition)
    residual = y - predicted(result, u, partition)
    assert_close(residual.mean(0), torch.zeros(OUT), rtol=0, atol=1e-9)
    share = residual.square().mean(0).sum() / y.var(0, correction=0).sum()
    assert result.loss == pytest.approx(float(share), rel=1e-9)


@pytest.mark.parametrize("positions", [3, 500])
def test_own_outputs_give_the_dense_weight_back(positions: int) -> None:
    u, y, weight = data(positions, noise=0)
    result = fit(moments_of(u, y), weight.reshape(OUT, IN, *KERNEL), DENSE)
    # Whatever the ridge: it pulls towards these very weights.
    assert_close(result.weight.flatten(1), weight, rtol=1e-8, atol=1e-8)
    assert_close(result.bias, -torch.ones(OUT), rtol=0, atol=1e-7)
    assert result.loss == pytest.approx(0, abs=1e-12)


def test_dtype_of_the_weight() -> None:
    u, y, weight = data()
    half = weight.reshape(OUT, IN, *KERNEL).to(torch.bfloat16)
    result = fit(moments_of(u, y), half.requires_grad_(), PARTITION)
    assert (result.weight.dtype, result.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not result.weight.requires_grad


@pytest.mark.parametrize(("name", "row"), [("uu", 3), ("yu", 1)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite(name: str, row: int, value: float) -> None:
    u, y, weight = data()
    moments = moments_of(u, y)
    broken = getattr(moments, name).clone()
    broken[row, 2] = value
    with pytest.raises(DataError, match="activations hold NaN or Inf"):
        fit(
            dataclasses.replace(moments, **{name: broken}),
            weight.reshape(OUT, IN, *KERNEL),
            PARTITION,
        )


def test_too_few_positions_leave_the_trained_weights() -> None:
    """Three positions span two directions; along the others nothing may change."""
    u, y, weight = data(3, noise=3)
    result = fit(moments_of(u, y), weight.reshape(OUT, IN, *KERNEL), PARTITION)
    assert torch.isfinite(result.weight).all()
    assert torch.isfinite(result.bias).all()
    for q in range(GROUPS):
        inside = columns(PARTITION, q)
        seen = u[:, inside] - u[:, inside].mean(0)
        *_, directions = torch.linalg.svd(seen)
        unseen = directions[2:]
        picked = slice(q * OUT // GROUPS, (q + 1) * OUT // GROUPS)
        change = result.weight[picked].flatten(1) - weight[rows(PARTITION, q)][:, inside]
        assert_close(change @ unseen.T, torch.zeros(OUT // GROUPS, 2), rtol=0, atol=1e-9)
        assert float(change.norm()) > 0.1  # along the two that were seen, something does


def test_inputs_that_never_change() -> None:
    _, y, weight = data(20)
    result = fit(moments_of(torch.ones(20, D), y), weight.reshape(OUT, IN, *KERNEL), PARTITION)
    cut = torch.cat([weight[rows(PARTITION, q)][:, columns(PARTITION, q)] for q in range(GROUPS)])
    # Variances and covariances of 1e-16, which are rounding, over a ridge of 1e-12.
    assert_close(result.weight.flatten(1), cut, rtol=0, atol=1e-2)
    assert result.loss == pytest.approx(1)
    constant = fit(
        moments_of(torch.ones(20, D), torch.ones(20, OUT)),
        weight.reshape(OUT, IN, *KERNEL),
        PARTITION,
    )
    assert constant.loss == 0


def with_held_out(u: Tensor, y: Tensor) -> Moments:
    """Of a layer, or of its groups where these have an axis of their own."""
    sums = LayerSums(u.shape[-1], y.shape[-1], len(u) if u.ndim > 2 else None)
    sums.add(u, y, torch.arange(u.shape[-2]) // 5)  # five positions an image
    return sums.finish()


@pytest.mark.parametrize(("positions", "noise"), [(60, 3.0), (2_000, 0.5)])
def test_ridge_is_the_best_on_held_out_images(positions: int, noise: float) -> None:
    """Against fits without the held-out images, whose loss there is taken position by position."""
    u, y, weight = data(positions, noise)
    dense = weight.reshape(OUT, IN, *KERNEL)
    result = fit(with_held_out(u, y), dense, PARTITION)
    held = torch.arange(positions) // 5 % 4 == 3
    losses = {}
    for ridge in RIDGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit_module, "RIDGE", ridge)
            kept = fit(moments_of(u[~held], y[~held]), dense, PARTITION)
            assert kept.ridge == ridge
            assert kept.held_out is None
            whole = fit(moments_of(u, y), dense, PARTITION)
        residual = y[held] - predicted(kept, u[held], PARTITION)
        centred = y[held] - y[held].mean(0)
        losses[ridge] = float(residual.square().sum() / centred.square().sum())
        if ridge == result.ridge:
            assert_close(result.weight, whole.weight, rtol=1e-9, atol=1e-9)
            assert_close(result.bias, whole.bias, rtol=1e-9, atol=1e-9)
    assert result.ridge == min(losses, key=lambda ridge: losses[ridge])
    assert result.held_out == pytest.approx(losses[result.ridge], rel=1e-6)


def test_few_noisy_images_want_a_stronger_ridge() -> None:
    u, y, weight = data(20, noise=20.0)
    dense = weight.reshape(OUT, IN, *KERNEL)
    few = fit(with_held_out(u, y), dense, DENSE)
    u, y, _ = data(20_000, noise=20.0)
    wrong = dense + 1
    many = fit(with_held_out(u, y), wrong, DENSE)
    assert few.ridge > many.ridge


def test_groups_alone_are_as_good_as_the_whole() -> None:
    u, y, weight = data()
    whole = fit(with_held_out(u, y), weight.reshape(OUT, IN, *KERNEL), PARTITION)
    inputs, outputs = ([f(PARTITION, q) for q in range(GROUPS)] for f in (columns, rows))
    cut = [weight[o][:, i] for i, o in zip(inputs, outputs, strict=True)]
    own = with_held_out(*(
        torch.stack([tensor[:, index] for index in indices])
        for tensor, indices in ((u, inputs), (y, outputs))
    ))  # fmt: skip
    alone = fit_groups(own, torch.cat(cut).reshape(OUT, IN // GROUPS, *KERNEL))
    assert_close(alone.weight, whole.weight, rtol=1e-12, atol=1e-12)
    assert_close(alone.bias, whole.bias, rtol=1e-12, atol=1e-12)
    assert alone.ridge == whole.ridge
    assert (alone.loss, alone.held_out) == pytest.approx((whole.loss, whole.held_out), rel=1e-9)
