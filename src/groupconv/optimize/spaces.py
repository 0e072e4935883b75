"""Records of how channels are tied: spaces, the axes that run over them, the parameters on them.

Channels of different tensors that must keep together (a convolution's output, the same channel
after an activation, the weights that read it) are one *strand*. A :class:`Space` holds strands
that everything in the network treats alike, so that any reordering of them, done at once on every
parameter they run through, leaves the network's output as it was. A convolution that reads a
concatenation has an input axis over several spaces; a tensor of which half is sliced off has its
channels in two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Space:
    """Interchangeable strands.

    Args:
        channels: how many strands.
        fixed: why their order can't change, or None.
    """

    channels: int
    fixed: str | None


@dataclass(frozen=True)
class Axis:
    """What stands at each position of a channel axis.

    Args:
        spaces: the space, an index into :attr:`Trace.spaces`.
        strands: which of the space's strands.
        slots: which of the positions of that strand, where one strand has several on the axis
            (a flattened map, a concatenation with itself); 0 otherwise.
    """

    spaces: tuple[int, ...]
    strands: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def space(self) -> int | None:
        """The space whose strands stand here once each, if the axis is no more than that."""
        whole = set(self.spaces)
        alone = len(whole) == 1 and len(set(self.strands)) == len(self.strands)
        return whole.pop() if alone else None

    @cached_property
    def parts(self) -> dict[int, NDArray[np.int64]]:
        """For each space its positions, ``(strands, slots)``."""
        spaces = np.array(self.spaces, dtype=np.int64)
        keys = np.lexsort((self.slots, self.strands, self.spaces))
        runs = np.split(keys, np.flatnonzero(np.diff(spaces[keys])) + 1)
        strands = np.array(self.strands, dtype=np.int64)
        return {int(spaces[run[0]]): run.reshape(len(np.unique(strands[run])), -1) for run in runs}

    def channels(self, orders: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
        """The original position of what stands at each position.

        Args:
            orders: space to the original strand in the place of each strand; spaces that are left
                out are as they were.
        """
        result = np.arange(len(self.spaces))
        for space, positions in self.parts.items():
            if space in orders:
                result[positions] = positions[list(orders[space])]
        return tuple(result.tolist())


@dataclass(frozen=True)
class Member:
    """A parameter or buffer with an axis of channels.

    Args:
        module: qualified name of its owner.
        parameter: its name there.
        axis: which of its axes.
        groups: into how many equal blocks its first axis is cut, each with its own order of
            ``axis``; 1 unless it is the weight of a grouped convolution.
        runs: what stands on the axis, block after block.
    """

    module: str
    parameter: str
    axis: int
    groups: int
    runs: Axis
