"""The convolution itself as LLVM IR: a function that computes some rows of one block.

Inside, pixels are rows of channels (NHWC). A tile of output pixels keeps its sums in registers
while the taps of one kernel row and one input channel pass over it: every loaded input meets all
the taps that need it. Taps that fall outside the image are left out: by the bounds of a loop over
rows, and by the code of the tiles at both ends of a row.
"""

import functools
from collections.abc import Mapping

from groupconv.kernels.activation import activate
from groupconv.kernels.blocks import Block
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.inputs import inputs
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.tile import Strip, Tile, has_total, strips, sum_channels, taps_at_once

# Multiply-adds up to which the loop over input channels is unrolled, to make its own cost small.
_LOOP_BODY = 96
# Values in a line of memory.
_LINE = 16


class BlockFunction:
    """Writes ``name(x, w, bias, residual, y, begin, end, first, last)``: rows ``first`` to ``last``
    of the blocks ``begin`` to ``end`` among those of one form.

    ``x`` and ``y`` point at row 0, column 0: at channel 0 of the tensors, or at the block's first
    channel where they are staged in buffers.
    """

    def __init__(
        self, spec: KernelSpec, block: Block, machine: Machine, tile: Tile, name: str
    ) -> None:
        self.spec, self.conv, self.block, self.tile, self.name = spec, spec.conv, block, tile, name
        self.e = Emitter(machine)
        conv = spec.conv
        self.staged_output = not spec.channels_last_output
        # Distances in elements between neighbouring pixels and rows.
        self.input_pixel = block.inputs if spec.staged_input else spec.input_stride
        self.input_row = self.input_pixel * conv.input_size[1]
        if self.staged_output:
            self.output_pixel = block.outputs
            self.output_row = block.outputs * conv.output_size[1]
        else:
            self.output_pixel, self.output_row = self._distances(spec.output_stride)
        # Whether no row of the kernel ever falls outside the image.
        self.inside = max(conv.padding[0]) <= 0
        self.chunk = sum_channels(conv, spec.chain)
        assert tile.channels % self.chunk == 0
        self.channels = tile.channels if block.scalar else block.width
        self.strips = strips(
            conv, max(tile.pixels, tile.pixels * tile.vectors // len(block.vectors))
        )
        self.weights = (
            conv.kernel_size[0] * block.width * conv.kernel_size[1]
            * len(block.vectors) * machine.lanes
        )  # fmt: skip

    def _distances(self, stride: int) -> tuple[int, int]:
        """Elements between neighbouring outputs, and between their rows, in a tensor whose pixels
        lie ``stride`` apart."""
        down, across = self.spec.step
        return stride * across, stride * self.spec.output_tensor_size[1] * down

    def write(self) -> str:
        e, lines = self.e, self.tile.lines
        with e.loop(0, self.block.width, self.channels) as channel:
            done: Value = "%first"
            if lines > 1:
                whole = e.mul(e.div(e.sub("%last", "%first"), lines), lines)
                done = e.add("%first", whole)
                self._rows("%first", done, lines, channel)
            if lines == 1 or self.conv.output_size[0] % lines:
                self._rows(done, "%last", 1, channel)
        e.do("ret void")
        return (
            f"define internal void @{self.name}(ptr noalias %x, ptr noalias %w, ptr noalias %bias, "
            f"ptr %residual, ptr %y, i64 %begin, i64 %end, i64 %first, i64 %last) #0 {{\n"
            f"{e.text()}\n}}\n"
        )

    def call(self, e: Emitter, w: str, x: str, residual: str, y: str, *rest: Value) -> None:
        begin, end, first, last = rest
        e.do(
            f"call void @{self.name}(ptr {x}, ptr {w}, ptr %bias, ptr {residual}, ptr {y}, "
            f"i64 {begin}, i64 {end}, i64 {first}, i64 {last})"
        )

    def _rows(self, start: Value, stop: Value, lines: int, channel: Value) -> None:
        """Rows ``start`` to ``stop``, ``lines`` at a time."""
        e = self.e
        with e.loop(start, stop, lines) as row:
            for strip in self.strips:
                with e.loop(0, strip.count) as number, e.loop("%begin", "%end") as index:
                    column = e.add(strip.start, e.mul(number, strip.size))
                    self._tile(strip, lines, index, row, column, channel)

    def _tile(
        self,
        strip: Strip,
        lines: int,
        index: Value,
        row: Value,
        column: Value,
        channel: Value,
    ) -> None:
        e, conv, block = self.e, self.conv, self.block
        first_output, first_input = block.start(e, index)
        x = "%x" if self.spec.staged_input else e.offset("%x", first_input)
        w = e.offset("%w", e.mul(index, self.weights))
        at = e.add(e.mul(row, self.output_row), e.mul(column, self.output_pixel))
        if not self.staged_output:
            at = e.add(at, first_output)
        target = e.offset("%y", at)
        places = self._places(strip, lines, self.output_pixel, self.output_row)
        starts = ["zeroinitializer"] * len(block.vectors)
        if self.spec.bias:
            bias = e.offset("%bias", first_output)
            starts = [e.load(bias, v.offset, len(v.sources)) for v in block.vectors]
        fresh = list(starts) * (strip.size * lines)
        sums = fresh
        if self.channels < block.width:
            sums = e.choose(
                e.let(f"icmp eq i64 {channel}, 0"),
                lambda: fresh,
                lambda: [e.load(target, *place) for place in places],
            )
        left = e.sub(e.mul(column, conv.stride[1]), conv.padding[1][0])
        corner = e.offset(x, e.mul(left, self.input_pixel))
        top = e.sub(e.mul(row, conv.stride[0]), conv.padding[0][0])
        if self.tile.ahead:
            self._ask_ahead(strip, lines, corner, top)
        sums = self._total(strip, lines, corner, w, top, channel, sums)
        if not self.staged_output and (self.spec.residual or self.spec.activation):
            added, beside = at, places
            if self.spec.residual and self.spec.residual_stride != self.spec.output_stride:
                pixel, line = self._distances(self.spec.residual_stride)
                added = e.add(e.add(e.mul(row, line), e.mul(column, pixel)), first_output)
                beside = self._places(strip, lines, pixel, line)
            residual = e.offset("%residual", added)
            if self.channels < block.width:
                sums = e.choose(
                    e.let(f"icmp sge i64 {e.add(channel, self.channels)}, {block.width}"),
                    lambda: self._finish(sums, residual, beside),
                    lambda: sums,
                )
            else:
                sums = self._finish(sums, residual, beside)
        for value, place in zip(sums, places, strict=True):
            e.store(value, target, *place)

    def _places(self, strip: Strip, lines: int, pixel: int, row: int) -> list[tuple[int, int]]:
        """Where the sums of a tile go, counted from its first output, and how many lanes of each;
        ``pixel`` and ``row`` are the elements between neighbours."""
        return [
            (y * row + x * pixel + vector.offset, len(vector.sources))
            for y in range(lines)
            for x in range(strip.size)
            for vector in self.block.vectors
        ]

    def _ask_ahead(self, strip: Strip, lines: int, x: str, top: Value) -> None:
        """Ask for the rows of the input that the next rows of outputs are the first to need."""
        e, conv = self.e, self.conv
        new = lines * conv.stride[0]
        reach = (lines - 1) * conv.stride[0] + (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        x = e.offset(x, e.mul(e.add(top, reach), self.input_row))
        for row in range(new):
            for column in range(strip.size * conv.stride[1]):
                for channel in range(0, self.block.inputs, _LINE):
                    at = row * self.input_row + column * self.input_pixel + channel
                    e.prefetch(x, at)

    def _finish(self, sums: list[str], residual: str, places: list[tuple[int, int]]) -> list[str]:
        e, spec = self.e, self.spec

        def add() -> list[str]:
            return [
                e.arithmetic("fadd", value, e.load(residual, *place))
                for value, place in zip(sums, places, strict=True)
            ]

        if spec.residual == "before":
            sums = add()
        sums = [activate(e, spec.activation, spec.slope, value) for value in sums]
        return add() if spec.residual == "after" else sums

    def _total(
        self,
        strip: Strip,
        lines: int,
        x: str,
        w: str,
        top: Value,
        channel: Value,
        sums: list[str],
    ) -> list[str]:
        """All products added to ``sums``: in one chain, or by way of totals in memory."""
        e = self.e
        add = self._one_line if lines == 1 else self._several_lines
        if not has_total(self.conv, self.spec.chain):
            return add(strip, lines, x, w, top, 0, sums, None)
        totals = e.stack(len(sums))
        for i, value in enumerate(sums):
            e.store(value, totals, i * e.lanes)
        if self.block.scalar:
            with e.loop(channel, e.add(channel, self.channels), self.chunk) as first:
                add(strip, lines, x, w, top, first, [], totals)
        else:
            for first in range(0, self.channels, self.chunk):
                add(strip, lines, x, w, top, first, [], totals)
        return [e.load(totals, i * e.lanes) for i in range(len(sums))]

    def _one_line(
        self,
        strip: Strip,
        lines: int,
        x: str,
        w: str,
        top: Value,
        first: Value,
        sums: list[str],
        totals: str | None,
    ) -> list[str]:
        """One row of outputs: a loop over the rows of the kernel that lie inside the image."""
        e, conv = self.e, self.conv
        dilation = conv.dilation[0]
        low: Value = 0
        high: Value = conv.kernel_size[0]
        if not self.inside:
            above = e.sub(0, top)
            low = e.div(e.add(e.max(above, 0), dilation - 1), dilation)
            below = e.max(e.add(above, conv.input_size[0] - 1 + dilation), 0)
            high = e.min(e.div(below, dilation), conv.kernel_size[0])

        def kernel_row(ky: Value, sums: list[str]) -> list[str]:
            source = e.offset(x, e.mul(e.add(top, e.mul(ky, dilation)), self.input_row))
            return self._row(strip, lines, source, w, {0: ky}, first, sums, totals)

        return e.fold(low, high, 1, sums, kernel_row)

    def _several_lines(
        self,
        strip: Strip,
        lines: int,
        x: str,
        w: str,
        top: Value,
        first: Value,
        sums: list[str],
        totals: str | None,
    ) -> list[str]:
        """Several rows of outputs: each row of the input meets all that need it."""
        e, conv = self.e, self.conv
        meets: dict[int, dict[int, Value]] = {}
        for line in range(lines):
            for ky in range(conv.kernel_size[0]):
                row = line * conv.stride[0] + ky * conv.dilation[0]
                meets.setdefault(row, {})[line] = ky
        for row, taps in sorted(meets.items()):
            at = e.add(top, row)
            source = e.offset(x, e.mul(at, self.input_row))
            added = functools.partial(self._row, strip, lines, source, w, taps, first, sums, totals)
            if self.inside:
                sums = added()
            else:
                inside = e.let(f"icmp ult i64 {at}, {conv.input_size[0]}")
                sums = e.choose(inside, added, functools.partial(list, sums))
        return sums

    def _row(
        self,
        strip: Strip,
        lines: int,
        x: str,
        w: str,
        taps: Mapping[int, Value],
        first: Value,
        sums: list[str],
        totals: str | None,
    ) -> list[str]:
        """Products of one row of the input, added to ``sums``, or to ``totals`` in memory."""
        e, vectors = self.e, len(self.block.vectors)
        if totals is None:
            return self._channels(strip, x, w, taps, first, sums)
        zeros = ["zeroinitializer"] * (lines * strip.size * vectors)
        found = self._channels(strip, x, w, taps, first, zeros)
        for line in taps:
            for i in range(line * strip.size * vectors, (line + 1) * strip.size * vectors):
                total = e.load(totals, i * e.lanes)
                e.store(e.arithmetic("fadd", total, found[i]), totals, i * e.lanes)
        return sums

    def _channels(
        self,
        strip: Strip,
        x: str,
        w: str,
        taps: Mapping[int, Value],
        first: Value,
        sums: list[str],
    ) -> list[str]:
        """A chunk of channels of one row of the input, for each line of the tile one kernel row."""
        e, conv, count = self.e, self.conv, self.chunk
        step = conv.kernel_size[1] * len(self.block.vectors) * e.lanes
        # Weights lie as [chunk of channels][kernel row][channel][kernel column][vector][lane].
        w = e.offset(w, e.mul(first, conv.kernel_size[0] * step))
        rows = {line: e.offset(w, e.mul(ky, count * step)) for line, ky in taps.items()}
        if not self.block.scalar:
            assert isinstance(first, int)
            for i in range(count):
                at = {line: e.offset(row, i * step) for line, row in rows.items()}
                sums = self._taps(strip, e.opaque(x), at, first + i, sums)
            return sums
        unroll = self._unroll(len(sums) * len(taps), count)

        def channels(i: Value, sums: list[str]) -> list[str]:
            for u in range(unroll):
                channel = e.add(i, u)
                source = e.opaque(e.offset(x, e.add(first, channel)))
                at = {line: e.offset(row, e.mul(channel, step)) for line, row in rows.items()}
                sums = self._taps(strip, source, at, 0, sums)
            return sums

        return e.fold(0, count, unroll, sums, channels)

    def _unroll(self, sums: int, count: int) -> int:
        body = sums * self.conv.kernel_size[1]
        return next((u for u in (8, 4, 2) if count % u == 0 and u * body <= _LOOP_BODY), 1)

    def _taps(
        self, strip: Strip, x: str, w: Mapping[int, str], i: int, sums: list[str]
    ) -> list[str]:
        """All columns of the kernel for one input channel; ``w`` holds each line's weights."""
        e, conv, vectors = self.e, self.conv, self.block.vectors
        k, stride, dilation = conv.kernel_size[1], conv.stride[1], conv.dilation[1]
        at_once = taps_at_once(e.machine, len(sums), len(vectors) * len(w))
        end = (strip.size - 1) * stride + (k - 1) * dilation - strip.right
        sums = list(sums)
        for begin in range(0, k, at_once):
            columns: dict[int, list[tuple[int, int]]] = {}
            for kx in range(begin, min(k, begin + at_once)):
                for pixel in range(strip.size):
                    column = pixel * stride + kx * dilation
                    if strip.left <= column <= end:
                        columns.setdefault(column, []).append((pixel, kx))
            # A pointer of its own: LLVM would keep the inputs for the columns that come next.
            x = e.opaque(x)
            used = sorted({kx for meets in columns.values() for _, kx in meets})
            weights = {
                (line, kx, q): e.load(row, (kx * len(vectors) + q) * e.lanes)
                for line, row in w.items()
                for kx in used
                for q in range(len(vectors))
            }
            for column, meets in sorted(columns.items()):
                values = inputs(e, self.block, x, column * self.input_pixel, i)
                for q, value in enumerate(values):
                    for line in w:
                        for pixel, kx in meets:
                            s = (line * strip.size + pixel) * len(vectors) + q
                            sums[s] = e.multiply_add(value, weights[line, kx, q], sums[s])
        return sums
