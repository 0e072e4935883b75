"""Whole kernels against float64: exact sums, memory at its edges, the same numbers every way."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import (
    SWEEP,
    Case,
    Margins,
    Numbers,
    activated,
    alike,
    cases,
    check,
    check_gaps,
    convolved,
    from_layout,
    laid_out,
    legal_channels,
    numbers,
    rounded_numbers,
    run,
    same_bits,
    truth,
    verify,
)

from groupconv.kernels import jit
from groupconv.kernels.blocks import blocks
from groupconv.kernels.candidates import candidates
from groupconv.kernels.machine import NAMES, Machine, machine, runnable
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.tile import Tile, has_total, sum_channels

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)


def layer(
    into: int,
    out: int,
    groups: int,
    k: int,
    size: int = 9,
    padding: int | None = None,
    **rest: object,
) -> KernelSpec:
    pad = k // 2 if padding is None else padding
    conv = ConvSpec(
        1, into, out, (size, size + 2), (k, k), (1, 1), ((pad, pad),) * 2, (1, 1), groups
    )
    return KernelSpec(conv, **rest)


# Every way to bring the input in: in_channels, out_channels, groups, kernel.
WAYS = {
    "depthwise": layer(21, 21, 21, 3),
    "width 1 to 3": layer(9, 27, 9, 3),
    "width 4": layer(24, 24, 6, 3),
    "width 6 to 5": layer(24, 20, 4, 3),
    "width 10": layer(40, 40, 4, 3),
    "width 24": layer(48, 48, 2, 3),
    "dense": layer(20, 37, 1, 3),
    "pointwise": layer(20, 37, 1, 1),
    # Its sums are several chains, in vectors of several groups.
    "width 20 to 1": layer(180, 9, 9, 3),
}


# The helpers.


def _by_hand(case: Case, given: Numbers) -> torch.Tensor:
    """The truth by loops over single numbers, from the definition of a convolution."""
    spec, conv = case.spec, case.spec.conv
    n_out = conv.out_channels // conv.groups
    n_in = conv.in_channels // conv.groups
    size = (case.images, conv.out_channels, *spec.output_tensor_size)
    y = torch.full(size, torch.nan, dtype=torch.float64)
    for n, o, r, c in itertools.product(
        range(case.images), range(conv.out_channels), *map(range, conv.output_size)
    ):
        total = 0.0
        for i, ky, kx in itertools.product(range(n_in), *map(range, conv.kernel_size)):
            row = r * conv.stride[0] - conv.padding[0][0] + ky * conv.dilation[0]
            column = c * conv.stride[1] - conv.padding[1][0] + kx * conv.dilation[1]
            if 0 <= row < conv.input_size[0] and 0 <= column < conv.input_size[1]:
                channel = o // n_out * n_in + i
                if given.order is not None:
                    channel = int(given.order[channel])
                total += float(
                    given.x[n, channel, row, column] * given.weight[o, i, ky, kx].double()
                )
        place = case.start[0] + r * spec.step[0], case.start[1] + c * spec.step[1]
        if given.bias is not None:
            total += float(given.bias[o])
        added = 0.0 if given.residual is None else float(given.residual[n, o, *place])
        before = added if spec.residual == "before" else 0.0
        result = activated(spec, torch.tensor(total + before, dtype=torch.float64))
        y[n, o, *place] = result + (added - before)
    return y


SMALL = ConvSpec(1, 4, 6, (5, 4), (2, 3), (2, 1), ((1, -1), (3, 2)), (2, 1), 2)


@pytest.mark.parametrize(
    "case",
    [
        Case(KernelSpec(SMALL), Tile(1, 1, 1, 2)),
        Case(
            KernelSpec(
                SMALL, False, True, True, "before", "leaky_relu", -0.5, True, (2, 3), (4, 22)
            ),
            Tile(1, 1, 1, 2),
            2,
            (1, 2),
        ),
        Case(
            KernelSpec(
                ConvSpec(1, 2, 2, (3, 3), (2, 1), (1, 1), ((-5, 7), (9, -6)), (1, 1), 2),
                activation="hardswish",
            ),
            Tile(1, 1, 1, 1),
        ),
    ],
)  # fmt: skip
def test_truth_is_the_definition(case: Case) -> None:
    given = numbers(case)
    expected = _by_hand(case, given)
    assert not expected.isnan().all()
    assert torch.equal(truth(case, given).nan_to_num(99), expected.nan_to_num(99))


def test_the_check_rejects_planted_faults() -> None:
    """The last bit of one result, a NaN, a result that is missing, and one where none belongs."""
    spec = replace(WAYS["width 4"], step=(2, 2), written_size=(18, 22))
    case = Case(spec, Tile(4, 1, 3, 4), 2)
    target, given = runnable()[0], numbers(case)
    y, expected = run(case, target, given), truth(case, given)
    check(case, y, expected)
    for place, value in (
        ((1, 23, 16, 20), torch.nextafter(y[1, 23, 16, 20], torch.tensor(torch.inf))),
        ((0, 0, 0, 0), torch.nan),
        ((0, 5, 3, 4), 1.0),
    ):
        wrong = y.clone()
        wrong[place] = value
        with pytest.raises(AssertionError):
            check(case, wrong, expected)


def test_the_check_rejects_wrong_kernels() -> None:
    """Weights, order of channels and a tap at the border that are not those of the truth."""
    case = Case(replace(WAYS["width 6 to 5"], ordered=True, bias=True), Tile(4, 1, 3, 6))
    target, given = runnable()[0], numbers(case)
    assert given.order is not None
    assert given.bias is not None
    wrong_weight = given.weight.clone()
    wrong_weight[-1, -1, 0, 0] *= -1
    for wrong in (
        replace(given, weight=wrong_weight),
        replace(given, order=given.order.flip(0)),
        replace(given, bias=given.bias.roll(1)),
    ):
        with pytest.raises(AssertionError, match="not equal"):
            check(case, run(case, target, wrong), truth(case, given))


def test_margins_show_what_is_written_beside() -> None:
    memory = Margins()
    fixed, free = memory.put(torch.ones(5)), memory.put(torch.ones(5), fixed=False)
    free.fill_(2)
    memory.check()
    for where, element in ((fixed, 2), (free, -1), (free, 5)):
        beside = torch.as_strided(where, (1,), (1,), where.storage_offset() + element)
        before = beside.clone()
        beside.fill_(7)
        with pytest.raises(AssertionError, match="outside"):
            memory.check()
        beside.copy_(before)
    memory.check()


def test_gaps_show_what_is_written_into_them() -> None:
    size = (2, 5, 3, 2)
    flat = laid_out(torch.randn(size), True, 8)
    check_gaps(flat, size, 8)
    from_layout(flat, size, True, 8).fill_(3)
    check_gaps(flat, size, 8)
    for element, value in ((5, 0.0), (15, torch.nan)):
        wrong = flat.clone()
        wrong[element] = value
        with pytest.raises(AssertionError, match="between pixels"):
            check_gaps(wrong, size, 8)


# The sweep.


def _sweep(target: Machine, count: int) -> None:
    @settings(SWEEP, max_examples=count)
    @given(case=cases(target))
    def sweep(case: Case) -> None:
        verify(case, target)

    sweep()


@every_machine
def test_any_kernel_is_right(target: Machine) -> None:
    _sweep(target, 20)


@pytest.mark.slow
@every_machine
def test_any_kernel_is_right_long(target: Machine) -> None:
    _sweep(target, 650)


def _subprocess(code: str) -> subprocess.CompletedProcess[str]:
    """Python with the tests' own modules."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def _between_pages(count: int) -> None:
    code = "from kernels.kernel_cases import sweep_between_pages as sweep\n"
    code += "\n".join(f"sweep({target.name!r}, {count})" for target in runnable())
    done = _subprocess(code)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{done.returncode}: {last}\n{done.stderr}"
    assert len(done.stdout.splitlines()) >= count * len(runnable())


