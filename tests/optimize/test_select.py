"""The integer program against every combination tried in turn."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupconv.errors import BudgetError
from groupconv.optimize.select import Bound, select

Table = dict[str, list[float]]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Table, Table, float]:
    """Losses, costs and a bound between the cheapest and the dearest choice."""
    # Whole numbers, so that sums are exact, in units from nanoseconds to GMACs.
    unit = draw(st.sampled_from([2.0**-30, 1.0, 2.0**30]))
    scale = draw(st.sampled_from([1e-4, 1.0]))
    losses: Table = {}
    costs: Table = {}
    for layer in range(draw(st.integers(1, 4))):
        rows = draw(
            st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100)), min_size=1, max_size=4)
        )
        losses[f"layer{layer}"] = [scale * loss / 1000 for loss, _ in rows]
        costs[f"layer{layer}"] = [unit * cost for _, cost in rows]
    least, most = (sum(map(pick, costs.values())) / unit for pick in (min, max))
    return losses, costs, unit * draw(st.integers(int(least), int(most)))


def total(table: Table, choice: dict[str, int]) -> float:
    return sum(table[name][i] for name, i in choice.items())


@settings(max_examples=150, derandomize=True, deadline=None)
@given(instances())
def test_against_every_combination(instance: tuple[Table, Table, float]) -> None:
    losses, costs, bound = instance
    choice = select(losses, [Bound("macs", costs, bound)])
    assert list(choice) == list(losses)
    assert total(costs, choice) <= bound * (1 + 1e-6)
    every = (
        dict(zip(losses, picked, strict=True))
        for picked in itertools.product(*(range(len(row)) for row in losses.values()))
    )
    best = min(total(losses, c) for c in every if total(costs, c) <= bound)
    # The solver stops within a millionth, or a ten-thousandth of the best.
    assert total(losses, choice) <= best * (1 + 1e-4) + 1e-6


@settings(max_examples=100, derandomize=True, deadline=None)
@given(instances())
def test_ties_against_every_combination(instance: tuple[Table, Table, float]) -> None:
    """The last candidates of all layers stand together or not at all."""
    losses, costs, bound = instance
    tie = [(name, len(row) - 1) for name, row in losses.items()]

    def whole(choice: dict[str, int]) -> bool:
        return len({choice[name] == index for name, index in tie}) == 1

    every = [
        dict(zip(losses, picked, strict=True))
        for picked in itertools.product(*(range(len(row)) for row in losses.values()))
    ]
    legal = [c for c in every if whole(c) and total(costs, c) <= bound]
    if not legal:
        with pytest.raises(BudgetError):
            select(losses, [Bound("macs", costs, bound)], [tie])
        return
    choice = select(losses, [Bound("macs", costs, bound)], [tie])
    assert whole(choice)
    assert total(costs, choice) <= bound * (1 + 1e-6)
    best = min(total(losses, c) for c in legal)
    assert total(losses, choice) <= best * (1 + 1e-4) + 1e-6


def test_layers_may_have_menus_of_different_length() -> None:
    losses = {"a": [0.0, 0.1], "b": [0.0], "c": [0.0, 0.2, 0.05]}
    costs = {"a": [5.0, 1.0], "b": [2.0], "c": [5.0, 2.0, 3.0]}
    assert select(losses, [Bound("macs", costs, 12.0)]) == {"a": 0, "b": 0, "c": 0}
    assert select(losses, [Bound("macs", costs, 10.0)]) == {"a": 0, "b": 0, "c": 2}
    assert select(losses, [Bound("macs", costs, 8.0)]) == {"a": 1, "b": 0, "c": 0}
    assert select(losses, [Bound("macs", costs, 6.0)]) == {"a": 1, "b": 0, "c": 2}
    assert select(losses, [Bound("macs", costs, 5.0)]) == {"a": 1, "b": 0, "c": 1}


def test_a_budget_that_cannot_be_met() -> None:
    losses, costs = {"a": [0.0, 0.1], "b": [0.0]}, {"a": [5.0, 1.0], "b": [2.0]}
    assert select(losses, [Bound("macs", costs, 3.0)]) == {"a": 1, "b": 0}
    message = "the budget leaves 2.9 for the macs of the layers that can change, .* need 3"
    with pytest.raises(BudgetError, match=message):
        select(losses, [Bound("macs", costs, 2.9)])
    with pytest.raises(BudgetError, match="the budget leaves -1 for the macs "):
        select(losses, [Bound("macs", costs, -1.0)])


@st.composite
def several(draw: st.DrawFn) -> tuple[Table, list[Bound]]:
    """As :func:`instances`, with bounds on three quantities of very different units."""
    sizes = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 4)))]
    whole = st.integers(1, 100)

    def table(unit: float) -> Table:
        rows = ([draw(whole) for _ in range(size)] for size in sizes)
        return {f"layer{i}": [unit * value for value in row] for i, row in enumerate(rows)}

    bounds = []
    for quantity, unit in (("latency", 2.0**-30), ("macs", 2.0**30), ("params", 1.0)):
        costs = table(unit)
        least, most = (int(sum(map(pick, costs.values())) / unit) for pick in (min, max))
        bounds.append(Bound(quantity, costs, unit * draw(st.integers(least, most))))
    return table(0.01), bounds


@settings(max_examples=150, derandomize=True, deadline=None)
@given(several())
def test_several_bounds_against_every_combination(instance: tuple[Table, list[Bound]]) -> None:
    losses, bounds = instance
    every = (
        dict(zip(losses, picked, strict=True))
        for picked in itertools.product(*(range(len(row)) for row in losses.values()))
    )
    held = [c for c in every if all(total(b.costs, c) <= b.most for b in bounds)]
    if not held:
        with pytest.raises(BudgetError, match="no choice of structures holds every bound"):
            select(losses, bounds)
        return
    choice = select(losses, bounds)
    assert all(total(b.costs, choice) <= b.most * (1 + 1e-6) for b in bounds)
    best = min(total(losses, c) for c in held)
    assert total(losses, choice) <= best * (1 + 1e-4) + 1e-6


def test_no_layers() -> None:
    assert select({}, [Bound("macs", {}, 0.0)]) == {}
    with pytest.raises(BudgetError, match="need 0"):
        select({}, [Bound("macs", {}, -1.0)])
