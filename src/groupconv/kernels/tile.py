"""How the work of a kernel is cut into pieces that registers and caches hold."""

from dataclasses import dataclass, replace

from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import CHAIN, ConvSpec

# Registers for the input at hand.
SPARE = 1


@dataclass(frozen=True)
class Tile:
    """How the work is cut. All tiles give the same numbers, bit by bit.

    Args:
        pixels: neighbouring output pixels whose sums are kept in registers; more of them where a
            block has fewer vectors.
        vectors: vectors of output channels beside them.
        rows: output rows that pass before the next blocks of channels are taken.
        channels: input channels that pass before the next rows are taken, a multiple of
            :func:`sum_channels`.
        blocks: blocks of channels that are finished before the next pixels are taken; one where
            the rows are staged.
        lines: rows of output pixels whose sums are kept in registers.
        ahead: whether the rows that come next are asked for while these are computed, for tensors
            that come from far away; only where channels lie side by side in a vector.
        narrow: whether vectors are half as wide as a register. They leave fewer lanes empty at
            widths such as 8, 20 or 24, and some processors run two in the time of a wide one.
    """

    pixels: int
    vectors: int
    rows: int
    channels: int
    blocks: int = 1
    lines: int = 1
    ahead: bool = False
    narrow: bool = False

    def narrowed(self, machine: Machine) -> Machine:
        """The machine with vectors as wide as those of the tile."""
        return replace(machine, lanes=machine.lanes // 2) if self.narrow else machine

    @property
    def code(self) -> "Tile":
        """Equal for tiles that the same machine code serves: rows and blocks are its arguments."""
        return replace(self, rows=self.lines, blocks=1)


@dataclass(frozen=True)
class Strip:
    """Neighbouring tiles of a row that run the same code.

    Args:
        start: the first output pixel.
        size: output pixels in a tile.
        count: how many tiles.
        left, right: columns of the input that each tile lacks on either side.
    """

    start: int
    size: int
    count: int
    left: int
    right: int


def sum_channels(conv: ConvSpec, chain: int = CHAIN) -> int:
    """Input channels of one row of the kernel that are summed before they join the total.

    One long chain of sums loses accuracy with its length; a total of short ones much less. Where a
    group has few products they are one chain, and this is all its channels. The number depends on
    the kernel's spec alone, and so do the bits of the result.
    """
    width = conv.in_channels // conv.groups
    if not has_total(conv, chain):
        return width
    most = max(1, chain // conv.kernel_size[1])
    return max(n for n in range(1, min(width, most) + 1) if width % n == 0)


def has_total(conv: ConvSpec, chain: int = CHAIN) -> bool:
    """Whether the products of one output are more than one chain of sums."""
    return conv.fan_in > chain


def strips(conv: ConvSpec, pixels: int) -> list[Strip]:
    """Cut a row of outputs into the fewest tiles of at most ``pixels``, alike but for one pixel."""
    width, size_in, k = conv.output_size[1], conv.input_size[1], conv.kernel_size[1]
    stride, dilation, (before, _) = conv.stride[1], conv.dilation[1], conv.padding[1]
    number = -(-width // pixels)
    found: list[Strip] = []
    start = 0
    for i in range(number):
        size = width // number + (i < width % number)
        left = max(0, before - start * stride)
        last = (start + size - 1) * stride - before + (k - 1) * dilation
        right = max(0, last - size_in + 1)
        previous = found[-1] if found else None
        if previous and (previous.size, previous.left, previous.right) == (size, left, right):
            found[-1] = Strip(previous.start, size, previous.count + 1, left, right)
        else:
            found.append(Strip(start, size, 1, left, right))
        start += size
    return found


def taps_at_once(machine: Machine, sums: int, vectors: int) -> int:
    """Columns of the kernel whose weights fit in registers beside the sums."""
    return max(1, (machine.registers - SPARE - sums) // vectors)
