"""Channels of a pixel, a few vectors at a time."""

from collections.abc import Callable, Sequence

from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value

# A vector of channels: how far from the first channel at hand, and how many of its lanes are used.
Cut = tuple[int, int]


def cuts(channels: int, lanes: int) -> list[Cut]:
    """Vectors that cover ``channels``.

    The last one overlaps the one before it rather than being in part empty: to store part of a
    vector takes ten times as long on some processors. What both hold is written twice.
    """
    if channels < lanes:
        return [(0, channels)]
    starts = list(range(0, channels - lanes + 1, lanes))
    if channels % lanes:
        starts.append(channels - lanes)
    return [(start, lanes) for start in starts]


def cover(
    e: Emitter, channels: int, most: int, body: Callable[[Value, Sequence[Cut]], None]
) -> None:
    """Run ``body(channel, vectors)`` until all channels are covered: the vectors, ``most`` at most,
    are those that start so far from ``channel``."""
    found = cuts(channels, e.lanes)
    size, number = blocks(channels, e.lanes, most)
    if number:
        with e.loop(0, number * size * e.lanes, size * e.lanes) as channel:
            body(channel, found[:size])
    if rest := found[number * size :]:
        body(0, rest)


def blocks(channels: int, lanes: int, most: int) -> tuple[int, int]:
    """Cut into blocks of about ``most`` vectors: how many in each, and how many blocks are full,
    with vectors that don't overlap."""
    vectors = -(-channels // lanes)
    size = -(-vectors // -(-vectors // most))
    return size, channels // lanes // size
