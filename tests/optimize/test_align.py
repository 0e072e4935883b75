"""Orders that several layers share: exact gains, a loss that never rises, planted orders found."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork

from groupconv.kernels.spec import legal_groups
from groupconv.optimize.align import GroupedLayer, _sides, align
from groupconv.optimize.convert import convert
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.schur import Regression
from groupconv.optimize.spaces import Axis, Space
from groupconv.optimize.trace import trace

X = torch.randn(2, 3, 8, 8)


def regression(weight: np.ndarray, taps: int, seed: int, mixed: bool = True) -> Regression:
    """Outputs that are a matrix times inputs, the inputs correlated or nearly independent."""
    rng, d = np.random.default_rng(seed), weight.shape[1]
    u = rng.normal(size=(8 * d, d))
    if mixed:
        u = u @ rng.normal(size=(d, d))
    h = torch.from_numpy(u.T @ u) / len(u) + 1e-3 * torch.eye(d, dtype=torch.float64)
    w = torch.from_numpy(weight)
    t = w @ h
    return Regression(torch.cat([h, t.T], 1), float((t * w).sum()), taps, len(w))


def random_problem(seed: int, in_channels: int, out_channels: int, taps: int = 1) -> Regression:
    rng = np.random.default_rng(seed)
    shape = (out_channels, in_channels * taps)
    return regression(rng.normal(size=shape) * rng.random(shape) ** 3, taps, seed)


def whole(space: int, channels: int) -> Axis:
    return Axis((space,) * channels, tuple(range(channels)), (0,) * channels)


def shuffled(channels: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(channels).tolist())


def in_orders(layers: Sequence[GroupedLayer], orders: Orders) -> dict[str, Partition]:
    """The partitions that the present orders of the spaces give."""
    return {
        layer.name: Partition(
            layer.partition.groups,
            layer.partition.in_order if layer.inputs is None else orders.channels(layer.inputs),
            layer.partition.out_order if layer.outputs is None else orders.channels(layer.outputs),
        )
        for layer in layers
    }


def weighted(layers: Sequence[GroupedLayer], partitions: dict[str, Partition]) -> float:
    return sum(layer.weight * layer.problem.loss(partitions[layer.name]) for layer in layers)


def placed(
    orders: Orders, name: str, problem: Regression, groups: int,
    inputs: Axis | None, outputs: Axis | None, weight: float = 1.0,
) -> GroupedLayer:  # fmt: skip
    """A layer in the orders of its spaces; sides without one in random order."""
    sides = [
        shuffled(count, len(name)) if axis is None else orders.channels(axis)
        for axis, count in ((inputs, problem.in_channels), (outputs, problem.out_channels))
    ]
    return GroupedLayer(name, problem, Partition(groups, *sides), inputs, outputs, weight)


def three_layers(seed: int, taps: int = 1) -> tuple[Orders, list[GroupedLayer]]:
    """A producer and two consumers of eight channels, of other groups and weights."""
    spaces = [Space(4, None), Space(8, None), Space(4, None), Space(8, "output of the network")]
    orders = Orders(spaces, {1: shuffled(8, seed), 2: shuffled(4, seed)})
    layers = [
        placed(orders, "a", random_problem(seed, 4, 8, taps), 4, whole(0, 4), whole(1, 8), 0.7),
        placed(orders, "b", random_problem(seed + 1, 8, 4), 2, whole(1, 8), whole(2, 4), 2.0),
        placed(orders, "c", random_problem(seed + 2, 8, 8, taps), 4, whole(1, 8), None, 0.1),
    ]
    return orders, layers


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_summed_gains_are_exact(seed: int, taps: int) -> None:
    orders, layers = three_layers(seed, taps)
    before = weighted(layers, in_orders(layers, orders))
    for space, sides in _sides(orders, layers).items():
        count = orders.spaces[space].channels
        order = orders.orders.get(space, tuple(range(count)))
        gains = sum(side.gains(torch.tensor(order)) for side in sides)
        for i, j in itertools.combinations(range(count), 2):
            swapped = list(order)
            swapped[i], swapped[j] = order[j], order[i]
            trial = Orders(orders.spaces, {**orders.orders, space: tuple(swapped)})
            gain = before - weighted(layers, in_orders(layers, trial))
            assert float(gains[i, j]) == pytest.approx(gain, rel=1e-7, abs=1e-9)
            assert float(gains[j, i]) == float(gains[i, j])


@pytest.mark.parametrize("taps", [1, 3])
def test_gains_stay_exact_while_channels_move(taps: int) -> None:
    """The groups are kept by up- and down-dates; made anew they say the same."""
    orders, layers = three_layers(5, taps)
    sides = _sides(orders, layers)[1]
    order = list(orders.orders[1])
    for i, j in ((0, 5), (2, 7), (5, 6), (1, 3)):
        for side in sides:
            side.swap([(order[i], order[j])])
        order[i], order[j] = order[j], order[i]
    moved = Orders(orders.spaces, {**orders.orders, 1: tuple(order)})
    partitions = in_orders(layers, moved)
    fresh = [placed(moved, x.name, x.problem, x.partition.groups, x.inputs, x.outputs, x.weight)
             for x in layers]  # fmt: skip
    assert in_orders(fresh, moved) == partitions
    for side, other in zip(sides, _sides(moved, fresh)[1], strict=True):
        actual, expected = (s.gains(torch.tensor(order)) for s in (side, other))
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([1, 2]), st.integers(1, 12))
def test_loss_never_rises_and_the_result_says_what_the_orders_do(
    seed: int, taps: int, rounds: int
) -> None:
    orders, layers = three_layers(seed, taps)
    before = weighted(layers, in_orders(layers, orders))
    shorter = Orders(orders.spaces, orders.orders)
    between = weighted(layers, align(shorter, layers, rounds=rounds))
    partitions = align(orders, layers, rounds=rounds + 5)
    assert partitions == in_orders(layers, orders)
    assert weighted(layers, partitions) <= between + 1e-12 <= before + 2e-12
    for space, order in orders.orders.items():
        assert sorted(order) == list(range(orders.spaces[space].channels))


@pytest.mark.parametrize("seed", range(4))
def test_no_swap_is_left(seed: int) -> None:
    orders, layers = three_layers(seed)
    found = weighted(layers, align(orders, layers, rounds=200))
    for space, count in ((0, 4), (1, 8), (2, 4)):
        order = orders.orders.get(space, tuple(range(count)))
        for i, j in itertools.combinations(range(count), 2):
            swapped = list(order)
            swapped[i], swapped[j] = order[j], order[i]
            trial = Orders(orders.spaces, {**orders.orders, space: tuple(swapped)})
            assert weighted(layers, in_orders(layers, trial)) > found - 4e-6


def test_no_rounds_change_nothing() -> None:
    orders, layers = three_layers(1)
    before = dict(orders.orders)
    assert align(orders, layers, rounds=0) == in_orders(layers, orders)
    assert orders.orders == before


def planted(order: Sequence[int], rows: Sequence[int], groups: int, seed: int) -> np.ndarray:
    """Blocks on the runs of the two orders, zeros elsewhere."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((len(rows), len(order)))
    for inputs, outputs in zip(
        np.split(np.array(order), groups), np.split(np.array(rows), groups), strict=True
    ):
        weight[np.ix_(outputs, inputs)] = rng.normal(size=(len(outputs), len(inputs)))
    return weight


