"""The numbers do not depend on threads: PyTorch's, and those that call."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kernels.kernel_cases import Case, made, rounded_numbers, run, same_bits
from torch import Tensor

from groupconv.kernels import kernel, openmp
from groupconv.kernels.candidates import candidates
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.module import ARGUMENTS, LAYOUT
from groupconv.kernels.spec import ConvSpec, KernelSpec

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)
pytestmark = pytest.mark.skipif(openmp.pool() is None, reason="PyTorch has no OpenMP here")

GROUPED = ConvSpec(1, 24, 30, (13, 11), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 6)
LONG = ConvSpec(1, 96, 30, (8, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
DENSE = ConvSpec(1, 20, 37, (8, 9), (3, 3), (2, 1), ((1, 0), (2, 1)), (1, 1), 1)
SPECS = {
    "grouped": KernelSpec(GROUPED, bias=True, activation="silu"),
    "grouped, staged": KernelSpec(GROUPED, False, False, bias=True, ordered=True),
    "dense": KernelSpec(DENSE, activation="relu"),
    "dense, staged": KernelSpec(DENSE, False, True),
    "long sums": KernelSpec(LONG, bias=True),
    "long sums, staged": KernelSpec(LONG, False, False, bias=True),
    "one task": KernelSpec(replace(GROUPED, in_channels=3, out_channels=3, groups=3)),
}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many threads as are asked for, however small the work; those of before afterwards."""
    monkeypatch.setattr(kernel, "WORTH_SHARING", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _kernel(name: str, target: Machine) -> Kernel:
    spec = SPECS[name]
    return made(spec, candidates(spec, target)[0], target)


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()


def _call(built: Kernel, x: Tensor) -> Tensor:
    spec, conv = built.spec, built.spec.conv
    generator = torch.Generator().manual_seed(7)
    packed = built.pack(torch.randn(conv.weight_shape, generator=generator))
    bias = torch.randn(conv.out_channels, generator=generator) if spec.bias else None
    order = torch.randperm(conv.in_channels, generator=generator) if spec.ordered else None
    y = torch.full((len(x), conv.out_channels, *conv.output_size), torch.nan)
    y = _layout(y, spec.channels_last_output)
    built(_layout(x, spec.channels_last_input), packed, bias, y, order=order)
    return y


def _images(spec: KernelSpec, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, spec.conv.in_channels, *spec.conv.input_size, generator=generator)


@pytest.mark.parametrize("name", SPECS)
@every_machine
def test_any_number_of_threads_and_any_batch(target: Machine, name: str) -> None:
    built = _kernel(name, target)
    x = _images(built.spec, 5)
    torch.set_num_threads(1)
    expected = _call(built, x)
    assert not expected.isnan().any()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert same_bits(_call(built, x), expected)
        for cut in ([1] * 5, [2, 3], [4, 1]):
            parts = [_call(built, part) for part in x.split(cut)]
            assert same_bits(torch.cat(parts), expected)


@pytest.mark.parametrize("name", SPECS)
@every_machine
def test_parts_of_the_work_make_up_the_whole(target: Machine, name: str) -> None:
    """The work function called directly, for more threads than there are tasks too, and the
    kernel, which asks the runtime for its threads."""
    spec = SPECS[name]
    case = Case(spec, candidates(spec, target)[0], 3)
    given = rounded_numbers(case)
    expected = run(case, target, given)
    for threads in (1, 2, 3, 7, 1000):
        assert same_bits(run(replace(case, threads=threads, direct=True), target, given), expected)
    assert same_bits(run(replace(case, threads=2), target, given), expected)


def test_threads_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch is set, but not for work that is done before others have woken."""
    built = _kernel("grouped", runnable()[0])
    x = _layout(_images(built.spec, 2), True)
    empty = torch.empty(0)

    def asked() -> int:
        record, _ = built.arguments(x, empty, None, empty)
        return LAYOUT.unpack(record)[ARGUMENTS.index("threads")]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert asked() == threads
    monkeypatch.setattr(kernel, "WORTH_SHARING", 1e9)
    assert asked() == 1


def test_an_empty_batch() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in SPECS:
            built = _kernel(name, runnable()[0])
            assert _call(built, _images(built.spec, 0)).numel() == 0


@pytest.mark.parametrize("threads", [1, 2])
@every_machine
def test_callers_do_not_meet(target: Machine, threads: int) -> None:
    """Several Python threads with different images; each has a buffer of its own."""
    torch.set_num_threads(threads)
    kernels = [_kernel(name, target) for name in SPECS]
    work = [(built, _images(built.spec, 2, seed)) for built in kernels for seed in range(4)]
    expected = [_call(built, x) for built, x in work]
    together = threading.Barrier(4)

    def caller(number: int) -> list[bool]:
        torch.set_num_threads(threads)
        together.wait()
        mine = [(number + i) % len(work) for i in range(3 * len(work))]
        return [same_bits(_call(*work[i]), expected[i]) for i in mine]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(caller, (0, 5, 10, 15)))
    assert all(all(result) for result in results)