def test_nothing_outside_is_read_or_written() -> None:
    _between_pages(9)


@pytest.mark.slow
def test_nothing_outside_is_read_or_written_long() -> None:
    _between_pages(120)


def test_pages_end_the_process() -> None:
    """One byte away from what was put there, on either side."""
    done = _subprocess("""
import ctypes, os, torch
from kernels.kernel_cases import Pages

def ends(end, size, write, start, count):
    pid = os.fork()
    if pid == 0:
        inside = Pages(end).put(torch.ones(size), fixed=not write)
        at = inside.data_ptr() + start
        ctypes.memset(at, 0, count) if write else ctypes.string_at(at, count)
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

print(*(ends(end, size, write, 0, 4 * size)
        for end in (0, 1) for size in (5, 4096) for write in (0, 1)))
print(*(ends(1, size, write, 4 * size, 1) for size in (5, 4096) for write in (0, 1)))
print(*(ends(0, size, write, -1, 1) for size in (5, 4096) for write in (0, 1)))
""")
    assert done.returncode == 0, done.stderr
    right, *wrong = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert right == [0] * 8
    for codes in wrong:
        assert set(codes) <= {signal.SIGSEGV, signal.SIGBUS}


@pytest.mark.parametrize(
    ("last_in", "last_out", "size"),
    [
        (True, False, (12, 13)),
        (False, False, (9, 12)),
        (True, False, (10, 11)),
        (False, True, (12, 13)),
    ],
)
@every_machine
def test_a_part_of_a_larger_tensor(
    target: Machine, last_in: bool, last_out: bool, size: tuple[int, int]
) -> None:
    """Rows of a larger tensor, without a step between them."""
    spec = replace(
        WAYS["width 4"],
        channels_last_input=last_in,
        channels_last_output=last_out,
        residual="before",
        written_size=size,
    )
    start = (min(1, size[0] - 9), min(1, size[1] - 11))
    verify(Case(spec, Tile(4, 1, 3, 4), 2, start), target)


