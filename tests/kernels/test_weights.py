"""Packed weights are never stale, however the numbers in a tensor were changed."""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from groupconv.kernels import dispatch, weights
from groupconv.nn import (
    GroupConv1d,
    GroupConv2d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    functional,
)


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    torch.manual_seed(0)
    dispatch._choices.clear()
    weights._entries.clear()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    dispatch._choices.clear()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: GroupConv2d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: GroupConv2d(8, 8, 3, padding=1, groups=8),
    "dense 1x1": lambda: GroupConv2d(8, 16, 1),
    "1-d": lambda: GroupConv1d(8, 8, 3, groups=4),
    "transposed": lambda: GroupConvTranspose2d(8, 8, 3, stride=2, groups=2),
    "transposed 1-d": lambda: GroupConvTranspose1d(8, 8, 2, groups=4),
    "bfloat16": lambda: GroupConv2d(8, 8, 3, groups=2).bfloat16(),
    "odd bfloat16": lambda: GroupConv2d(3, 3, 3, groups=3).bfloat16(),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def images(layer: nn.Module, size: int = 7) -> Tensor:
    shape = (2, layer.in_channels, *[size] * (layer.weight.ndim - 2))
    return torch.randn(shape, dtype=layer.weight.dtype)


def check(layer: nn.Module, x: Tensor) -> None:
    """The layer ran on a kernel of ours, and is the convolution with its present weights."""
    names: list[str] = []
    with dispatch.listening(lambda name, _: names.append(name)):
        actual = layer(x)
    assert [name.partition(" ")[0] for name in names] == ["native"]
    check_equal(actual, layer, x)


def check_equal(actual: Tensor, layer: nn.Module, x: Tensor) -> None:
    """Held against PyTorch's layer, in float64 on a copy of the weights."""
    truth = copy.deepcopy(layer).double()
    truth.__class__ = getattr(nn, type(layer).__name__.removeprefix("Group"))
    rtol = 1e-5 if x.dtype == torch.float32 else 1e-2
    assert_close(actual, truth(x.double()), rtol=rtol, atol=rtol)


def _step(make: Callable[..., torch.optim.Optimizer]) -> Callable[[Tensor], None]:
    def edit(p: Tensor) -> None:
        optimizer = make([p], lr=0.1)
        p.grad = torch.randn_like(p)
        optimizer.step()
        p.grad = None

    return edit


def _item(p: Tensor) -> None:
    p.data[0] = 3


def _last_item(p: Tensor) -> None:
    p.data.view(-1)[-1] += 1


def _one_bit(p: Tensor) -> None:
    numbers = p.data.view(-1).view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32)
    numbers[p.numel() // 2] ^= 1 << (6 if p.dtype == torch.bfloat16 else 22)


def _other_data(p: Tensor) -> None:
    p.data = torch.randn_like(p)


def _no_grad(p: Tensor) -> None:
    with torch.no_grad():
        p.add_(torch.randn_like(p))


def _copy(p: Tensor) -> None:
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def _numpy(p: Tensor) -> None:
    array = p.detach().view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).numpy()
    array[...] = array[::-1].copy()


def _inference(p: Tensor) -> None:
    with torch.inference_mode():
        p.mul_(2)


def _swap_filters(p: Tensor) -> None:
    p.data[[0, 1]] = p.data[[1, 0]]


def _flipped(p: Tensor) -> None:
    """Another order in memory, and other numbers."""
    p.data = p.detach().transpose(0, -1).contiguous().transpose(0, -1) * 2


def _with_gaps(p: Tensor) -> None:
    p.data = torch.randn(*p.shape[:-1], 2 * p.shape[-1], dtype=p.dtype)[..., ::2]


def _of_a_larger_one(p: Tensor) -> None:
    p.data = torch.randn(p.numel() + 1, dtype=p.dtype)[1:].view(p.shape)


def _saved(p: Tensor) -> None:
    """Resized away and back, as sharded training does with what it does not need."""
    p.data = p.detach().clone()
    storage, size = p.untyped_storage(), p.untyped_storage().size()
    storage.resize_(0)
    storage.resize_(size)
    p.data.copy_(torch.randn_like(p))


