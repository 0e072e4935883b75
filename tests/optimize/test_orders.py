"""Claims on spaces, and the numbering of groups."""

from groupconv.optimize.orders import Orders, exact_orders
from groupconv.optimize.spaces import Axis, Space

EIGHT = Axis((0,) * 8, tuple(range(8)), (0,) * 8)
TWO_OF_FOUR = Axis((0,) * 4 + (1,) * 4, (0, 1, 2, 3) * 2, (0,) * 8)
DOUBLED = Axis((0,) * 8, (0, 1, 2, 3) * 2, (0,) * 4 + (1,) * 4)


def groups(channels: tuple[int, ...], count: int) -> list[set[int]]:
    width = len(channels) // count
    return [set(channels[i : i + width]) for i in range(0, len(channels), width)]


def test_a_free_space_takes_the_order() -> None:
    orders = Orders([Space(8, None)])
    assert orders.free(EIGHT)
    assert orders.claim(EIGHT, (5, 0, 3, 6, 1, 7, 2, 4), 2)
    assert orders.channels(EIGHT) == (5, 0, 3, 6, 1, 7, 2, 4)
    assert not orders.free(EIGHT)
    # The same channels in each group, in another order.
    assert orders.claim(EIGHT, (0, 3, 5, 6, 7, 4, 2, 1), 2)
    assert not orders.claim(EIGHT, (0, 1, 2, 3, 4, 5, 6, 7), 2)


def test_a_fixed_space_keeps_its_order() -> None:
    orders = Orders([Space(8, "output of the network")])
    assert not orders.free(EIGHT)
    assert orders.claim(EIGHT, (3, 2, 1, 0, 7, 6, 5, 4), 2)
    assert not orders.claim(EIGHT, (4, 2, 1, 0, 7, 6, 5, 3), 2)
    assert orders.orders == {}


def test_a_concatenation_moves_within_its_segments() -> None:
    orders = Orders([Space(4, None)] * 2)
    assert not orders.claim(TWO_OF_FOUR, (0, 4, 1, 5, 2, 6, 3, 7), 2)
    assert orders.orders == {}
    assert orders.claim(TWO_OF_FOUR, (2, 0, 3, 1, 7, 5, 4, 6), 4)
    assert groups(orders.channels(TWO_OF_FOUR), 4) == [{0, 2}, {1, 3}, {5, 7}, {4, 6}]


def test_two_places_of_one_channel_move_together() -> None:
    orders = Orders([Space(4, None)])
    assert not orders.claim(DOUBLED, (0, 2, 1, 3, 4, 5, 6, 7), 4)
    assert orders.claim(DOUBLED, (0, 2, 1, 3, 4, 6, 5, 7), 4)
    assert orders.channels(DOUBLED) == (0, 2, 1, 3, 4, 6, 5, 7)


def test_exact_orders() -> None:
    free, fixed = [Space(4, None)] * 2, [Space(4, None), Space(4, "fixed")]
    swapped = (1, 0, 2, 3, 4, 5, 7, 6)
    assert exact_orders(free, TWO_OF_FOUR, swapped) == {0: (1, 0, 2, 3), 1: (0, 1, 3, 2)}
    assert exact_orders(fixed, TWO_OF_FOUR, swapped) is None
    assert exact_orders(fixed, TWO_OF_FOUR, (1, 0, *range(2, 8))) is not None
    assert exact_orders(free, TWO_OF_FOUR, (4, 1, 2, 3, 0, 5, 6, 7)) is None
    assert exact_orders(free, DOUBLED, swapped) is None
