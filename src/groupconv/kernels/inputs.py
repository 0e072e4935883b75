"""How each lane of a vector gets the input channel of its own group."""

from collections.abc import Iterator, Sequence

from groupconv.kernels.blocks import Block, Vector
from groupconv.kernels.emit import Emitter


def inputs(e: Emitter, block: Block, x: str, offset: int, i: int) -> Iterator[str]:
    """For each vector of the block the input channel ``i`` of every lane's group, at one pixel.

    Args:
        x, offset: where the block's first input channel lies.
    """
    broadcasts: dict[int, str] = {}

    def broadcast(channel: int) -> str:
        if channel not in broadcasts:
            broadcasts[channel] = e.broadcast(x, offset + channel)
        return broadcasts[channel]

    def one(vector: Vector) -> str:
        channels = [source + i for source in vector.sources]
        if not vector.scalar:
            first = vector.sources[0]
            span = vector.sources[-1] + block.width - first
            return _pick(e, x, offset + first, span, [channel - first for channel in channels])
        # One value for all lanes, or one for each of a few runs of lanes.
        distinct = sorted(set(channels))
        value = broadcast(distinct[0])
        for channel in distinct[1:]:
            lanes = [
                lane + e.lanes * (lane < len(channels) and channels[lane] == channel)
                for lane in range(e.lanes)
            ]
            value = e.shuffle(value, broadcast(channel), lanes)
        return value

    return map(one, block.vectors)


def _pick(e: Emitter, x: str, offset: int, span: int, lanes: list[int]) -> str:
    """Lanes taken from ``span`` values that lie side by side, in as many loads as they need."""
    result = None
    for start in range(0, span, e.lanes):
        mine = [start <= lane < start + e.lanes for lane in lanes]
        if not any(mine):
            continue
        part = e.load(x, offset + start, min(e.lanes, span - start))
        if result is None:
            picks = [lane - start if m else None for lane, m in zip(lanes, mine, strict=True)]
            if picks == list(range(len(picks))):
                result = part
            else:
                result = e.shuffle(part, "poison", _pad(picks, e.lanes))
        else:
            picks = [
                e.lanes + lane - start if m else at
                for at, (lane, m) in enumerate(zip(lanes, mine, strict=True))
            ]
            result = e.shuffle(result, part, _pad(picks, e.lanes))
    assert result is not None
    return result


def _pad(lanes: Sequence[int | None], count: int) -> list[int | None]:
    return [*lanes, *[None] * (count - len(lanes))]
