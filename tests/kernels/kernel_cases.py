"""Kernels run in memory that shows every wrong access, and what they should have computed.

The numbers of a case are small integers times one power of two, so that every sum in float32 is
exact: a result is either right to the last bit or wrong.
"""

import ctypes
import functools
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from compare import assert_close
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupconv.kernels import kernel
from groupconv.kernels.blocks import blocks
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.module import ARGUMENTS, LAYOUT, RECORD
from groupconv.kernels.spec import ACTIVATIONS, RESIDUALS, ConvSpec, KernelSpec
from groupconv.kernels.tile import Tile, has_total, strips, sum_channels

# The same examples in every run. A failure is shown as it is: to make it smaller takes minutes.
SWEEP = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
# Channels, columns of output, and multiply-adds in the code of a case at most.
_CHANNELS, _COLUMNS, _CODE = 80, 16, (16, 32, 64, 200)
# The same, where sums are long and so is the code of one pixel.
_LONG_CHANNELS, _LONG_CODE = 400, (60, 200, 900)
# Kernels and widths whose sums are more than one chain, of one chunk or of several.
_LONG = (
    ((3, 3), 15, 96),
    ((5, 5), 6, 60),
    ((2, 5), 26, 40),
    ((2, 7), 10, 40),
    ((3, 1), 43, 200),
    ((1, 11), 12, 40),
    ((1, 19), 7, 16),
    ((4, 33), 1, 9),
    ((1, 1), 129, 300),
)
# Size of the integers that numbers are made of.
_INTEGER = 31
_MARGIN = 2048
# The function at ``Kernel.work``.
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_POSITION = {name: i for i, name in enumerate(ARGUMENTS)}


@dataclass(frozen=True)
class Case:
    """A kernel and how it is called.

    Args:
        start: row and column of the written tensor where the first output goes.
        threads: that are asked for.
        direct: whether the work function is called for each of them, not the kernel.
    """

    spec: KernelSpec
    tile: Tile
    images: int = 1
    start: tuple[int, int] = (0, 0)
    threads: int = 1
    direct: bool = False


