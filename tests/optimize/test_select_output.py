"""The integer program leaves standard output to its callers, native code included."""

import os

import numpy as np
import pytest

from groupconv.optimize.select import Bound, select


def _instance(seed: int) -> tuple[dict[str, list[float]], Bound]:
    """Menus like those of a network: costs fall, losses rise, the budget is tight."""
    rng = np.random.default_rng(seed)
    losses, costs = {}, {}
    for layer in range(int(rng.integers(2, 30))):
        count = int(rng.integers(2, 20))
        costs[f"{layer}"] = [1.0, *sorted(rng.uniform(0.02, 1, count), reverse=True)]
        losses[f"{layer}"] = [0.0, *sorted(rng.uniform(0, 1, count) ** 3)]
    least = sum(min(cost) for cost in costs.values())
    return losses, Bound("cost", costs, least + (len(costs) - least) * float(rng.uniform()))


# With these HiGHS 1.12, as scipy 1.17 has it, prints a line.
@pytest.mark.parametrize("seed", [39, 73, 145])
def test_nothing_is_printed(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    losses, bound = _instance(seed)
    choice = select(losses, [bound])
    assert sum(bound.costs[name][i] for name, i in choice.items()) <= bound.most * (1 + 1e-6)
    assert capfd.readouterr().out == ""


def test_standard_output_is_put_back(capfd: pytest.CaptureFixture[str]) -> None:
    losses, bound = _instance(0)
    select(losses, [bound])
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
