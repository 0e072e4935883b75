"""Where values lie: nothing that is still needed is written over, and little memory is taken."""

import itertools

import pytest
import torch

from groupconv.compiler.graph import (
    Concat,
    Convolution,
    Gather,
    Graph,
    Instruction,
    Map,
    Node,
    Softmax,
    Value,
    View,
)
from groupconv.compiler.memory import Memory, Place, plan
from groupconv.kernels.spec import ConvSpec

RELU = Map((Instruction("relu", (0,)),))
ADD = Map((Instruction("add", (0, 1)),))


def value(name: str, channels: int = 8, size: int = 4) -> Value:
    return Value(name, (1, channels, size, size))


def pointwise(into: int, out: int, size: int = 4) -> Convolution:
    conv = ConvSpec(1, into, out, (size, size), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    return Convolution(conv, torch.ones(out, into, 1, 1))


def graph(inputs: list[Value], outputs: list[Value], *nodes: tuple[object, list[Value], Value]):
    made = [Node(y.name, operator, tuple(read), y) for operator, read, y in nodes]
    return Graph(tuple(inputs), tuple(outputs), made)


def ranges(memory: Memory, place: Place) -> tuple[int, int]:
    """First and last byte of the arena in which a place lies."""
    return place.storage.offset, place.storage.offset + place.storage.size


def test_chain_needs_two_places() -> None:
    values = [value(f"v{i}") for i in range(6)]
    nodes = [(pointwise(8, 8), [a], b) for a, b in itertools.pairwise(values)]
    memory = plan(graph(values[:1], values[-1:], *nodes))
    # Of the five results the last one lies where it is returned.
    assert memory.arena == 2 * 4 * 8 * 16
    assert memory.places[values[0]].storage.kind == "input"
    assert memory.is_output(values[-1], 0)


def test_elementwise_work_is_done_in_place() -> None:
    x, a, b, c = (value(name) for name in "xabc")
    memory = plan(graph([x], [c], (pointwise(8, 8), [x], a), (RELU, [a], b), (Softmax(), [b], c)))
    assert memory.places[a] == memory.places[b]


@pytest.mark.parametrize("later", [True, False])
def test_not_in_place_while_it_is_needed(later: bool) -> None:
    x, a, b, c = (value(name) for name in "xabc")
    last = (ADD, [b, a], c) if later else (ADD, [b, b], c)
    memory = plan(graph([x], [c], (pointwise(8, 8), [x], a), (RELU, [a], b), last))
    assert (memory.places[a].storage is memory.places[b].storage) is not later


def test_inputs_are_never_written_over() -> None:
    x, a, b = (value(name) for name in "xab")
    memory = plan(graph([x], [b], (RELU, [x], a), (pointwise(8, 8), [a], b)))
    assert memory.places[a].storage is not memory.places[x].storage


def test_not_in_place_over_what_is_spread_or_shifted() -> None:
    x, a, b = value("x"), value("a"), value("b", 4)
    shifted, c = value("s", 4), value("c", 4)
    # b is channels 0 to 3 of a, and 2 to 5 are read beside them.
    memory = plan(
        graph(
            [x],
            [value("z")],
            (pointwise(8, 8), [x], a),
            (Gather((0, 1, 2, 3)), [a], b),
            (Gather((2, 3, 4, 5)), [a], shifted),
            (ADD, [b, shifted], c),
        )
    )
    assert memory.places[b].storage is memory.places[shifted].storage
    assert memory.places[c].storage is not memory.places[b].storage


def test_parts_lie_in_the_concatenation() -> None:
    x, a, b, both = value("x"), value("a", 3), value("b", 5), value("both")
    memory = plan(
        graph(
            [x],
            [value("z")],
            (pointwise(8, 3), [x], a),
            (pointwise(8, 5), [x], b),
            (Concat(), [a, b], both),
        )
    )
    storage = memory.places[both].storage
    assert memory.places[a] == Place(storage, 0, 8)
    assert memory.places[b] == Place(storage, 3, 8)


def test_what_grows_by_concatenation_is_never_copied() -> None:
    # As in a DenseNet: each concatenation is a part of the next.
    x, parts, nodes = value("x"), [value("p0", 4)], []
    nodes.append((pointwise(8, 4), [x], parts[0]))
    wide = parts[0]
    for i in range(1, 5):
        parts.append(value(f"p{i}", 4))
        nodes.append((pointwise(wide.channels, 4), [wide], parts[-1]))
        wide = value(f"wide{i}", 4 * (i + 1))
        nodes.append((Concat(), list(parts), wide))
    memory = plan(graph([x], [value("z")], *nodes))
    storage = memory.places[wide].storage
    assert [memory.places[part] for part in parts] == [
        Place(storage, 4 * i, 20) for i in range(len(parts))
    ]
    assert {p.storage for v, p in memory.places.items() if v is not x} == {storage}


def test_a_tensor_beside_itself_is_copied_once() -> None:
    x, a, both = value("x"), value("a", 4), value("both")
    memory = plan(graph([x], [value("z")], (pointwise(8, 4), [x], a), (Concat(), [a, a], both)))
    assert memory.places[a].storage is not memory.places[both].storage


def test_slices_are_views() -> None:
    x, a, b = value("x"), value("a"), value("b", 3)
    memory = plan(graph([x], [value("z")], (pointwise(8, 8), [x], a), (Gather((5, 6, 7)), [a], b)))
    assert memory.places[b] == Place(memory.places[a].storage, 5, 8)


def test_slices_keep_the_whole_alive() -> None:
    x, a, b, c, d = value("x"), value("a"), value("b", 3), value("c"), value("d", 3)
    memory = plan(
        graph(
            [x],
            [value("z")],
            (pointwise(8, 8), [x], a),
            (Gather((5, 6, 7)), [a], b),
            (pointwise(8, 8), [x], c),
            (pointwise(3, 3), [b], d),
        )
    )
    (start, stop), (first, last) = (ranges(memory, memory.places[v]) for v in (a, c))
    assert stop <= first or last <= start


def test_a_flat_view_of_a_slice_is_no_view() -> None:
    x, a, b = value("x"), value("a"), value("b", 4)
    flat = Value("flat", (1, 64))
    memory = plan(
        graph(
            [x],
            [value("z")],
            (pointwise(8, 8), [x], a),
            (Gather((0, 1, 2, 3)), [a], b),
            (View(), [b], flat),
        )
    )
    assert memory.places[flat].storage is not memory.places[a].storage


def test_an_output_behind_a_view_is_written_where_it_is_returned() -> None:
    x, a = value("x", 8, 1), value("a", 8, 1)
    flat = Value("flat", (1, 8))
    memory = plan(graph([x], [flat], (pointwise(8, 8, 1), [x], a), (View(), [a], flat)))
    assert memory.is_output(flat, 0)
    assert memory.places[a].storage is memory.places[flat].storage