@dataclass(frozen=True)
class Numbers:
    """What a kernel is given: NCHW in float32, whatever the layout of the case."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    order: Tensor | None


def legal_channels(conv: ConvSpec) -> list[int]:
    """What ``Tile.channels`` may be, the least first."""
    width, chunk = conv.in_channels // conv.groups, sum_channels(conv)
    return [n for n in range(chunk, width + 1, chunk) if width % n == 0]


# Strategies.


@st.composite
def convs(draw: st.DrawFn, long: bool | None = None) -> ConvSpec:
    """Convolutions of one image, of every kind that a kernel takes.

    Args:
        long: whether sums are more than one chain; some are where it is None.
    """
    if draw(st.sampled_from([False, False, True])) if long is None else long:
        return draw(_long_convs())
    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 80]))
    widths = st.integers(1, _CHANNELS // groups)
    if draw(st.booleans()):
        widths = st.integers(1, min(9, _CHANNELS // groups))
    wide_in, wide_out = draw(widths), draw(widths)
    axes = [draw(_axes(most)) for most in (12, _COLUMNS)]
    return _conv(groups, wide_in, wide_out, axes)


@st.composite
def _long_convs(draw: st.DrawFn) -> ConvSpec:
    """Convolutions whose sums are more than one chain."""
    kernel_size, least, most = draw(st.sampled_from(_LONG))
    # Few channels more often: several lines of many are too much code.
    wide_in = draw(st.integers(least, draw(st.sampled_from([min(most, least + 5), most]))))
    groups = draw(st.sampled_from([1, 2, 4, 5, 8, 9, 17]))
    groups = max(1, min(groups, _LONG_CHANNELS // wide_in))
    # Narrow outputs of several groups share a vector.
    wide_out = draw(st.integers(1, 2 if groups > 2 else 40))
    columns = draw(st.sampled_from([1, 2, 7]))
    axes = [draw(_axes(outputs, k)) for outputs, k in zip((6, columns), kernel_size, strict=True)]
    return _conv(groups, wide_in, wide_out, axes)


_Axis = tuple[int, int, int, tuple[int, int], int]


def _conv(groups: int, wide_in: int, wide_out: int, axes: list[_Axis]) -> ConvSpec:
    size, kernel_size, stride, padding, dilation = zip(*axes, strict=True)
    return ConvSpec(
        1, groups * wide_in, groups * wide_out, size, kernel_size, stride, padding, dilation, groups
    )


@st.composite
def _axes(draw: st.DrawFn, most: int, k: int | None = None) -> _Axis:
    """Size, kernel, stride, padding and dilation of one axis with 1 to ``most`` outputs."""
    size, k = draw(st.integers(1, 17)), k or draw(st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5, 6, 7]))
    stride, dilation = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    reach = dilation * (k - 1) + 1
    # Usual, cropping, and so much that whole taps lie outside.
    pads = draw(
        st.sampled_from(
            [st.integers(0, k), st.integers(-3, 4), st.integers(-size - 2, size + reach + 2)]
        )
    )
    before, after = draw(pads), draw(pads)
    outputs = (size + before + after - reach) // stride + 1
    if outputs < 1:
        after = reach - size - before + draw(st.integers(0, 4 * stride))
    elif outputs > most:
        after -= (outputs - most) * stride
    return size, k, stride, (before, after), dilation


@st.composite
def transposed(draw: st.DrawFn, dims: int) -> ConvSpec:
    """Transposed convolutions, sparse ones too."""
    axes = [draw(_transposed_axes()) for _ in range(dims)]
    size, kernel_size, stride, padding, dilation, extra = zip(*axes, strict=True)
    groups = draw(st.integers(1, 3))
    return ConvSpec(
        1, groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6)), size, kernel_size,
        stride, padding, dilation, groups, True, extra,
    )  # fmt: skip


@st.composite
def _transposed_axes(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int], int, int]:
    """Size, kernel, stride, padding, dilation and output padding of one axis."""
    size, k, stride, dilation = (draw(st.integers(1, most)) for most in (7, 5, 4, 3))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    whole = (size - 1) * stride + dilation * (k - 1) + 1 + extra
    pad = draw(st.integers(0, (whole - 1) // 2))
    return size, k, stride, (pad, pad), dilation, extra


@st.composite
def specs(draw: st.DrawFn, long: bool | None = None) -> KernelSpec:
    """Kernels of every kind, dense in memory, without a step between the outputs; ``long`` as of
    convs."""
    last_in, last_out, bias, ordered = (draw(st.booleans()) for _ in range(4))
    residual = draw(st.sampled_from([None, None, *RESIDUALS]))
    activation = draw(st.sampled_from([None, None, *ACTIVATIONS]))
    slope = draw(st.sampled_from([0.01, 0.25, 0.0, -0.5, 2.0]))
    return KernelSpec(
        draw(convs(long)), last_in, last_out, bias, residual, activation, slope,
        ordered and draw(st.booleans()),
    )  # fmt: skip


@st.composite
def sliced(draw: st.DrawFn, spec: KernelSpec) -> KernelSpec:
    """``spec`` on slices of wider tensors, where its layouts allow them."""

    def pixel(channels: int, legal: bool) -> int | None:
        more = draw(st.sampled_from([None, 0, 1, 3, 8, 33]))
        return None if more is None or not legal else channels + more

    conv, last_out = spec.conv, spec.channels_last_output
    return replace(
        spec,
        input_pixel=pixel(conv.in_channels, spec.channels_last_input),
        output_pixel=pixel(conv.out_channels, last_out),
        residual_pixel=pixel(conv.out_channels, last_out and spec.residual is not None),
    )


@st.composite
def tiles(draw: st.DrawFn, spec: KernelSpec, target: Machine) -> Tile:
    """Every legal tile of ``spec``, but for those whose code would be long."""
    conv = spec.conv
    legal = legal_channels(conv)
    narrow = target.lanes == 16 and draw(st.booleans())
    if narrow:
        target = replace(target, lanes=8)
    vectors, lines = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 3, 4]))
    pixels = draw(st.integers(1, 14))
    most = draw(st.sampled_from(_LONG_CODE if has_total(conv) else _CODE))
    while pixels > 1 and _code(conv, target, pixels, vectors, lines) > most:
        pixels -= 1
    # What costs least is given up first.
    for vectors, lines in ((vectors, lines), (1, lines), (1, min(2, lines)), (1, 1)):  # noqa: B020
        if _code(conv, target, pixels, vectors, lines) <= most:
            break
    return Tile(
        pixels,
        vectors,
        rows=lines * draw(st.integers(1, conv.output_size[0] // lines + 2)),
        channels=draw(st.sampled_from([legal[-1], *legal])),
        blocks=1 if spec.staged else draw(st.sampled_from([1, 1, 2, 3, 6, 100])),
        lines=lines,
        ahead=draw(st.booleans()),
        narrow=narrow,
    )


def _code(conv: ConvSpec, target: Machine, pixels: int, vectors: int, lines: int) -> int:
    """Multiply-adds in the code of a tile."""
    total = 0
    for block in blocks(conv, target.lanes, vectors):
        channels = 1 if block.scalar else block.width
        rows = conv.kernel_size[0] * lines + 1 if lines > 1 else 1
        total += len(block.vectors) * channels * rows * conv.kernel_size[1]
    return total * sum(strip.size for strip in strips(conv, pixels))


@st.composite
def cases(draw: st.DrawFn, target: Machine, long: bool | None = None) -> Case:
    """A kernel for ``target``, and how it is called; ``long`` as of convs."""
    spec = draw(specs(long))
    start = (0, 0)
    if draw(st.sampled_from([False, False, True])):
        step = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (2, 3)]))
        start = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        rows, columns = (
            first + (n - 1) * s + 1 + draw(st.integers(0, 2))
            for first, n, s in zip(start, spec.conv.output_size, step, strict=True)
        )
        spec = replace(spec, step=step, written_size=(rows, columns))
    if draw(st.booleans()):
        spec = draw(sliced(spec))
    images, threads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    return Case(spec, draw(tiles(spec, target)), images, start, threads, draw(st.booleans()))


@st.composite
def alike(draw: st.DrawFn, target: Machine, long: bool, count: int = 3) -> list[Case]:
    """One kernel, cut in several ways."""
    case = draw(cases(target, long))
    return [
        replace(case, tile=draw(tiles(case.spec, target)), threads=draw(st.integers(1, 3)))
        for _ in range(count)
    ]


def numbers(case: Case, seed: int = 0) -> Numbers:
    """Integers times a power of two, such that sums are about as large as activations bend."""
    spec, conv = case.spec, case.spec.conv
    generator = torch.Generator().manual_seed(seed)
    inputs = math.prod(conv.weight_shape[1:])
    # The largest sum is then exact.
    assert inputs * _INTEGER**2 < 2**23
    unit = 2.0 ** round(math.log2(3 / (math.sqrt(inputs) * (_INTEGER / 1.7) ** 2)))

    def integers(*size: int) -> Tensor:
        found = torch.randint(1, _INTEGER + 1, size, generator=generator).float()
        return found * (torch.randint(0, 2, size, generator=generator) * 2 - 1)

    size = (case.images, conv.out_channels, *spec.output_tensor_size)
    return Numbers(
        integers(case.images, conv.in_channels, *conv.input_size),
        integers(*conv.weight_shape) * unit,
        integers(conv.out_channels) * (_INTEGER * unit) if spec.bias else None,
        integers(*size) * (_INTEGER * unit) if spec.residual else None,
        torch.randperm(conv.in_channels, generator=generator) if spec.ordered else None,
    )


def rounded_numbers(case: Case, seed: int = 0) -> Numbers:
    """Numbers whose sums depend on every rounding."""
    spec, conv = case.spec, case.spec.conv
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Numbers(
        normal(case.images, conv.in_channels, *conv.input_size),
        normal(*conv.weight_shape) / math.sqrt(math.prod(conv.weight_shape[1:])),
        normal(conv.out_channels) if spec.bias else None,
        normal(case.images, conv.out_channels, *spec.output_tensor_size) if spec.residual else None,
        torch.randperm(conv.in_channels, generator=generator) if spec.ordered else None,
    )


# What is right.

_ACTIVATION: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "silu": lambda x, _: F.silu(x),
    "hardswish": lambda x, _: F.hardswish(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "sigmoid": lambda x, _: torch.sigmoid(x),
}


def activated(spec: KernelSpec, x: Tensor) -> Tensor:
    """PyTorch's activation."""
    return _ACTIVATION[spec.activation](x, spec.slope)


