"""Rows of channels: summed up, or written where they were read."""

from collections.abc import Callable, Sequence

from groupconv.compiler.steps.channels import Cut, cover
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value

# Vectors that are computed before they are stored.
_VECTORS = 4
# Chains side by side, so that each waits for its last step while others run.
_CHAINS = 4


def total(
    e: Emitter,
    channels: int,
    start: Sequence[str],
    terms: Callable[[Value, int], list[str]],
    combine: Callable[[str, str], str],
) -> list[str]:
    """Each of the ``terms(first, count)`` combined over a row of channels, in every lane.

    Args:
        start: for each term what is neutral in ``combine``, in every lane.
    """
    lanes, size = e.lanes, len(start)
    whole = channels // lanes
    chains = max(1, min(_CHAINS, whole))
    grouped = whole // chains * chains * lanes

    def join(state: list[str], first: Value, count: int) -> list[str]:
        new = terms(first, count)
        if count < lanes:
            kept = [lane if lane < count else lanes for lane in range(lanes)]
            new = [e.shuffle(t, neutral, kept) for t, neutral in zip(new, start, strict=True)]
        return [combine(a, b) for a, b in zip(state, new, strict=True)]

    def group(first: Value, states: list[str]) -> list[str]:
        parts = [states[i * size : (i + 1) * size] for i in range(chains)]
        joined = [join(part, e.add(first, i * lanes), lanes) for i, part in enumerate(parts)]
        return [vector for part in joined for vector in part]

    states = list(start) * chains
    if grouped:
        states = e.fold(0, grouped, chains * lanes, states, group)
    parts = [states[i * size : (i + 1) * size] for i in range(chains)]
    for i, first in enumerate(range(grouped, channels, lanes)):
        parts[i % chains] = join(parts[i % chains], first, min(lanes, channels - first))
    while len(parts) > 1:
        last = parts.pop()
        parts[0] = [combine(a, b) for a, b in zip(parts[0], last, strict=True)]
    return [_across(e, vector, combine) for vector in parts[0]]


def _across(e: Emitter, vector: str, combine: Callable[[str, str], str]) -> str:
    """All lanes of a vector combined, in every lane."""
    distance = e.lanes // 2
    while distance:
        other = e.shuffle(vector, "poison", [lane ^ distance for lane in range(e.lanes)])
        vector = combine(vector, other)
        distance //= 2
    return vector


def store(e: Emitter, y: str, channels: int, value: Callable[[Value, int], str]) -> None:
    """Write ``value(first, count)`` to a row of channels; it may read what lies in its place."""

    def some(channel: Value, vectors: Sequence[Cut]) -> None:
        (offset, _), *others = vectors
        if not others and offset % e.lanes:
            # It would read what was written in the place of its first channels.
            whole = channels // e.lanes * e.lanes
            vectors = [(whole, channels - whole)]
        values = [value(e.add(channel, offset), count) for offset, count in vectors]
        for result, (offset, count) in zip(values, vectors, strict=True):
            e.store(result, y, e.add(channel, offset), count)

    cover(e, channels, _VECTORS, some)