@pytest.mark.parametrize("seed", range(5))
def test_an_order_planted_in_producer_and_consumers_is_found(seed: int) -> None:
    """Groups of four, two and eight on sixteen channels, whose orders are nested in one."""
    count, order, same = 16, shuffled(16, seed), tuple(range(16))
    spaces = [Space(count, "input"), Space(count, None), Space(count, "output")]
    orders = Orders(spaces, {1: shuffled(count, seed + 100)})
    fixed_in, between, fixed_out = (whole(space, count) for space in range(3))
    layers = []
    for name, groups, inputs, outputs in (
        ("producer", 4, fixed_in, between), ("two", 2, between, fixed_out),
        ("eight", 8, between, fixed_out),
    ):  # fmt: skip
        sides = (same, order) if name == "producer" else (order, same)
        problem = regression(planted(*sides, groups, seed), 1, seed, mixed=False)
        layers.append(placed(orders, name, problem, groups, inputs, outputs))
    before = weighted(layers, in_orders(layers, orders))
    partitions = align(orders, layers, rounds=100)
    assert before > 1.0
    assert weighted(layers, partitions) < 1e-9
    for layer in layers:
        width = count // layer.partition.groups
        runs = [set(orders.orders[1][i : i + width]) for i in range(0, count, width)]
        assert runs == [set(order[i : i + width]) for i in range(0, count, width)]


