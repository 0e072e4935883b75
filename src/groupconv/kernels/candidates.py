"""Tiles worth measuring: a guess of the cycles that each takes, and orders that suit the memory."""

import itertools
import math
from dataclasses import replace

from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.tile import SPARE, Tile, strips, sum_channels, taps_at_once

# Cycles until a sum can be added to again; two sums are begun in each cycle.
_LATENCY, _PER_CYCLE = 5, 2
# Cycles that a load costs beside the arithmetic.
_LOAD = 0.3
# Tasks that an image should give, so that several threads end together; a single row, all of whose
# tasks read the same pixels, gives fewer.
_TASKS, _ROW_TASKS = 16, 4
# Rows of a tile at most, tiles and orders that are measured, and multiply-adds in their code.
_LINES, _MOST, _CODE = 2, 12, 1500
# Bytes of rows and of weights that should stay close to the core.
_ROWS, _WEIGHTS = 2**18, 2**18
# Products of one output that are little arithmetic.
_LITTLE = 18
# Lanes of machines whose vectors may be too wide, and the part of them left empty that is much.
_WIDE, _EMPTY = 16, 0.05
# Values in a line of memory, and input channels of a group that are asked for ahead, at most.
_LINE, _NARROW = 16, 64
# Of the nearest cache: lines in one place, and bytes after which places repeat.
_WAYS, _PAGE = 8, 4096


def candidates(
    spec: KernelSpec, machine: Machine, far: bool = False, shared: bool = True
) -> list[Tile]:
    """Tiles worth measuring, the best guess first.

    Args:
        far: whether input and output are more than the caches hold between two layers.
        shared: whether several threads share the work.
    """
    found = _kinds(spec, machine, far, shared)
    if machine.lanes >= _WIDE and _empty(spec.conv, machine.lanes) > _EMPTY:
        half = replace(machine, lanes=machine.lanes // 2)
        narrow = [
            [replace(tile, narrow=True) for tile in orders]
            for orders in _kinds(spec, half, far, shared)
        ]
        found = _in_turn(found, narrow)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))[:_MOST]


def _kinds(spec: KernelSpec, machine: Machine, far: bool, shared: bool) -> list[list[Tile]]:
    """Tiles, each in a few orders; the best guess first."""
    found = [_orders(spec, machine, tile, shared) for tile in _ranked(spec, machine)]
    if spec.staged or spec.conv.in_channels // spec.conv.groups > _NARROW:
        return found
    if _crowded(spec):
        small = [_orders(spec, machine, tile, shared)[:2] for tile in _small(spec, machine)]
        found = _in_turn(small, found)
    if far:
        ahead = [[replace(tile, ahead=True) for tile in orders[:1]] for orders in found]
        in_memory_order = [
            _orders(spec, machine, tile, shared)[:1] for tile in _in_memory_order(spec, machine)
        ]
        # All kinds in turn: which wins depends on how far.
        found = [orders[:2] for orders in _in_turn(in_memory_order, ahead, found)]
    return found


def _in_turn(*kinds: list[list[Tile]]) -> list[list[Tile]]:
    turns = itertools.zip_longest(*kinds, fillvalue=list[Tile]())
    return [orders for turn in turns for orders in turn]