# Long sums of narrow groups are much code: left to the sweep.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "width 20 to 1"])
@every_machine
def test_slices_of_wider_tensors(target: Machine, way: str) -> None:
    """Input, output and residual each of its own width; with a staged side, and with both not."""
    conv = WAYS[way].conv
    spec = replace(
        WAYS[way],
        bias=True,
        residual="after",
        activation="relu",
        input_pixel=conv.in_channels + 1,
        output_pixel=conv.out_channels + 50,
        residual_pixel=conv.out_channels + 3,
    )
    tile = Tile(3, 1, 4, legal_channels(conv)[0], lines=2, ahead=True)
    verify(Case(spec, replace(tile, vectors=2, blocks=2), 2, threads=2), target)
    verify(Case(replace(spec, residual="before", ordered=True), tile, 2), target)
    planes = replace(spec, channels_last_output=False, output_pixel=None, residual_pixel=None)
    verify(Case(planes, tile, 2), target)


def _oblong(into: int, out: int, groups: int, kernel_size: tuple[int, int]) -> KernelSpec:
    pads = ((0, 1), (kernel_size[1] // 2, kernel_size[1] // 2 - 1))
    return KernelSpec(ConvSpec(1, into, out, (4, 6), kernel_size, (1, 1), pads, (1, 1), groups))


# Chunks of 1, 43, 13 and 8 channels, of a kernel row wider than a chain, and of all.
LONG = {
    "scalar, 1": layer(67, 20, 1, 3, 5),
    "scalar, 43": layer(172, 18, 2, 3, 5),
    "scalar, pointwise": layer(384, 37, 1, 1, 4),
    "vector, 13": _oblong(9 * 26, 9, 9, (2, 5)),
    "vector, 8": _oblong(5 * 16, 15, 5, (1, 9)),
    "vector, all": layer(9 * 20, 9, 9, 3, 4),
    "vector, pointwise": layer(8 * 130, 8, 8, 1, 4),
    "wider than a chain": _oblong(4, 4, 2, (2, 131)),
}


@pytest.mark.parametrize("name", LONG)
@every_machine
def test_long_sums_in_every_cut(target: Machine, name: str) -> None:
    """Right, and with rounding the same, whatever passes at a time; as NHWC and as NCHW."""
    spec = replace(LONG[name], bias=True, residual="before", activation="relu")
    assert has_total(spec.conv)
    given, results = rounded_numbers(Case(spec, Tile(1, 1, 1, 1), 1)), []
    for number, channels in enumerate(legal_channels(spec.conv)[:5]):
        for lines, pixels, vectors in ((1, 3, 2), (2, 2, 1), (3, 1, 1)):
            if lines > 1 + (not number) and name.startswith("vector"):
                # Vectors of several groups take all channels at once, and much code.
                continue
            half = target.lanes == 16 and number % 2 == 1
            tile = Tile(pixels, vectors, 2 * lines, channels, lines=lines, narrow=half)
            last = (number + lines) % 2 == 0
            now = replace(spec, channels_last_input=last, channels_last_output=last)
            case = Case(now, tile, 1, threads=1 + number % 2)
            verify(case, target)
            results.append(run(case, target, given))
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_the_sweep_reaches_long_sums() -> None:
    """In blocks of either kind, in several chunks, channels and lines."""
    target, seen = runnable()[0], set[tuple[bool, ...]]()

    @settings(SWEEP, max_examples=1500)
    @given(case=cases(target, True))
    def sweep(case: Case) -> None:
        conv, tile = case.spec.conv, case.tile
        width = conv.in_channels // conv.groups
        assert has_total(conv)
        for block in blocks(conv, tile.narrowed(target).lanes, tile.vectors):
            lines = tile.lines > 1 and conv.output_size[0] > 1
            chunks = sum_channels(conv) < width
            # Vectors of several groups take all channels, whatever the tile says.
            seen.add((block.scalar, lines, chunks, block.scalar and tile.channels < width))

    sweep()
    for scalar, lines in itertools.product((True, False), repeat=2):
        ways = {(False, False), (True, False), *([(True, True)] if scalar else [])}
        assert ways == {way[2:] for way in seen if way[:2] == (scalar, lines)}


# The same numbers every way.


@pytest.mark.parametrize("long", [False, True])
@every_machine
def test_every_cut_gives_the_same_bits(target: Machine, long: bool) -> None:
    @settings(SWEEP, max_examples=4)
    @given(ways=alike(target, long))
    def sweep(ways: list[Case]) -> None:
        given = rounded_numbers(ways[0])
        first = run(ways[0], target, given)
        assert same_bits(first, run(ways[0], target, given))
        for way in ways[1:]:
            assert same_bits(run(way, target, given), first), way.tile

    sweep()


@every_machine
def test_images_do_not_depend_on_each_other(target: Machine) -> None:
    @settings(SWEEP, max_examples=10)
    @given(case=cases(target), threads=st.integers(1, 3))
    def sweep(case: Case, threads: int) -> None:
        whole = replace(case, images=5, threads=threads)
        given = rounded_numbers(whole)
        together = run(whole, target, given)
        for n in range(5):
            rest = None if given.residual is None else given.residual[n : n + 1]
            alone = replace(given, x=given.x[n : n + 1], residual=rest)
            assert same_bits(run(case, target, alone)[0], together[n])

    sweep()


CHOSEN = {
    "width 4": WAYS["width 4"],
    "width 24": replace(WAYS["width 24"], channels_last_output=False),
    # Its channels pass in several chunks.
    "dense": layer(192, 40, 1, 7, 5),
}


@pytest.mark.parametrize("name", CHOSEN)
@every_machine
def test_every_tile_that_may_be_chosen_gives_the_same_bits(target: Machine, name: str) -> None:
    spec = CHOSEN[name]
    given = rounded_numbers(Case(spec, Tile(1, 1, 1, 1), 2))
    found = [*candidates(spec, target), *candidates(spec, target, True)[:2]]
    first, *others = (run(Case(spec, tile, 2), target, given) for tile in found)
    assert all(same_bits(other, first) for other in others)
    if name == "dense":
        assert {tile.channels for tile in found} != {192}


@every_machine
def test_a_group_alone_gives_the_same_bits(target: Machine) -> None:
    # With one vector a last group is left for itself; with two, all are together.
    groups = target.lanes // 2 + 1
    conv = ConvSpec(
        1, 2 * groups, 2 * groups, (4, 5), (3, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), groups
    )
    tiles = [Tile(2, vectors, 1, 2) for vectors in (1, 2)]
    given = rounded_numbers(Case(KernelSpec(conv), tiles[0], 9))
    one, two = (run(Case(KernelSpec(conv), tile, 9), target, given) for tile in tiles)
    assert same_bits(one, two)


# Rounding, and numbers that are none.

ACCURATE = {
    **WAYS,
    "wide 7x7": layer(14, 14, 14, 7),
    "512 inputs": layer(512, 24, 1, 1),
    "576 inputs, two groups": layer(128, 24, 2, 3),
    "4608 inputs": layer(512, 24, 1, 3, 5),
    "576 inputs, narrow groups": layer(9 * 64, 9, 9, 3, 4),
}


@pytest.mark.parametrize("name", ACCURATE)
@every_machine
def test_as_exact_as_torch(target: Machine, name: str) -> None:
    spec = replace(ACCURATE[name], bias=True, residual="before")
    for activation in (None, "silu") if name in ("width 4", "dense") else (None,):
        spec = replace(spec, activation=activation)
        case = Case(spec, candidates(spec, target)[0], 8)
        given = rounded_numbers(case)
        assert given.bias is not None
        assert given.residual is not None
        expected = truth(case, given)
        theirs = convolved(spec.conv, given.x, given.weight, torch.float32)
        theirs = activated(spec, theirs + given.bias[:, None, None] + given.residual)
        error = (run(case, target, given) - expected).abs().max()
        floor = 2.0**-24 * expected.abs().max()
        assert error <= 4 * torch.maximum((theirs - expected).abs().max(), floor)


@pytest.fixture
def flushing() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", WAYS)
@every_machine
def test_nan_and_infinities_reach_what_they_reach_in_torch(target: Machine, name: str) -> None:
    spec = replace(WAYS[name], bias=True)
    # Borders are left to the sweep: a tap outside of the image meets nothing.
    conv = replace(spec.conv, padding=((0, 0), (0, 0)))
    case = Case(replace(spec, conv=conv), Tile(3, 2, 4, conv.in_channels // conv.groups), 2)
    given = rounded_numbers(case)
    assert given.bias is not None
    for channel, value in ((0, torch.nan), (conv.in_channels // 2, torch.inf), (-1, -torch.inf)):
        given.x[0, channel, 4, 5] = value
        given.x[1, channel, channel % 7, 2] = value
    given.bias[-1] = torch.nan
    every = (None, "sigmoid", "relu", "relu6", "leaky_relu", "hardswish")
    for activation in every if name in ("width 4", "dense") else every[:2]:
        now = replace(case, spec=replace(case.spec, activation=activation))
        theirs = F.conv2d(given.x, given.weight, given.bias, groups=conv.groups)
        expected = activated(now.spec, theirs)
        actual = run(now, target, given)
        assert expected.isnan().any()
        assert torch.equal(actual.isnan(), expected.isnan())
        for infinity in (torch.inf, -torch.inf):
            assert torch.equal(actual == infinity, expected == infinity)
        assert torch.isfinite(actual).any()


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("name", ["depthwise", "width 4", "dense", "width 20 to 1"])
@every_machine
def test_subnormal_numbers(target: Machine, name: str, flush: bool) -> None:
    """They count as what they are, or as zero where PyTorch is told to take them so."""
    case = Case(WAYS[name], Tile(3, 2, 4, legal_channels(WAYS[name].conv)[0]), 1)
    given = numbers(case)
    tiny = 2.0**-149
    given = replace(given, x=given.x * tiny, weight=given.weight.sign() * 4)
    expected = truth(case, given)
    assert 0 < expected.abs().max() < 2.0**-126
    assert torch.set_flush_denormal(flush)
    actual = run(case, target, given)
    torch.set_flush_denormal(False)
    if flush:
        assert not actual.any()
    else:
        assert torch.equal(actual.double(), expected)


# Machines.


def test_the_processor_is_known() -> None:
    """What LLVM says of the processor is what the system says."""
    info = Path("/proc/cpuinfo")
    names = [target.name for target in runnable()]
    assert names == [name for name in NAMES if name in names]
    if not info.exists() or "flags" not in info.read_text():
        pytest.skip("the system does not tell the flags of an x86 processor")
    line = next(line for line in info.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    needs = {
        "avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"},
        "avx2": {"avx2", "fma"},
        "sse4.2": {"sse4_2"},
    }
    assert names == [name for name, need in needs.items() if need <= flags]


@pytest.mark.parametrize("name", NAMES)
def test_llvm_knows_every_feature(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It only warns of others, and leaves them out."""
    target = machine(name)
    text = f'target triple = "{target.triple}"\ndefine void @f() {{\n  ret void\n}}\n'
    jit.assembly(text, target)
    assert capfd.readouterr().err == ""
    jit.assembly(text, replace(target, features="+nothing"))
    assert "nothing" in capfd.readouterr().err


def test_llvm_names_what_runnable_asks_for() -> None:
    if llvm.get_process_triple().startswith("x86_64"):
        asked = {"sse4.2", "avx2", "fma", "avx512f", "avx512dq", "avx512vl", "avx512bw"}
        assert asked <= set(llvm.get_host_cpu_features())
