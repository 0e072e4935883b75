"""The fingerprint: one changed word is always seen, and nothing but the data is read."""

import ctypes
import itertools
import mmap
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from groupconv.kernels import jit
from groupconv.kernels.fingerprint import fingerprint, words
from groupconv.kernels.machine import Machine, runnable

every_machine = pytest.mark.parametrize("machine", runnable(), ids=lambda m: m.name)
# Around the words of one step on every machine (32, 64, 128), and their multiples.
LENGTHS = [*range(70), *range(120, 136), 192, 255, 256, 257, 300, 383, 384, 385, 777, 2000]
_CANARY = 0x5A5A5A5A


def state(machine: Machine, data: int, length: int) -> list[int]:
    """The fingerprint of ``length`` words at the address ``data``."""
    size = words(machine)
    found = torch.full((size + 64,), _CANARY, dtype=torch.int32)
    zeros = torch.zeros(size, dtype=torch.int32)
    assert fingerprint(machine)(data, length, zeros.data_ptr(), found.data_ptr()) == 1
    assert found[size:].eq(_CANARY).all()
    assert not zeros.any()
    return found[:size].tolist()


def numbers(length: int, seed: int = 0) -> ctypes.Array[ctypes.c_uint32]:
    draw = random.Random(seed)
    return (ctypes.c_uint32 * length)(*(draw.getrandbits(32) for _ in range(length)))


def check_every_position(machine: Machine, length: int) -> None:
    """Change each word in turn, by one bit or by many, and change it back."""
    same, draw = fingerprint(machine), random.Random(length)
    data = numbers(length, length)
    address = ctypes.addressof(data)
    expected = torch.tensor(state(machine, address, length), dtype=torch.int32)
    pointer = expected.data_ptr()
    assert same(address, length, pointer, None) == 0
    for i in range(length):
        before = data[i]
        data[i] = before ^ (1 << draw.randrange(32) if i % 2 else draw.randrange(1, 2**32))
        assert same(address, length, pointer, None) == 1, (length, i)
        data[i] = before
    assert same(address, length, pointer, None) == 0


@every_machine
@pytest.mark.parametrize("lengths", [LENGTHS[:70], LENGTHS[70:]], ids=["short", "long"])
def test_any_changed_word_is_seen(machine: Machine, lengths: list[int]) -> None:
    for length in lengths:
        check_every_position(machine, length)


@pytest.mark.slow
@every_machine
def test_any_changed_word_is_seen_at_every_length(machine: Machine) -> None:
    for length in range(2001):
        check_every_position(machine, length)


@every_machine
@pytest.mark.parametrize("length", [1, 40, 500])
def test_every_bit_of_every_word_is_seen(machine: Machine, length: int) -> None:
    data = numbers(length)
    address = ctypes.addressof(data)
    expected = torch.tensor(state(machine, address, length), dtype=torch.int32)
    for i in range(length):
        for bit in range(32):
            data[i] ^= 1 << bit
            assert fingerprint(machine)(address, length, expected.data_ptr(), None) == 1, (i, bit)
            data[i] ^= 1 << bit


@every_machine
def test_it_compares_and_stores(machine: Machine) -> None:
    """0 for the expected state; what was found is stored wherever it is asked for."""
    size, data = words(machine), torch.randn(1000)
    f = fingerprint(machine)
    expected = torch.tensor(state(machine, data.data_ptr(), 1000), dtype=torch.int32)
    found = torch.zeros(size, dtype=torch.int32)
    assert f(data.data_ptr(), 1000, expected.data_ptr(), found.data_ptr()) == 0
    assert torch.equal(found, expected)
    # Into the place of the expected one, as packing does.
    assert f(data.data_ptr(), 999, expected.data_ptr(), expected.data_ptr()) == 1
    assert expected.tolist() == state(machine, data.data_ptr(), 999)
    for i in range(size):
        other = found.clone()
        other[i] ^= 1 << i % 32
        assert f(data.data_ptr(), 1000, other.data_ptr(), None) == 1, i


@every_machine
@pytest.mark.parametrize("length", [0, 1, 31, 128, 129, 1000])
def test_equal_data_anywhere_has_equal_state(machine: Machine, length: int) -> None:
    """Weights of 16 bits may begin at any even address."""
    data = bytes(numbers(length))
    memory = ctypes.create_string_buffer(len(data) + 256)
    first = ctypes.addressof(memory)
    seen = set()
    for offset in range(0, 130, 2):
        ctypes.memset(memory, offset, len(memory))
        ctypes.memmove(first + offset, data, len(data))
        seen.add(tuple(state(machine, first + offset, length)))
    assert len(seen) == 1