EDITS: dict[str, Callable[[Tensor], None]] = {
    "SGD": _step(torch.optim.SGD),
    "Adam": _step(torch.optim.Adam),
    "data[0] =": _item,
    "last item": _last_item,
    "one bit": _one_bit,
    "data.mul_": lambda p: p.data.mul_(1.5),
    "data.neg_": lambda p: p.data.neg_(),
    "data =": _other_data,
    "data = with gaps": _with_gaps,
    "data = of a larger one": _of_a_larger_one,
    "data = other order": _flipped,
    "detach().fill_": lambda p: p.detach().fill_(0.5),
    "no_grad": _no_grad,
    "copy_": _copy,
    "init": lambda p: nn.init.constant_(p, 0.25),
    "numpy": _numpy,
    "inference_mode": _inference,
    "swapped filters": _swap_filters,
    "zero": lambda p: p.data.zero_(),
    "resized": _saved,
}


@every_layer
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(kind: str, edit: str) -> None:
    layer = LAYERS[kind]()
    x = images(layer)
    check(layer, x)
    EDITS[edit](layer.weight)
    check(layer, x)
    EDITS[edit](layer.bias) if edit not in ("swapped filters", "data = other order") else None
    check(layer, x)
    with torch.no_grad():
        check(layer, x)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_forward_passes_without_gradients(edit: str) -> None:
    layer = LAYERS["grouped"]().requires_grad_(False)
    x = images(layer)
    for _ in range(3):
        EDITS[edit](layer.weight)
        check(layer, x)


def test_edits_through_a_view_of_the_same_memory() -> None:
    memory = torch.randn(2 * 8 * 4 * 9)
    weight = memory[:288].view(8, 4, 3, 3)
    x = torch.randn(1, 8, 9, 9)
    for i in range(4):
        actual = functional.group_conv2d(x, weight, groups=2)
        assert_close(actual, F.conv2d(x, weight, groups=2), rtol=1e-5, atol=1e-5)
        memory[100 * i] += 1


def test_state_dicts() -> None:
    layer, other = LAYERS["grouped"](), LAYERS["grouped"]()
    x = images(layer)
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    for state in (other.state_dict(), first, other.state_dict()):
        check(layer, x)
        layer.load_state_dict(state)
        check(layer, x)
    layer.load_state_dict(first, assign=True)
    check(layer, x)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    check(layer, x)


def test_channels_last_weights_and_back() -> None:
    layer = LAYERS["grouped"]()
    x = images(layer)
    for memory_format in (torch.channels_last, torch.contiguous_format) * 2:
        layer.to(memory_format=memory_format)
        check(layer, x)
        # The same numbers in memory, in another order of axes.
        layer.weight.data = layer.weight.data.reshape(8, 4, 9).view(8, 4, 3, 3)
        check(layer, x)
    # Equal strides do not make equal numbers, nor equal numbers in memory equal strides.
    square = GroupConv2d(3, 3, 3)
    x = images(square)
    check(square, x)
    square.weight.data = square.weight.data.transpose(2, 3)
    check(square, x)
    square.weight.data = square.weight.data.permute(1, 0, 2, 3)
    check(square, x)


def test_training() -> None:
    """Every step is seen, and nothing piles up."""
    layer = GroupConv2d(4, 4, 3, groups=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    x = images(layer)
    for _ in range(50):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        check(layer, x)
    assert len(weights._entries) == 1


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("back", [torch.float32, torch.bfloat16])
def test_another_dtype_in_place(back: torch.dtype, zero: bool) -> None:
    """``module.half()`` puts other numbers into the same parameter."""
    layer = LAYERS["grouped"]()
    if zero:
        layer.weight.data.zero_()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, back):
        layer.to(dtype)
        x = images(layer)
        names: list[str] = []
        with dispatch.listening(lambda name, _, names=names: names.append(name)):
            actual = layer(x)
        assert names[0].startswith("aten" if dtype == torch.float64 else "native")
        check_equal(actual, layer, x)


def test_zeros_of_two_bytes_are_not_zeros_of_four() -> None:
    layer = LAYERS["grouped"]().bfloat16()
    layer.weight.data.zero_()
    check(layer, images(layer))
    layer.float()
    layer.weight.data[-1] = 1
    check(layer, images(layer))