@pytest.mark.parametrize("seed", range(5))
def test_a_residual_sum_gives_one_order_to_all(seed: int) -> None:
    """Two layers write the sum and two read it; the first to come had other plans."""
    count, order, same = 12, shuffled(12, seed), tuple(range(12))
    spaces = [Space(count, "input"), Space(count, None), Space(count, "output")]
    orders = Orders(spaces, {1: shuffled(count, seed + 7)})
    inputs, total, outputs = (whole(space, count) for space in range(3))
    layers = [
        placed(
            orders, f"{kind} {i}",
            regression(planted(*sides, groups, 10 * seed + i), 1, seed, mixed=False),
            groups, *axes,
        )
        for kind, sides, axes in (
            ("writer", (same, order), (inputs, total)), ("reader", (order, same), (total, outputs))
        )
        for i, groups in enumerate((3, 6))
    ]  # fmt: skip
    before = weighted(layers, in_orders(layers, orders))
    partitions = align(orders, layers, rounds=100)
    assert weighted(layers, partitions) < 1e-9 < 1.0 < before


def test_the_heavier_layer_has_its_way() -> None:
    """Two consumers of one space want orders of their own."""
    one, other = shuffled(8, 1), shuffled(8, 2)
    for weights, wins in (((1.0, 1e-3), "a"), ((1e-3, 1.0), "b")):
        orders = Orders([Space(8, None), Space(8, "output")])
        layers = [
            placed(
                orders, name, regression(planted(order, range(8), 2, 0), 1, 0, mixed=False), 2,
                whole(0, 8), whole(1, 8), weight,
            )
            for name, order, weight in zip("ab", (one, other), weights, strict=True)
        ]  # fmt: skip
        partitions = align(orders, layers, rounds=50)
        losses = {x.name: x.problem.loss(partitions[x.name]) for x in layers}
        assert losses[wins] < 1e-9
        assert max(losses.values()) > 0.05


def test_explicit_sides_stay_as_they_are() -> None:
    orders = Orders([Space(8, None), Space(8, None)], {0: shuffled(8, 0), 1: shuffled(8, 1)})
    layers = [
        placed(orders, "a", random_problem(0, 8, 8), 2, None, whole(1, 8)),
        placed(orders, "bb", random_problem(1, 8, 8), 4, whole(1, 8), None),
    ]
    before = dict(orders.orders)
    partitions = align(orders, layers, rounds=50)
    assert partitions["a"].in_order == layers[0].partition.in_order
    assert partitions["bb"].out_order == layers[1].partition.out_order
    assert partitions["a"].out_order == partitions["bb"].in_order == orders.orders[1]
    # Nothing that follows the first space is cut: nobody may move it.
    assert orders.orders[0] == before[0]
    assert orders.orders[1] != before[1]


