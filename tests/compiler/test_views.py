"""Views of channels cost nothing or a gather, and all others equal eager PyTorch too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler.eager import Function, agree, cuts, numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupconv.compiler.graph import Convolution, Host, Value
from groupconv.compiler.views import Lazy, Seen, recognise

IMAGE = numbers(2, 12, 4, 6)
LAST = IMAGE.to(memory_format=torch.channels_last)
aten = torch.ops.aten


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


ORDER = torch.tensor([3, 0, 11, 7, 1, 2, 10, 9, 4, 8, 5, 6])
BACK = torch.tensor([1, 0])
# What begins and ends as images, moves channels at most, and so has nothing for PyTorch to do.
OF_CHANNELS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda x: x.split(5, 1),
    "split by sizes": lambda x: torch.split(x, [1, 8, 3], 1),
    "chunk": lambda x: x.chunk(4, 1),
    "tensor_split": lambda x: x.tensor_split(5, 1),
    "chunk and cat": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "slice": lambda x: (x[:, 3:], x[:, :3], x[:, 2:9:3], x[:, -4:-1]),
    "narrow": lambda x: x.narrow(1, 3, 4),
    "select and unsqueeze": lambda x: x[:, 4].unsqueeze(1),
    "one channel": lambda x: x[:, 4:5],
    "shuffle": lambda x: shuffle(x, 3),
    "shuffle and back": lambda x: shuffle(shuffle(x, 3), 4),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "shuffle and chunk": lambda x: shuffle(x, 2).chunk(2, 1),
    "to NHWC and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "slice in NHWC": lambda x: x.permute(0, 2, 3, 1)[..., 2:7].permute(0, 3, 1, 2),
    "flatten and back": lambda x: x.flatten(2).unflatten(2, (4, 6)),
    "tokens and back": lambda x: x.flatten(2).mT.mT.reshape(2, 12, 4, 6),
    "groups and back": lambda x: x.view(2, 3, 4, 4, 6).flatten(1, 2),
    "group of channels": lambda x: x.view(2, 3, 4, 4, 6)[:, 1],
    "channel of groups": lambda x: x.view(2, 3, 4, 4, 6)[:, :, 1],
    "stack": lambda x: torch.stack(x.chunk(2, 1), 2).flatten(1, 2),
    "unbind and stack": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "pixel shuffle and back": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "movedim": lambda x: x.movedim(1, -1).movedim(-1, 1),
    "expand": lambda x: x[:, 3:4].expand(-1, 5, -1, -1),
    "repeated": lambda x: torch.cat([x[:, :1]] * 3, 1),
    "index_select": lambda x: x.index_select(1, ORDER),
    "index": lambda x: x[:, ORDER[3:]],
    "negative indices": lambda x: x[:, ORDER - 12],
    "of the same size": lambda x: x.view_as(x).expand_as(x).reshape(x.shape).contiguous(),
}
# What takes rows and columns.
OF_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "rows": lambda x: x[:, :, 1:3],
    "one column": lambda x: x[..., -1:],
    "one pixel": lambda x: x[:, :, 2:3, 5:],
    "every second row": lambda x: x[:, :, ::2, 1::2],
    "every third column": lambda x: x[..., 1::3],
    "nine times": lambda x: x[:, :, 1:-1, 1:-1][:, :, ::3, ::2],
    "focus": lambda x: torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
    "left and right": lambda x: x.chunk(2, 3),
}
# What moves numbers between pixels: PyTorch does.
OF_PIXELS: dict[str, Callable[[Tensor], Any]] = {
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "second image": lambda x: x[1:],
    "batch for channels": lambda x: x.transpose(0, 1),
    "rows by index": lambda x: x[:, :, BACK],
    "images by index": lambda x: x.index_select(0, BACK),
    "channels and rows by index": lambda x: x[:, BACK, BACK],
    "spread": lambda x: x[..., :1].expand(-1, -1, -1, 3),
}


@pytest.mark.parametrize("x", [IMAGE, LAST], ids=["first", "last"])
def test_views_of_channels_are_native(x: Tensor) -> None:
    check_images(OF_CHANNELS, x)


@pytest.mark.parametrize("x", [IMAGE, LAST], ids=["first", "last"])
def test_rows_and_columns_are_native(x: Tensor) -> None:
    check_images(OF_ROWS, x)


def check_images(views: dict[str, Callable[[Tensor], Any]], x: Tensor) -> None:
    def forward(conv: nn.Module, x: Tensor) -> Any:
        # From an input, from a convolution, and into one.
        seen = [view(v) for view in views.values() for v in (x, conv(x).relu())]
        leaves = [
            leaf for found in seen for leaf in (found if isinstance(found, tuple) else [found])
        ]
        return leaves, [conv(leaf) for leaf in leaves if leaf.shape == x.shape]

    torch.manual_seed(0)
    assert cuts(agree(Function(forward, nn.Conv2d(12, 12, 1)), x)) == {}


@pytest.mark.parametrize("kind", OF_PIXELS)
def test_views_of_pixels(kind: str) -> None:
    def forward(conv: nn.Module, x: Tensor) -> Any:
        return OF_PIXELS[kind](x), OF_PIXELS[kind](conv(x).relu()).relu()

    torch.manual_seed(0)
    for x in (IMAGE, LAST):
        found = cuts(agree(Function(forward, nn.Conv2d(12, 12, 3)), x))
        assert set(found.values()) <= {"moves numbers between pixels"}


def test_parts_of_planes() -> None:
    """Cut out of tensors that lie as PyTorch has them, and then read channels last."""

    def forward(conv: nn.Module, x: Tensor) -> Any:
        y = conv(x)[..., 2:7]
        return conv(y), torch.cat([y.mT, x.mT[:, :5]], 1).mT, y.flatten(1)

    torch.manual_seed(0)
    conv = nn.Conv1d(4, 4, 3, padding=1)
    assert cuts(agree(Function(forward, conv), numbers(2, 4, 9))) == {}


def test_a_shuffle_unit_has_no_views_left() -> None:
    """All of it dissolves into the convolutions around."""

    def forward(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        a, b = shuffle(first(x), 2).chunk(2, 1)
        return last(torch.cat([b, a], 1))

    torch.manual_seed(0)
    module = Function(forward, nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1))
    graph = agree(module, LAST).program(LAST).graph
    assert [type(node.operator) for node in graph.nodes] == [Convolution, Convolution]


def lazy(shape: tuple[int, ...], axis: int, *views: tuple[Any, ...]) -> Lazy:
    held = Lazy.of(Value("x", shape, axis))
    for target, *args in views:
        held = held.seen(target, *args)
    return held


@pytest.mark.parametrize(
    ("held", "seen"),
    [
        (lazy((2, 3, 4, 5), 1), Seen(None, 1)),
        (lazy((2, 3, 4, 5), 1, (aten.slice.Tensor, 1, 1, 3)), Seen((1, 2), 1)),
        (lazy((2, 3, 4, 5), 1, (aten.slice.Tensor, 2, 1, 3)), None),
        (lazy((2, 3, 4, 5), 1, (aten.permute.default, (0, 2, 3, 1))), Seen(None, 3)),
        (lazy((2, 3, 4, 5), 3, (aten.permute.default, (0, 2, 3, 1))), None),
        (lazy((2, 3, 4, 5), 3, (aten.reshape.default, (2, 60))), Seen(None, 1)),
        (lazy((2, 3, 4, 5), 1, (aten.reshape.default, (2, 60))), None),
        (lazy((2, 6, 1, 1), 1, (aten.reshape.default, (2, 6))), Seen(None, 1)),
        (lazy((2, 3, 4, 5), 1, (aten.select.int, 1, 2)), Seen((2,), 2)),
        (lazy((2, 6), 1, (aten.slice.Tensor, 1, 0, 6, 2)), Seen((0, 2, 4), 1)),
        (lazy((2, 6), 1, (aten.slice.Tensor, 0, 0, 1)), None),
        (lazy((1, 3, 2, 2), 1, (aten.pixel_unshuffle.default, 2)), None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_recognised(held: Lazy, seen: Seen | None) -> None:
    assert recognise(held) == seen


def _factors(draw: st.DrawFn, size: int, dims: int) -> list[int]:
    """A shape of ``dims`` axes with as many numbers."""
    found = []
    for _ in range(dims - 1):
        found.append(draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])))
        size //= found[-1]
    return draw(st.permutations([*found, size]))


def _step(draw: st.DrawFn, x: Tensor) -> tuple[Any, ...]:
    """A view that ``x`` can be seen through: its operator and arguments."""
    axis = draw(st.integers(0, x.ndim - 1))
    size = x.shape[axis]
    kinds = ["permute", "reshape", "slice", "select", "flatten", "shuffle", "channels", "tokens"]
    match draw(st.sampled_from(kinds)):
        case "permute":
            return aten.permute.default, tuple(draw(st.permutations(range(x.ndim))))
        case "reshape":
            shape = _factors(draw, math.prod(x.shape[1:]), draw(st.integers(1, 4)))
            return aten.reshape.default, (x.shape[0], *shape)
        case "slice":
            start = draw(st.integers(0, size - 1))
            stop = draw(st.integers(start + 1, size))
            return aten.slice.Tensor, axis, start, stop, draw(st.integers(1, 2))
        case "select" if x.ndim > 2 and axis > 0:
            return aten.select.int, axis, draw(st.integers(0, size - 1))
        case "flatten" if x.ndim > 2:
            return aten.flatten.using_ints, draw(st.integers(1, x.ndim - 1))
        case "shuffle" if x.ndim == 4:
            groups = [g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0]
            return aten.channel_shuffle.default, draw(st.sampled_from(groups))
        case "channels" if x.ndim > 2 and x.shape[1] > 1:
            return aten.slice.Tensor, 1, draw(st.integers(0, x.shape[1] - 1)), x.shape[1]
        case "tokens" if x.ndim > 2:
            return aten.transpose.int, 1, x.ndim - 1
    return aten.unsqueeze.default, draw(st.integers(0, x.ndim - 1)) if x.ndim < 4 else 0


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], bool, list[tuple[Any, ...]]]:
    """The shape of an image, whether its channels come last, and views one after another."""
    shape = tuple(draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(4))
    x, steps = torch.empty(shape), []
    for _ in range(draw(st.integers(1, 5))):
        target, *args = _step(draw, x)
        if x.ndim + (target is aten.unsqueeze.default) > 5:
            continue
        steps.append((target, *args))
        x = target(x, *args)
    return shape, draw(st.booleans()), steps


def check_chain(chain: tuple[tuple[int, ...], bool, list[tuple[Any, ...]]]) -> None:
    """As what follows an operator and comes before one, and as what is returned."""
    shape, last, steps = chain

    def forward(x: Tensor) -> Any:
        y = 2 * x
        for target, *args in steps:
            y = target(y, *args)
        return y, y + 1

    x = numbers(*shape)
    compiled = agree(Function(forward), x.to(memory_format=torch.channels_last) if last else x)
    for node in next(iter(compiled.programs.values()))[0].graph.nodes:
        if isinstance(node.operator, Host):
            assert node.operator.reason == "moves numbers between pixels"


_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_slow)
@given(chains())
def test_random_chains(chain: Any) -> None:
    check_chain(chain)


def test_channels_become_rows() -> None:
    def forward(x: Tensor) -> Tensor:
        return (2 * x).select(3, 0)[:, 2:3].permute(2, 1, 0).unsqueeze(0) + 1

    agree(Function(forward), numbers(1, 3, 3, 1))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=_slow)
@given(chains())
def test_many_random_chains(chain: Any) -> None:
    check_chain(chain)