def test_no_word_behind_the_weights_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["grouped"]()
    check(layer, images(layer))
    layer.bfloat16()
    f, lengths = weights.fingerprint(), []

    def spy(data: int, words: int, *rest: object) -> int:
        lengths.append(words)
        return f(data, words, *rest)

    monkeypatch.setattr(weights, "fingerprint", lambda: spy)
    check(layer, images(layer))
    assert max(lengths) <= layer.weight.nbytes // 4


# Owners.


def test_dead_weights_leave_nothing_behind() -> None:
    x = torch.randn(1, 4, 6, 6)
    ids, addresses = set(), set()
    for _ in range(100):
        weight = torch.randn(4, 1, 3, 3)
        ids.add(id(weight))
        addresses.add(weight.data_ptr())
        actual = functional.group_conv2d(x, weight, groups=4)
        assert_close(actual, F.conv2d(x, weight, groups=4), rtol=1e-5, atol=1e-5)
        assert len(weights._entries) <= 1
    # The allocator did hand the same places out again.
    assert len(ids) < 100
    assert len(addresses) < 100
    del weight
    gc.collect()
    assert not weights._entries


def test_same_memory_under_another_tensor() -> None:
    memory = torch.randn(4, 1, 3, 3)
    x = torch.randn(1, 4, 6, 6)
    for _ in range(5):
        weight = memory.view(4, 1, 3, 3)
        actual = functional.group_conv2d(x, weight, groups=4)
        assert_close(actual, F.conv2d(x, memory, groups=4), rtol=1e-5, atol=1e-5)
        del weight
        memory.neg_()


def test_weights_that_live_on_in_a_graph() -> None:
    """Python's object goes, the tensor stays for the backward pass."""
    x = torch.randn(1, 4, 6, 6)
    base = torch.randn(4, 1, 3, 3, requires_grad=True)
    loss = torch.zeros(())
    for i in range(5):
        loss = loss + functional.group_conv2d(x, base * i, groups=4).square().sum()
    gc.collect()
    (slope,) = torch.autograd.grad(loss, base)
    other = sum(F.conv2d(x, base * i, groups=4).square().sum() for i in range(5))
    assert_close(slope, torch.autograd.grad(other, base)[0], rtol=1e-4, atol=1e-4)


def test_one_weight_of_two_layers_and_several_sizes() -> None:
    first, second = LAYERS["grouped"](), LAYERS["grouped"]()
    other = GroupConv2d(8, 8, 3, stride=2, groups=2)
    second.weight = other.weight = first.weight
    layers = [(layer, images(layer, size)) for size in (7, 9, 12) for layer in (first, other)]
    layers.append((second, images(second, 7)))
    for edit in (lambda _: None, *EDITS.values()):
        edit(first.weight)
        for layer, x in layers:
            check(layer, x)


def test_one_weight_as_convolution_and_transposed() -> None:
    weight = torch.randn(8, 4, 3, 3)
    x = torch.randn(1, 8, 7, 7)
    for _ in range(3):
        actual = functional.group_conv2d(x, weight, groups=2)
        assert_close(actual, F.conv2d(x, weight, groups=2), rtol=1e-5, atol=1e-5)
        actual = functional.group_conv_transpose2d(x, weight, groups=2)
        assert_close(actual, F.conv_transpose2d(x, weight, groups=2), rtol=1e-5, atol=1e-5)
        weight.data.roll(1)


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_used_layer(clone: str) -> None:
    layer = LAYERS["grouped"]()
    x = images(layer)
    check(layer, x)
    if clone == "deepcopy":
        other = copy.deepcopy(layer)
    elif clone == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(layer(x), other(x))
    other.weight.data.neg_()
    check(layer, x)
    check(other, x)
    del layer
    gc.collect()
    check(other, x)


def test_weight_norm() -> None:
    layer = LAYERS["grouped"]()
    plain = copy.deepcopy(layer)
    parametrizations.weight_norm(layer)
    x = images(layer)
    assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)
        assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    parametrize.remove_parametrizations(layer, "weight")
    check(layer, x)
    loss = None
    gc.collect()
    assert len(weights._entries) <= 2


def test_pruning() -> None:
    layer = LAYERS["grouped"]()
    x = images(layer)
    check(layer, x)
    for _ in range(2):
        prune.l1_unstructured(layer, "weight", amount=0.5)
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)
        assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert 0.7 < (layer.weight == 0).float().mean() < 0.8
    prune.remove(layer, "weight")
    check(layer, x)