def test_spaces_with_several_slots_and_fixed_ones_stay() -> None:
    doubled = Axis((0,) * 8, (0, 1, 2, 3) * 2, (0,) * 4 + (1,) * 4)
    two = Axis((1,) * 4 + (2,) * 4, (0, 1, 2, 3) * 2, (0,) * 8)
    spaces = [Space(4, None), Space(4, None), Space(4, "input"), Space(8, None)]
    orders = Orders(spaces, {0: (2, 0, 1, 3), 1: (3, 1, 0, 2), 3: shuffled(8, 3)})
    layers = [
        placed(orders, "a", random_problem(0, 8, 8), 2, doubled, whole(3, 8)),
        placed(orders, "b", random_problem(1, 8, 8), 4, two, whole(3, 8)),
    ]
    before = dict(orders.orders)
    loss = weighted(layers, in_orders(layers, orders))
    partitions = align(orders, layers, rounds=50)
    assert weighted(layers, partitions) < loss
    assert orders.orders[0] == before[0]
    assert 2 not in orders.orders
    assert {c for c in partitions["b"].in_order[4:]} == {4, 5, 6, 7}
    assert partitions["a"].in_order == layers[0].partition.in_order


def test_a_layer_between_two_ends_of_one_space_only_gains() -> None:
    """Its two gains are not exact together, but the loss does not rise."""
    for seed in range(6):
        orders = Orders([Space(32, None)], {0: shuffled(32, seed)})
        ends = whole(0, 32)
        layer = placed(orders, "a", random_problem(seed, 32, 32), 2, ends, ends)
        before = layer.problem.loss(layer.partition)
        partitions = align(orders, [layer], rounds=50)
        assert partitions["a"].in_order == partitions["a"].out_order == orders.orders[0]
        assert layer.problem.loss(partitions["a"]) < 0.9 * before


@pytest.mark.parametrize("seed", range(8))
def test_networks_get_no_more_permutations(seed: int) -> None:
    net = RandomNetwork(seed)
    mapped, rng = trace(net, (X,)), np.random.default_rng(seed)
    orders, layers = Orders(mapped.spaces), []
    explicit = set()
    for conv in mapped.convs:
        spec = conv.spec
        legal = legal_groups(spec.in_channels, spec.out_channels)[1:]
        if spec.linear or spec.groups > 1 or spec.transposed or not legal or rng.random() < 0.2:
            continue
        groups = int(rng.choice(legal))
        wanted = [rng.permutation(n).tolist() if rng.random() < 0.7 else orders.channels(axis)
                  for n, axis in ((spec.in_channels, conv.inputs),
                                  (spec.out_channels, conv.outputs))]  # fmt: skip
        partition, absorbed_in, absorbed_out = orders.place(
            conv, Partition(groups, *map(tuple, wanted))
        )
        sides = {"order_in": absorbed_in, "order_out": absorbed_out}
        explicit |= {f"{conv.name}.{side}" for side, absorbed in sides.items() if not absorbed}
        problem = random_problem(seed, spec.in_channels, spec.out_channels)
        inputs = conv.inputs if absorbed_in else None
        outputs = conv.outputs if absorbed_out else None
        layers.append(
            GroupedLayer(conv.name, problem, partition, inputs, outputs, float(rng.random()))
        )
    before = weighted(layers, {layer.name: layer.partition for layer in layers})
    partitions = align(orders, layers, rounds=10)
    assert weighted(layers, partitions) <= before + 1e-12
    converted = convert(net, mapped, partitions)
    assert set(converted.permutations) == explicit
    for where in converted.placed:
        partition = partitions[where.conv.name]
        for found, wanted in (
            (where.channels_in, partition.in_order), (where.channels_out, partition.out_order)
        ):  # fmt: skip
            groups = [set(part) for part in np.split(np.array(found), partition.groups)]
            assert groups == [set(part) for part in np.split(np.array(wanted), partition.groups)]