def convolved(
    conv: ConvSpec, x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """PyTorch's convolution of the image as padding and cropping leave it."""
    pads = list(reversed(conv.padding))
    # F.pad crops no more than there is: zeros are put around first, to be cropped again.
    room = [max(0, -before, -after) for before, after in pads]
    wide = F.pad(x.to(dtype), [r for r in room for _ in range(2)])
    wide = F.pad(wide, [n - r for pair, r in zip(pads, room, strict=True) for n in pair])
    functions: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
    function = functions[len(conv.input_size) - 1]
    return function(
        wide, weight.to(dtype), stride=conv.stride, dilation=conv.dilation, groups=conv.groups
    )


def written(case: Case) -> tuple[slice, ...]:
    """Where the outputs lie in the tensor that is written to."""
    spec = case.spec
    axes = zip(case.start, spec.conv.output_size, spec.step, strict=True)
    return (..., *(slice(first, first + (n - 1) * s + 1, s) for first, n, s in axes))


def truth(case: Case, given: Numbers) -> Tensor:
    """The written tensor in float64, NaN where nothing is written."""
    spec, conv = case.spec, case.spec.conv
    x = given.x if given.order is None else given.x[:, given.order]
    result = convolved(conv, x, given.weight)
    if given.bias is not None:
        result = result + given.bias.double()[:, None, None]
    before, after = (
        given.residual[written(case)].double()
        if given.residual is not None and spec.residual == place
        else 0
        for place in RESIDUALS
    )
    size = (len(x), conv.out_channels, *spec.output_tensor_size)
    whole = torch.full(size, math.nan, dtype=torch.float64)
    whole[written(case)] = activated(spec, result + before) + after
    return whole


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors hold the same bits; NaN is then equal to itself."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def check(case: Case, y: Tensor, expected: Tensor) -> None:
    """Fail unless ``y`` is right, and untouched where nothing is written."""
    exact = case.spec.activation in (None, "relu", "relu6")
    rtol, atol = (0.0, 0.0) if exact else (1e-6, 1e-12)
    if not exact and case.spec.residual == "after":
        # The sum may be much less than what is added; the least number of either is some 1e-3.
        atol = 1e-5
    assert_close(y, expected, rtol=rtol, atol=atol, equal_nan=True)


# Memory.


class Memory(Protocol):
    """Places tensors where wrong accesses show."""

    def put(self, values: Tensor, fixed: bool = True) -> Tensor:
        """A 1-d copy of ``values``; where ``fixed``, nobody may write to it."""

    def check(self) -> None:
        """Fail if something was written where nobody may write."""


def _poison(tensor: Tensor) -> Tensor:
    # An index that is out of range, but not by far.
    return tensor.fill_(math.nan if tensor.is_floating_point() else -1)


@dataclass
class Margins:
    """Puts tensors between margins of NaN."""

    _kept: list[tuple[Tensor, Tensor, slice]] = field(default_factory=list)

    def put(self, values: Tensor, fixed: bool = True) -> Tensor:
        # Not aligned to vectors, as with tensors that begin within another.
        first = _MARGIN + len(self._kept)
        whole = _poison(torch.empty(first + values.numel() + _MARGIN, dtype=values.dtype))
        inside = slice(first, first + values.numel())
        whole[inside] = values.reshape(-1)
        self._kept.append((whole, whole.clone(), slice(0, 0) if fixed else inside))
        return whole[inside]

    def check(self) -> None:
        for whole, before, free in self._kept:
            after = whole.clone()
            after[free] = before[free]
            same = torch.equal(after.view(torch.uint8), before.view(torch.uint8))
            assert same, "written outside of the output"


_NO_ACCESS, _FREE_ACCESS = 0, mmap.PROT_READ | mmap.PROT_WRITE


@dataclass
class Pages:
    """Puts tensors at the edge of memory that can't be accessed; a wrong access ends the process.

    Args:
        end: whether they touch it with their last element, not with their first.
    """

    end: bool
    _kept: list[tuple[mmap.mmap, int, int]] = field(default_factory=list)

    def put(self, values: Tensor, fixed: bool = True) -> Tensor:
        page = mmap.PAGESIZE
        room = max(1, -(-values.nbytes // page)) * page
        memory = mmap.mmap(-1, room + 2 * page)
        around = torch.frombuffer(
            memory, dtype=values.dtype, offset=page, count=room // values.itemsize
        )
        _poison(around)
        first = len(around) - values.numel() if self.end else 0
        inside = around[first : first + values.numel()]
        inside.copy_(values.reshape(-1))
        address = around.data_ptr()
        self._protect(address - page, page, _NO_ACCESS)
        self._protect(address + room, page, _NO_ACCESS)
        if fixed:
            self._protect(address, room, mmap.PROT_READ)
        self._kept.append((memory, address, room))
        return inside

    def check(self) -> None:
        """The memory itself has."""

    def free(self) -> None:
        for _, address, room in self._kept:
            self._protect(address, room, _FREE_ACCESS)

    @staticmethod
    def _protect(address: int, size: int, access: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
            raise OSError(ctypes.get_errno(), "mprotect")


# Running.


# What lies between the pixels of slices: a NaN that no arithmetic makes.
_GAP = torch.tensor([0x7FDEAD01], dtype=torch.int32).view(torch.float32)


def laid_out(tensor: Tensor, channels_last: bool, pixel: int = 0) -> Tensor:
    """The elements of an NCHW tensor in the order of memory, and a poison where pixels that lie
    ``pixel`` elements apart leave a gap; none follows the last pixel."""
    if not channels_last:
        return tensor.reshape(-1)
    n, c, *space = tensor.shape
    if pixel <= c:
        return tensor.movedim(1, -1).reshape(-1)
    wide = _GAP.expand(n, *space, pixel).clone()
    wide[..., :c] = tensor.movedim(1, -1)
    return wide.reshape(-1)[: max(0, wide.numel() - (pixel - c))]


def from_layout(flat: Tensor, size: tuple[int, ...], channels_last: bool, pixel: int = 0) -> Tensor:
    """The tensor of size NCHW that lies in ``flat``."""
    if not channels_last:
        return flat.reshape(size)
    _, c, *space = size
    pixel = max(pixel, c)
    strides = [pixel * math.prod(space[i + 1 :]) for i in range(len(space))]
    return flat.as_strided(size, (pixel * math.prod(space), 1, *strides))


def check_gaps(flat: Tensor, size: tuple[int, ...], pixel: int) -> None:
    """Fail if something was written between the pixels of an NHWC tensor."""
    if pixel > size[1]:
        clean = laid_out(from_layout(flat, size, True, pixel), True, pixel)
        assert same_bits(flat, clean), "written between pixels"


@functools.lru_cache(maxsize=256)
def made(spec: KernelSpec, tile: Tile, target: Machine) -> Kernel:
    """The kernel, compiled and loaded past the code cache."""
    return kernel.load(spec, target, tile, kernel.compile(spec, target, tile))


def run(case: Case, target: Machine, given: Numbers, memory: Memory | None = None) -> Tensor:
    """What the kernel writes, NCHW; fails if it writes anything else."""
    spec, conv = case.spec, case.spec.conv
    memory = memory or Margins()
    built = made(spec, case.tile, target)
    size = (len(given.x), conv.out_channels, *spec.output_tensor_size)
    last_in, last_out = spec.channels_last_input, spec.channels_last_output
    y = memory.put(laid_out(torch.full(size, math.nan), last_out, spec.output_stride), fixed=False)
    residual = given.residual
    if residual is not None:
        residual = memory.put(laid_out(residual, last_out, spec.residual_stride))
    x = memory.put(laid_out(given.x, last_in, spec.input_stride))
    packed = memory.put(built.pack(given.weight))
    bias = None if given.bias is None else memory.put(given.bias)
    order = None if given.order is None else memory.put(given.order)
    offset = (case.start[0] * size[3] + case.start[1]) * spec.output_stride
    x = from_layout(x, tuple(given.x.shape), last_in, spec.input_stride)
    record, _ = built.arguments(x, packed, bias, y, residual, order, offset)
    values = list(LAYOUT.unpack(record))
    # Small kernels would otherwise stay on one thread.
    values[_POSITION["threads"]] = case.threads
    buffer = memory.put(torch.full((case.threads * built.buffer,), math.nan), fixed=False)
    values[_POSITION["buffer"]] = buffer.data_ptr()
    if case.direct:
        _work(built, values, case.threads)
    else:
        built.function(LAYOUT.pack(*values))
    memory.check()
    if last_out:
        check_gaps(y, size, spec.output_stride)
    return from_layout(y, size, last_out, spec.output_stride).clone()


def _work(built: Kernel, values: list[int], threads: int) -> None:
    """All threads' parts one after another, the last one first, on a record that none writes to."""
    record = torch.tensor(values[: len(RECORD)])
    before = record.clone()
    work = WORK(built.work)
    for thread in reversed(range(threads)):
        work(record.data_ptr(), thread, threads)
    assert torch.equal(record, before)


def verify(case: Case, target: Machine, memory: Memory | None = None) -> None:
    """Run the case and compare it with the truth."""
    given = numbers(case)
    check(case, run(case, target, given, memory), truth(case, given))


def sweep_between_pages(name: str, count: int) -> None:
    """Run ``count`` cases at the edge of memory; prints each, so that the last one is known."""
    target = next(target for target in runnable() if target.name == name)

    @settings(SWEEP, max_examples=count)
    @given(case=cases(target))
    def sweep(case: Case) -> None:
        print(case, flush=True)
        for end in (False, True):
            pages = Pages(end)
            try:
                verify(case, target, pages)
            finally:
                pages.free()

    sweep()