def _empty(conv: ConvSpec, lanes: int) -> float:
    """The part of all lanes without an output channel where every vector ends with a group."""
    width = conv.out_channels // conv.groups
    vectors = -(-conv.groups // max(1, lanes // width)) * -(-width // lanes)
    return 1 - conv.out_channels / (vectors * lanes)


def _ranked(spec: KernelSpec, machine: Machine) -> list[Tile]:
    """For each number of vectors and lines the best number of pixels, by guessed cycles."""
    ranked: dict[Tile, float] = {}
    for vectors in (1, 2, 3, 4):
        kinds = blocks(spec.conv, machine.lanes, vectors)
        size = max(len(block.vectors) for block in kinds)
        # Several rows at once pay where each loaded input meets few sums.
        most = 1 if kinds[0].scalar or spec.conv.kernel_size[0] == 1 else _LINES
        for lines in range(1, min(most, spec.conv.output_size[0]) + 1):
            cycles = {
                pixels: sum(
                    block.count * _cycles(spec, machine, pixels, lines, block) for block in kinds
                )
                for pixels in _pixels(spec, machine, size * lines)
            }
            if not cycles:
                continue
            pixels = min(cycles, key=cycles.__getitem__)
            if ranked and _code(spec, kinds[0], pixels, lines) > _CODE:
                continue
            ranked.setdefault(Tile(pixels, size, lines, 1, lines=lines), cycles[pixels])
    return sorted(ranked, key=ranked.__getitem__)


def _in_memory_order(spec: KernelSpec, machine: Machine) -> list[Tile]:
    """Tiles that read all channels of one or two pixels of a few rows, then of the next ones: what
    comes from far away comes fastest in the order of memory, a line or two at a time."""
    line = max(1, _LINE // machine.lanes)
    shapes = [(2, line, 2, True)]
    if spec.conv.groups == spec.conv.in_channels:
        shapes = [(1, line, 2, True), (1, 2 * line, 2, False), *shapes, (1, line, 4, False)]
    return _tiles(spec, machine, shapes)


def _small(spec: KernelSpec, machine: Machine) -> list[Tile]:
    """Tiles of few pixels, which have used what they loaded before it is pushed out."""
    shapes = [(2, 4, 2, False), (4, 2, 2, False), (2, 1, 4, False), (2, 2, 2, False)]
    return _tiles(spec, machine, shapes)


def _tiles(
    spec: KernelSpec, machine: Machine, shapes: list[tuple[int, int, int, bool]]
) -> list[Tile]:
    """Those of (pixels, vectors, lines, ahead) that fit into the registers. None for layers with
    much arithmetic: these should reuse what they loaded."""
    if math.prod(spec.conv.weight_shape[1:]) > _LITTLE:
        return []
    found = []
    for pixels, vectors, lines, ahead in shapes:
        size = max(len(b.vectors) for b in blocks(spec.conv, machine.lanes, vectors))
        lines = min(lines, spec.conv.output_size[0])
        if (pixels + 1) * size * lines + SPARE <= machine.registers:
            found.append(Tile(pixels, size, lines, 1, lines=lines, ahead=ahead))
    return found


def _crowded(spec: KernelSpec) -> bool:
    """Whether one vector of channels of all pixels that a row of outputs reads meets so few places
    of the nearest cache that they push each other out: where pixels lie 512 bytes apart, eight."""
    conv = spec.conv
    places = _WAYS * _PAGE // math.gcd(_PAGE, 4 * spec.input_stride)
    return conv.kernel_size[0] * conv.input_size[1] > places


def _code(spec: KernelSpec, block: Block, pixels: int, lines: int) -> int:
    """Multiply-adds in the code of one block: what loops over rows and channels leave."""
    height, k = spec.conv.kernel_size
    once = k * (height * lines if lines > 1 else 1) * (1 if block.scalar else block.width)
    return len(strips(spec.conv, pixels)) * pixels * len(block.vectors) * once


def _pixels(spec: KernelSpec, machine: Machine, vectors: int) -> list[int]:
    """Output pixels of a tile: what registers hold beside the weights of all taps, or of some."""
    width, k = spec.conv.output_size[1], spec.conv.kernel_size[1]
    found: set[int] = set()
    for taps in {k, -(-k // 2), -(-k // 3), 3, 2, 1}:
        most = (machine.registers - SPARE - taps * vectors) // vectors
        found.update(min(n, width) for n in (most, most // 2) if n >= 1)
    return sorted(found)


def _cycles(spec: KernelSpec, machine: Machine, pixels: int, lines: int, block: Block) -> float:
    """Guess of the cycles for ``lines`` rows of one block and input channel, over lines."""
    conv, vectors = spec.conv, len(block.vectors)
    (height, k), (down, stride) = conv.kernel_size, conv.stride
    spread = conv.dilation[1]
    rows = {line * down + ky * conv.dilation[0] for line in range(lines) for ky in range(height)}
    # Loads for one pixel: each vector its own, or each group that they see.
    inputs = vectors
    if block.scalar:
        inputs = len({source for vector in block.vectors for source in vector.sources})
    total = 0.0
    for strip in strips(conv, pixels):
        sums = lines * strip.size * vectors
        at_once = taps_at_once(machine, sums, vectors * lines)
        loads = float(lines * height * k * vectors)
        for begin in range(0, k, at_once):
            taps = range(begin, min(k, begin + at_once))
            columns = {p * stride + kx * spread for p in range(strip.size) for kx in taps}
            loads += len(rows) * len(columns) * inputs
        compute = max(sums / _PER_CYCLE, _LATENCY) * height * k
        # Loads run beside the arithmetic, but not for nothing.
        total += strip.count * (max(compute, loads / _PER_CYCLE) + _LOAD * loads)
    return total / lines


def _orders(spec: KernelSpec, machine: Machine, tile: Tile, shared: bool) -> list[Tile]:
    """Orders in which the same tiles can pass, all served by the same code."""
    if spec.staged:
        whole = _laid_out(spec, machine, tile, 1, shared)
        few = max(1, whole.rows // (4 * tile.lines)) * tile.lines
        return [whole, replace(whole, rows=few)]
    number = _number(spec, machine, tile, shared)
    found = [_laid_out(spec, machine, tile, n, shared) for n in (number, min(4, number), 1)]
    if not shared:
        found.append(replace(found[-1], rows=_whole(spec, tile)))
    return found


def _whole(spec: KernelSpec, tile: Tile) -> int:
    """All rows, in whole lines of tiles."""
    return -(-spec.conv.output_size[0] // tile.lines) * tile.lines


def _number(spec: KernelSpec, machine: Machine, tile: Tile, shared: bool) -> int:
    """How many blocks can be finished before the next pixels: their weights stay close to the
    core, and tasks are left for all threads."""
    number = _count(spec, machine, tile)
    found = min(number, _WEIGHTS * number // _weights(spec))
    if shared:
        height = -(-spec.conv.output_size[0] // tile.lines)
        found = min(found, number * height // (_TASKS if height > 1 else _ROW_TASKS))
    return max(1, found)


def _weights(spec: KernelSpec) -> int:
    """Bytes of all weights."""
    return 4 * math.prod(spec.conv.weight_shape)


def _count(spec: KernelSpec, machine: Machine, tile: Tile) -> int:
    return sum(block.count for block in blocks(spec.conv, machine.lanes, tile.vectors))


def _laid_out(spec: KernelSpec, machine: Machine, tile: Tile, together: int, shared: bool) -> Tile:
    """``tile`` with ``together`` blocks at once, and with rows and channels that stay close to the
    core, in enough tasks."""
    conv, lines = spec.conv, tile.lines
    number = -(-_count(spec, machine, tile) // together)
    row = 4 * (
        conv.in_channels * conv.input_size[1] * conv.stride[0]
        + conv.out_channels * conv.output_size[1]
    )
    height = conv.output_size[0]
    rows = min(height, max(1, _ROWS // row))
    if number == 1:
        rows = height
    elif _weights(spec) > _WEIGHTS and _weights(spec) * (height // rows) > row * height * number:
        # Less is read when every block sees all rows than when all rows see every weight.
        rows = height
    if spec.staged_input:
        # Each task fills its buffer with the rows above and below too.
        rows = max(rows, 4 * (conv.kernel_size[0] - 1) * conv.dilation[0])
    if shared:
        rows = min(rows, max(1, height * number // _TASKS))
    rows = min(rows, height)
    rows = -(-height // -(-height // rows))
    rows = -(-rows // lines) * lines
    width = conv.in_channels // conv.groups
    weights = 4 * conv.taps * tile.vectors * machine.lanes
    chunk = sum_channels(conv, spec.chain)
    legal = [n for n in range(chunk, width + 1, chunk) if width % n == 0]
    channels = max((n for n in legal if n * weights <= _WEIGHTS), default=chunk)
    return replace(tile, rows=rows, channels=channels, blocks=together)
