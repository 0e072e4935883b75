"""Gains of exchanges and up- and down-dated groups against a fresh solve of every set of inputs."""

import sys

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor

from groupconv.optimize.exchange import Group
from groupconv.optimize.schur import Regression

IN, OUT = 8, 4


def problem(taps: int, rows: int = 1, positions: int = 200) -> Regression:
    """Correlated inputs, and outputs that they explain in part; ``rows`` rows for each output."""
    rng = np.random.default_rng(taps)
    u = rng.normal(size=(positions, IN * taps)) @ rng.normal(size=(IN * taps, IN * taps))
    y = u @ rng.normal(size=(IN * taps, OUT * rows)) + rng.normal(size=(positions, OUT * rows))
    h, t = torch.from_numpy(u.T @ u / positions), torch.from_numpy(u.T @ y / positions)
    return Regression(torch.cat([h, t], 1), float((y * y).sum() / positions), taps, OUT)


def explained(regression: Regression, channels: list[int], outputs: list[int]) -> float:
    inside = [c * regression.taps + tap for c in channels for tap in range(regression.taps)]
    per_output = len(regression.t) // OUT
    t = regression.t[[o * per_output + j for o in outputs for j in range(per_output)]][:, inside]
    return float((t @ torch.linalg.inv(regression.h[inside][:, inside]) @ t.T).trace())


def assert_fresh(group: Group) -> None:
    """As if it had been made with its present channels."""
    fresh = Group(group.problem, group.channels.tolist())
    for name in ("inverse", "tableau"):
        actual, expected = (getattr(g, name) for g in (group, fresh))
        assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(("taps", "rows"), [(1, 1), (1, 3), (2, 1), (9, 1)])
@pytest.mark.parametrize("channels", [[4, 1, 3], [6]])
def test_gains_are_exact(taps: int, rows: int, channels: list[int]) -> None:
    regression, outputs = problem(taps, rows), [2, 0]
    gains = Group(regression, channels).gains(torch.tensor(outputs))
    assert gains.shape == (len(channels), IN)
    before = explained(regression, channels, outputs)
    for place in range(len(channels)):
        for entering in range(IN):
            if entering in channels:
                assert gains[place, entering] == -torch.inf
                continue
            after = [*channels[:place], entering, *channels[place + 1 :]]
            expected = explained(regression, after, outputs) - before
            assert float(gains[place, entering]) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_gains_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(problem(3), [0, 2, 4, 6])
    whole = group.gains(torch.tensor([1]))
    monkeypatch.setattr(sys.modules[Group.__module__], "_CHUNK", 1)
    assert_close(group.gains(torch.tensor([1])), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("rebuild", [0.0, 2.0])
def test_exchange_is_a_fresh_group(
    taps: int, rebuild: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Group.__module__], "_REBUILD", rebuild)
    group = Group(problem(taps), [0, 1, 2, 3])
    for places, entering in (([1], [5]), ([3, 0], [7, 4]), ([0, 1, 2, 3], [0, 1, 2, 3])):
        group.exchange(places, entering)
        assert_fresh(group)
    assert group.channels.tolist() == [0, 1, 2, 3]


def test_many_exchanges_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Group.__module__], "_REBUILD", 2.0)
    group, rng = Group(problem(2), [0, 1, 2]), np.random.default_rng(0)
    for _ in range(200):
        outside = sorted(set(range(IN)) - set(group.channels.tolist()))
        group.exchange([int(rng.integers(3))], [int(rng.choice(outside))])
    assert_fresh(group)


def test_explained_of_every_output() -> None:
    regression: Regression = problem(2, 3)
    each: Tensor = Group(regression, [5, 0]).explained()
    for output in range(OUT):
        expected = explained(regression, [5, 0], [output])
        assert float(each[output]) == pytest.approx(expected, rel=1e-9)