@pytest.fixture
def last_page() -> Iterator[int]:
    """The address just behind a page that can be read, where a page begins that can't."""
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None, use_errno=True)
    protect: Callable[..., int] = library.mprotect
    library.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(first + size, size, 0) == 0
    yield first + size
    assert protect(first + size, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@every_machine
def test_nothing_behind_the_data_is_read(machine: Machine, last_page: int) -> None:
    for length in (*range(140), 255, 256, 257, 1000):
        data = numbers(length, length)
        place = last_page - 4 * length
        ctypes.memmove(place, data, 4 * length)
        assert state(machine, place, length) == state(machine, ctypes.addressof(data), length)


def _swap(x: Tensor, i: int, j: int) -> Tensor:
    y = x.clone()
    y[i], y[j] = x[j], x[i]
    return y


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "all signs": lambda x: -x,
    "one sign": lambda x: torch.cat([-x[:1], x[1:]]),
    "signs of a half": lambda x: torch.cat([x[:576], -x[576:]]),
    "every second sign": lambda x: x * torch.tensor([1.0, -1.0]).repeat(576),
    "neighbours swapped": lambda x: _swap(x, 500, 501),
    "swapped in a chain": lambda x: _swap(x, 0, 128),
    "ends swapped": lambda x: _swap(x, 0, 1151),
    "filters swapped": lambda x: torch.cat([x[576:], x[:576]]),
    "moved by one": lambda x: x.roll(1),
    "moved by a step": lambda x: x.roll(128),
    "backwards": lambda x: x.flip(0),
    "doubled": lambda x: 2 * x,
    "next number": lambda x: torch.nextafter(x, torch.tensor(torch.inf)),
    "one next number": lambda x: torch.cat([x[:-1], torch.nextafter(x[-1:], torch.tensor(9.0))]),
    "zero": torch.zeros_like,
    "a transposed kernel": lambda x: x.reshape(-1, 3, 3).mT.reshape(-1),
}


@every_machine
@pytest.mark.parametrize("change", CHANGES)
def test_what_people_do_to_weights_is_seen(machine: Machine, change: str) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(1152), torch.randn(1152).sign(), torch.randn(1152).round()):
        y = CHANGES[change](x).contiguous()
        if torch.equal(x, y):
            continue
        assert state(machine, x.data_ptr(), 1152) != state(machine, y.data_ptr(), 1152)


@every_machine
def test_zeros_and_their_signs(machine: Machine) -> None:
    """0.0 == -0.0, but what is packed must have the sign."""
    seen = set()
    for i in range(301):
        x = torch.zeros(300)
        x[:i] = -0.0
        seen.add(tuple(state(machine, x.data_ptr(), 300)))
    assert len(seen) == 301


@every_machine
def test_two_changed_words_are_seen(machine: Machine) -> None:
    """Every pair of distances, random changes."""
    data, draw = numbers(1000), random.Random(0)
    address = ctypes.addressof(data)
    expected = torch.tensor(state(machine, address, 1000), dtype=torch.int32)
    for _ in range(5000):
        i, j = draw.sample(range(1000), 2)
        before = data[i], data[j]
        data[i], data[j] = draw.getrandbits(32), draw.getrandbits(32)
        same = fingerprint(machine)(address, 1000, expected.data_ptr(), None) == 0
        assert same == ((data[i], data[j]) == before), (i, j)
        data[i], data[j] = before


@every_machine
def test_two_changed_bits_of_a_chain_are_seen(machine: Machine) -> None:
    """Of words that follow each other: no two bits may cancel out by construction.

    The highest bit is the one to fear: an odd factor leaves it where it is.
    """
    data, stride = numbers(1000), words(machine) - 1
    address = ctypes.addressof(data)
    expected = torch.tensor(state(machine, address, 1000), dtype=torch.int32)
    for i, first, second in itertools.product((5, 300), range(32), range(32)):
        data[i] ^= 1 << first
        data[i + stride] ^= 1 << second
        seen = fingerprint(machine)(address, 1000, expected.data_ptr(), None)
        assert seen == 1, (i, first, second)
        data[i] ^= 1 << first
        data[i + stride] ^= 1 << second


@every_machine
def test_two_signs_and_a_small_step_are_seen(machine: Machine) -> None:
    """Of two weights, one of which also moves to the next number of bfloat16."""
    stride, missed = words(machine) - 1, 0
    for seed in range(64):
        data = numbers(1000, seed)
        address = ctypes.addressof(data)
        expected = torch.tensor(state(machine, address, 1000), dtype=torch.int32)
        data[5] ^= 1 << 31
        data[5 + stride] = (data[5 + stride] ^ (1 << 31)) + (1 << 16)
        missed += fingerprint(machine)(address, 1000, expected.data_ptr(), None) == 0
    assert missed == 0


def test_another_machine_does_not_take_the_first_ones_place() -> None:
    """Their code has one name in one process."""
    x = torch.randn(1000)
    first = [state(machine, x.data_ptr(), 1000) for machine in runnable()]
    fingerprint.cache_clear()
    second = [state(machine, x.data_ptr(), 1000) for machine in reversed(runnable())]
    assert first == second[::-1]
    assert [len(s) for s in first] == [words(machine) for machine in runnable()]


def test_kept_code_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100)
    before = state(runnable()[0], x.data_ptr(), 100)

    def never(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "compile_object", never)
    fingerprint.cache_clear()
    assert state(runnable()[0], x.data_ptr(), 100) == before