def test_functional_call() -> None:
    layer = LAYERS["grouped"]()
    x = images(layer)
    for scale in (1.0, 2.0, 1.0):
        state = {name: scale * value.detach() for name, value in layer.named_parameters()}
        actual = torch.func.functional_call(layer, state, (x,))
        expected = F.conv2d(x, state["weight"], state["bias"], padding=1, groups=2)
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    check(layer, x)


# The store itself.


def _packer(calls: list[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def pack(weight: Tensor) -> tuple[Tensor, ...]:
        calls.append(weight)
        return (weight.clone(),)

    return pack


def test_unchanged_weights_are_packed_once() -> None:
    weight, calls = torch.randn(8, 4, 3, 3), []
    first = weights.packed(weight, "key", _packer(calls))
    for _ in range(5):
        assert weights.packed(weight, "key", _packer(calls)) is first
    assert len(calls) == 1
    weights.packed(weight, "other", _packer(calls))
    assert len(calls) == 2
    weight[0, 0, 0, 0] += 1
    assert torch.equal(weights.packed(weight, "key", _packer(calls))[0], weight)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 4, 3, 6)[..., ::2],
        torch.zeros(8, 1, 3, 3).expand(8, 4, 3, 3),
        torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16),
    ],
    ids=["gaps", "expanded", "half a word"],
)
def test_weights_that_cannot_be_watched_are_packed_each_time(weight: Tensor) -> None:
    calls: list[Tensor] = []
    for _ in range(3):
        weights.packed(weight, "key", _packer(calls))
    assert len(calls) == 3
    assert not weights._entries


@pytest.mark.parametrize("requires_grad", [False, True])
def test_packing_knows_nothing_of_gradients(requires_grad: bool) -> None:
    weight, calls = torch.randn(8, 4, 3, 3, requires_grad=requires_grad), []
    weights.packed(weight, "key", _packer(calls))
    assert not calls[0].requires_grad


def test_weights_that_change_while_they_are_packed() -> None:
    """Changed and changed back, as by the thread of an average of weights."""
    weight = torch.zeros(8, 4, 3, 3)

    def pack_in_the_middle(w: Tensor) -> tuple[Tensor, ...]:
        weight.data.fill_(1)
        result = (w.clone(),)
        weight.data.fill_(0)
        return result

    weights.packed(weight, "key", pack_in_the_middle)
    assert torch.equal(weights.packed(weight, "key", _packer([]))[0], weight)


# Threads.


def test_two_threads_call_and_a_third_changes() -> None:
    """Between calls: every result is that of the present weights."""
    layer = LAYERS["grouped"]().requires_grad_(False)
    x = images(layer)
    states = [torch.randn_like(layer.weight) for _ in range(2)]
    expected = [F.conv2d(x, w, layer.bias, padding=1, groups=2) for w in states]
    meet = threading.Barrier(3, timeout=60)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            for i in range(60):
                meet.wait()
                actual = layer(x)
                meet.wait()
                assert_close(actual, expected[i % 2], rtol=1e-5, atol=1e-5)
        except BaseException as error:
            errors.append(error)
            meet.abort()

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for i in range(60):
            layer.weight.data.copy_(states[i % 2])
            meet.wait()
            meet.wait()
    except threading.BrokenBarrierError:
        pass
    for caller in callers:
        caller.join(60)
    assert not errors, errors


def test_weights_are_exchanged_at_any_moment() -> None:
    """Each result is of the one or of the other; after the last exchange, of the last."""
    layer = LAYERS["grouped"]().requires_grad_(False)
    x = images(layer)
    states = [torch.randn_like(layer.weight) for _ in range(3)]
    expected = [F.conv2d(x, w, layer.bias, padding=1, groups=2) for w in states]
    layer.weight.data = states[0]
    going, results = True, []

    def call() -> None:
        while going:
            results.append(layer(x))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for i in range(300):
        layer.weight.data = states[i % 2]
    going = False
    for caller in callers:
        caller.join(60)
    for actual in results:
        assert any(torch.allclose(actual, e, rtol=1e-4, atol=1e-4) for e in expected[:2])
    layer.weight.data = states[2]
    assert_close(layer(x), expected[2], rtol=1e-5, atol=1e-5)
